"""The input of ``qmpfd shell``: JSON, or a short form of it.

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

#: No descriptor's number has more.
_DIGITS = 9

_PAIRS = {"{": "}", "[": "]"}


class BadInput(Exception):
    """The input is no command."""


class Passed(NamedTuple):
    """A descriptor to pass: a file to open in some way, or a number."""

    path: str = ""
    flags: int = 0
    number: int = -1


class Typed(NamedTuple):
    """A command as it was typed; *id* is the member of the reply that repeats its id."""

    command: str
    arguments: dict[str, Any]
    passed: list[Passed]
    id: dict[str, Any]


class Scanner:
    """Cuts text at blanks, but for those in quotes, brackets or braces; all of these are kept."""

    def __init__(self) -> None:
        self._words: list[str] = []
        self._word: list[str] = []
        self._ends: list[str] = []  # the brackets, braces and the quote that are waited for
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
        """The words; nothing is fed any more."""
        self._end_word()
        return self._words


def unfinished(text: str) -> bool:
    """Whether another line is to follow, see :class:`Scanner`."""
    scanner = Scanner()
    scanner.feed(text)
    return scanner.unfinished


def parse(text: str, convert: Callable[[str, str, str], Any]) -> Typed:
    """The command that *text* is.

    Args:
        text: what was typed; not blank.
        convert: given a command, the name of an argument and its value as text, that value.

    Raises:
        BadInput: it is no command; the text says why.
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
    """Refuse what Python's JSON has and QMP's has not: a server's parser would lose its place."""
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
    """Enter ``a.b=value`` as the member b of the object a."""
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
