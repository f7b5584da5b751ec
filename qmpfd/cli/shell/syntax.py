"""Parser for the input of ``qmpfd shell``: JSON, or a short form.

The short form is a command's name, then its arguments as ``name=value``.  A value is converted to
its type in the server's schema; in quotes, brackets or braces it is JSON.  Descriptors are named
as in sh: ``< FILE``, ``> FILE``, ``>> FILE``, ``<> FILE``; or ``--fd N`` for an open descriptor of
the shell.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

#: Flags for open(2) of each redirection of sh.
_REDIRECTIONS = {
    "<": os.O_RDONLY,
    "<>": os.O_RDWR | os.O_CREAT,
    ">": os.O_WRONLY | os.O_CREAT | os.O_TRUNC,
    ">>": os.O_WRONLY | os.O_CREAT | os.O_APPEND,
}

#: Maximum number of digits of a descriptor's number.
_DIGITS = 9

_PAIRS = {"{": "}", "[": "]"}


class BadInput(Exception):
    """The input is not a valid command."""


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


class Scanner:
    """Splits text at blanks outside of quotes, brackets and braces, which stay in the words."""

    def __init__(self) -> None:
        self._words: list[str] = []
        self._word: list[str] = []
        self._ends: list[str] = []  # stack of the closing brackets, braces and quote to come
        self._escaped = False

    def feed(self, text: str) -> None:
        """Continue with more text."""
        for char in text:
            end = self._ends[-1] if self._ends else ""
            if end in ("'", '"'):
                if self._escaped or char == "\\":
                    self._escaped = not self._escaped
                elif char == end:
                    self._ends.pop()
            elif char in "\"'" and (end or not self._word or self._word[-1] in "=<>"):
                self._ends.append(char)
            elif char in _PAIRS:
                self._ends.append(_PAIRS[char])
            elif char == end:
                self._ends.pop()
            elif char.isspace() and not end:
                self._end_word()
                continue
            self._word.append(char)

    def _end_word(self) -> None:
        if self._word:
            self._words.append("".join(self._word))
            self._word.clear()

    @property
    def unfinished(self) -> bool:
        """Whether a bracket, a brace or a quote is still open, so that another line follows."""
        return bool(self._ends)

    def words(self) -> list[str]:
        """End the input and return its words."""
        self._end_word()
        return self._words


def unfinished(text: str) -> bool:
    """Return whether a bracket, a brace or a quote in *text* is still open."""
    scanner = Scanner()
    scanner.feed(text)
    return scanner.unfinished


def parse(text: str, convert: Callable[[str, str, str], Any]) -> Typed:
    """Parse a command.

    Args:
        text: the input; not blank.
        convert: converts the value of an argument; called with command, argument and text.

    Raises:
        BadInput: *text* is not a valid command; the message says why.
    """
    scanner = Scanner()
    scanner.feed(text)
    if scanner.unfinished:
        raise BadInput("a bracket, a brace or a quote is still open")
    found = scanner.words()
    first, rest = found[0], found[1:]
    arguments: dict[str, Any] = {}
    if first.startswith("{"):
        request = _json(first)
        command, arguments = _request(request)
    else:
        command, request = first, {}
    passed, rest = _passed(rest)
    for word in rest:
        name, equals, value = word.partition("=")
        if not equals or not name or first.startswith("{"):
            raise BadInput(f"{word!r} is neither name=value, < FILE nor --fd N")
        _put(arguments, name, _value(value, partial(convert, command, name)))
    _check_sendable([command, arguments])
    request_id = {"id": request["id"]} if "id" in request else {}
    return Typed(command, arguments, passed, request_id)


def _check_sendable(value: list[Any]) -> None:
    """Refuse values that Python's json can write but QMP cannot carry: NaN, lone surrogates."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        raise BadInput("the command is not UTF-8") from None
    except (ValueError, RecursionError) as exc:
        raise BadInput(f"the command cannot be sent: {exc}") from None


def _request(request: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    command, arguments = request.get("execute"), request.get("arguments", {})
    unknown = request.keys() - {"execute", "arguments", "id"}
    if unknown:
        raise BadInput(f"a request has no member {min(unknown)!r}, only execute, arguments and id")
    if not isinstance(command, str) or not isinstance(arguments, dict):
        raise BadInput('a request looks like this: {"execute": "NAME", "arguments": {...}}')
    return command, arguments


def _passed(found: list[str]) -> tuple[list[Passed], list[str]]:
    """Split words into descriptors to pass and other words."""
    passed: list[Passed] = []
    rest: list[str] = []
    waiting = iter(found)
    for word in waiting:
        sign = next((sign for sign in ("<>", ">>", "<", ">") if word.startswith(sign)), None)
        option, equals, number = word.partition("=")
        if sign is not None:
            path = word.removeprefix(sign) or next(waiting, "")
            if not path:
                raise BadInput(f"{sign} needs a file name")
            passed.append(Passed(os.path.expanduser(_unquoted(path)), _REDIRECTIONS[sign]))
        elif option == "--fd":
            number = number if equals else next(waiting, "")
            if not number.isdecimal() or len(number) > _DIGITS:
                raise BadInput("--fd needs the number of an open descriptor")
            passed.append(Passed(number=int(number)))
        else:
            rest.append(word)
    return passed, rest


def _put(arguments: dict[str, Any], name: str, value: Any) -> None:
    """Set an argument; ``a.b=value`` sets member b of the object a."""
    *parents, last = name.split(".")
    for parent in parents:
        arguments = arguments.setdefault(parent, {})
        if not isinstance(arguments, dict):
            raise BadInput(f"{parent!r} is given twice")
    if last in arguments:
        raise BadInput(f"{name!r} is given twice")
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
        raise BadInput(f"not JSON: {exc}") from None
