"""What is typed into ``qmpfd shell``: JSON, or a short form of it.

The short form is a command's name, then its arguments as ``name=value``.  A value is read as its
type in the server's schema has it; in quotes, brackets or braces it is JSON.  Descriptors are
named as in sh: ``< FILE``, ``> FILE``, ``>> FILE``, ``<> FILE``; or ``--fd N`` for one that the
shell has open.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

#: How sh opens what is behind each of them.
_REDIRECTIONS = {
    "<": os.O_RDONLY,
    "<>": os.O_RDWR | os.O_CREAT,
    ">": os.O_WRONLY | os.O_CREAT | os.O_TRUNC,
    ">>": os.O_WRONLY | os.O_CREAT | os.O_APPEND,
}

_PAIRS = {"{": "}", "[": "]"}


class BadInput(Exception):
    """What was typed is no command."""


class Passed(NamedTuple):
    """A descriptor to pass: a file to open in some way, or a number."""

    path: str = ""
    flags: int = 0
    number: int = -1


class Typed(NamedTuple):
    """A command as it was typed."""

    command: str
    arguments: dict[str, Any]
    passed: list[Passed]
    id: Any = None
    has_id: bool = False


def unfinished(text: str) -> bool:
    """Whether a bracket, a brace or a quote in *text* is still open, so that a line is to follow."""
    return _scan(text)[1]


def words(text: str) -> list[str]:
    """*text* cut at the blanks that are in no quotes, brackets or braces; those stay on."""
    return _scan(text)[0]


def _scan(text: str) -> tuple[list[str], bool]:
    found: list[str] = []
    word = ""
    open_: list[str] = []  # the ends that are waited for
    quote = ""
    escaped = False
    for char in text:
        if quote:
            if escaped:
                escaped = False
            elif char == "\\":
                escaped = True
            elif char == quote:
                quote = ""
        elif char in "\"'" and (open_ or not word or word[-1] in "=<>"):
            quote = char
        elif char in _PAIRS:
            open_.append(_PAIRS[char])
        elif open_ and char == open_[-1]:
            open_.pop()
        elif char.isspace() and not open_:
            if word:
                found.append(word)
            word = ""
            continue
        word += char
    if word:
        found.append(word)
    return found, bool(quote or open_)


def parse(text: str, convert: Callable[[str, str, str], Any]) -> Typed:
    """The command that *text* is.

    Args:
        text: what was typed; not blank.
        convert: given a command, the name of an argument and its value as text, that value.

    Raises:
        BadInput: it is no command; the text says why.
    """
    found = words(text)
    if unfinished(text):
        raise BadInput("a bracket, a brace or a quote is still open")
    first, rest = found[0], found[1:]
    arguments: dict[str, Any] = {}
    if first.startswith("{"):
        request = _json(first)
        command, arguments = _request(request)
        has_id, request_id = "id" in request, request.get("id")
    else:
        command, has_id, request_id = first, False, None
    passed, rest = _passed(rest)
    for word in rest:
        name, equals, value = word.partition("=")
        if not equals or not name or first.startswith("{"):
            raise BadInput(f"{word!r} is neither name=value, < FILE nor --fd N")
        _put(arguments, name, _value(value, partial(convert, command, name)))
    return Typed(command, arguments, passed, request_id, has_id)


def _request(request: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    command, arguments = request.get("execute"), request.get("arguments", {})
    unknown = request.keys() - {"execute", "arguments", "id"}
    if unknown:
        raise BadInput(f"a request has no member {min(unknown)!r}: execute, arguments and id")
    if not isinstance(command, str) or not isinstance(arguments, dict):
        raise BadInput('a request looks like this: {"execute": "NAME", "arguments": {...}}')
    return command, arguments


def _passed(found: list[str]) -> tuple[list[Passed], list[str]]:
    """The descriptors among words, and the other words."""
    passed: list[Passed] = []
    rest: list[str] = []
    waiting = iter(found)
    for word in waiting:
        sign = next((sign for sign in ("<>", ">>", "<", ">") if word.startswith(sign)), None)
        option, equals, number = word.partition("=")
        if sign is not None:
            path = word.removeprefix(sign) or next(waiting, "")
            if not path:
                raise BadInput(f"what file is behind {sign}?")
            passed.append(Passed(os.path.expanduser(_unquoted(path)), _REDIRECTIONS[sign]))
        elif option == "--fd":
            number = number if equals else next(waiting, "")
            if not number.isdecimal():
                raise BadInput("--fd takes the number of an open descriptor")
            passed.append(Passed(number=int(number)))
        else:
            rest.append(word)
    return passed, rest


def _put(arguments: dict[str, Any], name: str, value: Any) -> None:
    """Enter ``a.b=value`` as the member b of the object a."""
    *parents, last = name.split(".")
    for parent in parents:
        arguments = arguments.setdefault(parent, {})
        if not isinstance(arguments, dict):
            raise BadInput(f"{parent!r} has a value already")
    if last in arguments:
        raise BadInput(f"{name!r} is there twice")
    arguments[last] = value


def _value(text: str, convert: Callable[[str], Any]) -> Any:
    if text[:1] in ('"', "{", "["):
        return _json(text)
    if text[:1] == "'":
        return _unquoted(text)
    return convert(text)


def _unquoted(text: str) -> str:
    if len(text) > 1 and text[0] in "\"'" and text[-1] == text[0]:
        return text[1:-1]
    return text


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise BadInput(f"this is not JSON: {exc}") from None
