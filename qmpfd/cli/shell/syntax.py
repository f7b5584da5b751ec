"""Parser for the input of ``qmpfd shell``: JSON, or a short form.

The short form is a command's name, then its arguments as ``name=value``, with the quotes of sh.  A
value is converted to its type in the server's schema; anything but a string is JSON.  Descriptors
are named as in sh: ``< FILE``, ``> FILE``, ``>> FILE``, ``<> FILE``; or ``--fd N`` for an open
descriptor of the shell.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable
from typing import Any, NamedTuple

from ..exit_codes import UsageError

#: Flags for open(2) of each redirection of sh.
_REDIRECTIONS = {
    "<": os.O_RDONLY,
    "<>": os.O_RDWR | os.O_CREAT,
    ">": os.O_WRONLY | os.O_CREAT | os.O_TRUNC,
    ">>": os.O_WRONLY | os.O_CREAT | os.O_APPEND,
}

#: Maximum number of digits of a descriptor's number.
_DIGITS = 9

_decode = json.JSONDecoder().raw_decode


class Passed(NamedTuple):
    """A descriptor to pass: a file to open with *flags*, or the number of an open descriptor."""

    path: str = ""
    flags: int = 0
    number: int = -1


class Typed(NamedTuple):
    """A parsed command; *id* has the member ``id`` of the request, for the reply."""

    command: str
    arguments: dict[str, Any]
    passed: list[Passed]
    id: dict[str, Any]


def unfinished(text: str) -> bool:
    """Return whether *text* is an incomplete JSON object, which continues in the next line."""
    text = text.strip()
    try:
        if text.startswith("{"):
            _decode(text)
    except json.JSONDecodeError as exc:
        return exc.pos >= len(text) or exc.msg.startswith("Unterminated string")
    except RecursionError:
        pass
    return False


def parse(text: str, convert: Callable[[str, str, str], Any]) -> Typed:
    """Parse a command.

    Args:
        text: the input; not blank.
        convert: converts the value of an argument; called with command, argument and text.

    Raises:
        UsageError: *text* is not a valid command; the message says why.
    """
    text = text.strip()
    if text.startswith("{"):
        try:
            request, end = _decode(text)
        except (ValueError, RecursionError) as exc:
            raise UsageError(f"not JSON: {exc}") from None
        passed, rest = _passed(_words(text[end:]))
        if rest:
            raise UsageError(f"{rest[0]!r} is neither < FILE nor --fd N")
        request_id = {"id": request["id"]} if "id" in request else {}
        return Typed(*_request(request), passed, request_id)
    command, *words = _words(text)
    passed, rest = _passed(words)
    arguments: dict[str, Any] = {}
    for word in rest:
        name, equals, value = word.partition("=")
        if not equals or not name:
            raise UsageError(f"{word!r} is neither name=value, < FILE nor --fd N")
        if name in arguments:
            raise UsageError(f"{name!r} is given twice")
        arguments[name] = convert(command, name, value)
    return Typed(command, arguments, passed, {})


def _words(text: str) -> list[str]:
    """Split *text* into words and redirections, as sh does."""
    lexer = shlex.shlex(text, posix=True, punctuation_chars="<>")
    lexer.whitespace_split = True
    lexer.commenters = ""
    try:
        return list(lexer)
    except ValueError as exc:
        raise UsageError(f"the quoting is wrong: {exc}") from None


def _request(request: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    command, arguments = request.get("execute"), request.get("arguments", {})
    if unknown := request.keys() - {"execute", "arguments", "id"}:
        known = "only execute, arguments and id"
        raise UsageError(f"a request has no member {min(unknown)!r}, {known}")
    if not isinstance(command, str) or not isinstance(arguments, dict):
        raise UsageError('a request looks like this: {"execute": "NAME", "arguments": {...}}')
    return command, arguments


def _passed(words: list[str]) -> tuple[list[Passed], list[str]]:
    """Split words into descriptors to pass and other words."""
    passed: list[Passed] = []
    rest: list[str] = []
    waiting = iter(words)
    for word in waiting:
        option, equals, number = word.partition("=")
        if word in _REDIRECTIONS:
            path = next(waiting, "")
            if not path:
                raise UsageError(f"{word} needs a file name")
            passed.append(Passed(os.path.expanduser(path), _REDIRECTIONS[word]))
        elif option == "--fd":
            number = number if equals else next(waiting, "")
            if not number.isdecimal() or len(number) > _DIGITS:
                raise UsageError("--fd needs the number of an open descriptor")
            passed.append(Passed(number=int(number)))
        else:
            rest.append(word)
    return passed, rest
