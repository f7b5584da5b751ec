"""JSON as QEMU writes it: one line, ", " and ": " between things, ASCII only."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from operator import attrgetter
from typing import Any, TypeAlias, cast

import msgspec


def _in_one_go(value: object) -> msgspec.Raw:
    if isinstance(value, JSONStream):
        return msgspec.Raw(b"".join(value.bits))
    raise TypeError(f"no JSON: {value!r}")


_encode, _format = msgspec.json.Encoder(enc_hook=_in_one_go).encode, msgspec.json.format


# An escape as msgspec writes it, a backslash's own included.
_ESCAPE = re.compile(rb"\\(?:u00([0-9a-f]{2})|.)")


def _capital(escape: re.Match[bytes]) -> bytes:
    """The escape with its digits as QEMU writes them."""
    return b"\\u00" + escape[1].upper() if escape[1] else escape[0]


class _Escapes(dict[int, int | str]):
    """What stands for a character, as str.translate asks for it: a mebibyte takes 40 ms so, and
    six times that with a regular expression.
    """

    def __missing__(self, code: int) -> int | str:
        if code < 0x7F:
            escape: int | str = code
        elif code < 0x10000:
            escape = f"\\u{code:04X}"
        else:
            high, low = 0xD7C0 + (code >> 10), 0xDC00 | code & 0x3FF
            escape = f"\\u{high:04X}\\u{low:04X}"
        self[code] = escape
        return escape


class RawJSON(bytes):
    """A result that is JSON already."""


class JSONStream:
    """A result that is made bit by bit, because it may be long.

    Args:
        value: the result, built of JSON's types; a subclass may make the text in another way.
    """

    def __init__(self, value: Any) -> None:
        self.value = value
        #: Its JSON; each step of the iteration makes some more.
        self.bits = iter_encode(value)


#: What stands around the numbers of a struct, and what takes these out of it.
_Template: TypeAlias = tuple[bytes, Callable[[object], object]]


class _Templates(dict[type, _Template | None]):
    """For structs of numbers only, by their type: written like that, the reply to ``add-fd`` costs
    half as much.
    """

    def __missing__(self, kind: type) -> _Template | None:
        self[kind] = None
        if issubclass(kind, msgspec.Struct) and (fields := msgspec.structs.fields(kind)):
            kinds = {type(msgspec.inspect.type_info(field.type)) for field in fields}
            if kinds == {msgspec.inspect.IntType}:
                members = ", ".join(f'"{field.encode_name}": %d' for field in fields)
                take_out = attrgetter(*(field.name for field in fields))
                self[kind] = f"{{{members}}}".encode(), take_out
        return self[kind]


_templates = _Templates()


def encode(value: object) -> bytes:
    """*value*, built of JSON's types and msgspec structs, as JSON."""
    kind = type(value)
    if kind is RawJSON:
        return cast("RawJSON", value)
    template = _templates[kind]
    if template is not None:
        return template[0] % template[1](value)
    data = _format(_encode(value), indent=0)
    if b"\\u00" in data:
        data = _ESCAPE.sub(_capital, data)
    if data.isascii() and b"\x7f" not in data:
        return data
    return data.decode().translate(_Escapes()).encode("ascii")


class _Verbatim(str):
    """Text that goes out as it is."""

    __slots__ = ()


def encode_any(value: Any) -> bytes:
    """As :func:`encode`, for a value that came from outside; see :func:`iter_encode`."""
    kind = type(value)
    if kind is not dict and kind is not list and kind is not float:
        return encode(value)
    return b"".join(iter_encode(value))


#: Pieces of text that make a bit of an encoded value, and characters of one: 0.2 ms of work.
_PIECES = 256
LONG_TEXT = 4096


def iter_encode(value: Any) -> Iterator[bytes]:
    """As :func:`encode`, for a value that came from outside: nested to any depth, of any size, and
    with floats that are out of range.

    Those are written as ``1e999``: still a JSON number, and the one that was asked for.  (QEMU
    answers ``inf``, which no JSON parser takes.)
    """
    out: list[str] = []
    todo = [_steps(value)]  # a stack, not recursion: values nest deeper than Python likes
    while todo:
        for item in todo[-1]:
            if isinstance(item, _Verbatim):
                out.append(item)
            elif isinstance(item, dict | list) or (isinstance(item, str) and len(item) > LONG_TEXT):
                todo.append(_steps(item))
                break
            else:
                out.append(_scalar(item))
            if len(out) >= _PIECES or len(out[-1]) >= LONG_TEXT:
                yield "".join(out).encode("ascii")
                out.clear()
        else:
            todo.pop()
    yield "".join(out).encode("ascii")


def _scalar(item: Any) -> str:
    if isinstance(item, float):
        if math.isfinite(item):
            return f"{item:.17g}"  # as QEMU writes it: exact, and 1 for 1.0
        return "1e999" if item > 0 else "-1e999"
    return encode(item).decode("ascii")


def _steps(value: Any) -> Iterator[Any]:
    """What *value* is made of, in order: its values, and the text between them."""
    if isinstance(value, dict):
        separator = "{"
        for key, item in value.items():
            yield _Verbatim(separator)
            yield key
            yield _Verbatim(": ")
            yield item
            separator = ", "
        yield _Verbatim("}" if value else "{}")
    elif isinstance(value, list):
        separator = "["
        for item in value:
            yield _Verbatim(separator)
            yield item
            separator = ", "
        yield _Verbatim("]" if value else "[]")
    elif isinstance(value, str) and len(value) > LONG_TEXT:
        yield _Verbatim('"')
        for start in range(0, len(value), LONG_TEXT):
            part = encode(value[start : start + LONG_TEXT])[1:-1]
            yield _Verbatim(part.decode("ascii"))
        yield _Verbatim('"')
    else:
        yield value
