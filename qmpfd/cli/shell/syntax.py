"""Parser for the input of ``qmpfd shell``: JSON, or a short form.

The short form is that of QEMU's qmp-shell: a command's name, then its arguments as ``name=value``,
with the quotes of sh.  A value is converted to its type in the server's schema; in brackets or
braces it is JSON.  ``a.b=value`` sets member b of the object a.  Descriptors are named as in sh:
``< FILE``, ``> FILE``, ``>> FILE``, ``<> FILE``; or ``--fd N`` for an open descriptor of the shell.
"""

from __future__ import annotations

import json
import os
import re
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

#: An argument whose value is a JSON object or array follows.
_JSON_ARGUMENT = re.compile(r"""\s*([^\s=<>"'\\]+)=(?=[\[{])""")

#: A redirection, or a word of sh: plain characters, escaped ones, and quoted strings.
_WORD = re.compile(r"""\s*(<>|>>|[<>]|(?:[^\s<>"'\\]|\\.|"(?:[^"\\]|\\.)*"|'[^']*')+)""", re.DOTALL)

_QUOTED = re.compile(r"""\\(.)|"((?:[^"\\]|\\.)*)"|'([^']*)'""", re.DOTALL)


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
        request, end = _json(text, 0)
        words, values = _split(text, end)
        passed, words = _passed(words)
        if words or values:
            unknown = words[0] if words else values[0][0]
            raise UsageError(f"{unknown!r} is neither < FILE nor --fd N")
        request_id = {"id": request["id"]} if "id" in request else {}
        return Typed(*_request(request), passed, request_id)
    (command, *words), values = _split(text, 0)
    passed, words = _passed(words)
    arguments: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name:
            raise UsageError(f"{word!r} is neither name=value, < FILE nor --fd N")
        _put(arguments, name, convert(command, name, value))
    for name, found in values:
        _put(arguments, name, found)
    return Typed(command, arguments, passed, {})


def _put(arguments: dict[str, Any], name: str, value: Any) -> None:
    """Set the argument, or the member of one, that *name* tells."""
    *parents, last = name.split(".")
    for parent in parents:
        arguments = arguments.setdefault(parent, {})
        if not isinstance(arguments, dict):
            raise UsageError(f"{parent!r} is given twice")
    if last in arguments:
        raise UsageError(f"{name!r} is given twice")
    arguments[last] = value


def _split(text: str, at: int) -> tuple[list[str], list[tuple[str, Any]]]:
    """Split *text*, which does not end with a blank, from index *at* on: into words without their
    quotes, and arguments in JSON.
    """
    words: list[str] = []
    values: list[tuple[str, Any]] = []
    while at < len(text):
        if argument := _JSON_ARGUMENT.match(text, at):
            value, at = _json(text, argument.end())
            values.append((argument[1], value))
        elif word := _WORD.match(text, at):
            words.append(_QUOTED.sub(_unquoted, word[1]))
            at = word.end()
        else:
            raise UsageError(f"the quoting is wrong: {text[at : at + 20]!r}")
    return words, values


def _unquoted(quoted: re.Match[str]) -> str:
    """The text of a string in quotes, or of an escaped character (sh, 2.2)."""
    escaped, double, single = quoted.groups()
    if double is not None:
        return re.sub(r'\\(["\\])', r"\1", double)
    return escaped or single


def _json(text: str, at: int) -> tuple[Any, int]:
    """Decode the JSON value at index *at*; return it and the index of its end."""
    try:
        return _decode(text, at)
    except (ValueError, RecursionError) as exc:
        raise UsageError(f"not JSON: {exc}") from None


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
            if not (number.isascii() and number.isdecimal()) or len(number) > _DIGITS:
                raise UsageError("--fd needs the number of an open descriptor")
            passed.append(Passed(number=int(number)))
        else:
            rest.append(word)
    return passed, rest
