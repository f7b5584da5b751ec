"""JSON encoder with QEMU's format: one line, ", " and ": " as separators, ASCII only."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from operator import attrgetter
from typing import Any, TypeAlias

import msgspec

_encode, _format = msgspec.json.Encoder().encode, msgspec.json.format


# An escape sequence as msgspec writes it; that of a backslash matches too, and stays unchanged.
_ESCAPE = re.compile(rb"\\(?:u00([0-9a-f]{2})|.)")


def _upper_case(escape: re.Match[bytes]) -> bytes:
    """Return the escape sequence with upper-case hexadecimal digits, as QEMU writes them."""
    return b"\\u00" + escape[1].upper() if escape[1] else escape[0]


class _Escapes(dict[int, int | str]):
    """Table for str.translate: the escape sequence of each character that needs one.

    Entries are made on demand.  A mebibyte of text takes 40 ms, a sixth of a regular expression's
    time.
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
    """A result that is already encoded."""


class JSONStream:
    """A result that is encoded in steps, while it is sent, because its text may be long.

    Args:
        value: the result; None if a subclass produces the text in :attr:`bits`.
    """

    #: The text that a subclass produces; each step of the iteration encodes a part of it.
    bits: Iterator[bytes]

    def __init__(self, value: Any = None) -> None:
        self.value = value


#: JSON text of a struct of integers as a format for ``%``, and a getter of these integers.
_Template: TypeAlias = tuple[bytes, Callable[[object], object]]


class _Templates(dict[type, _Template | None]):
    """Templates of the structs that have integers only, by type; None for all other types.

    The reply to ``add-fd`` takes half the time of msgspec's encoder and formatter.
    """

    def __missing__(self, kind: type) -> _Template | None:
        self[kind] = None
        if issubclass(kind, msgspec.Struct) and (fields := msgspec.structs.fields(kind)):
            kinds = {type(msgspec.inspect.type_info(field.type)) for field in fields}
            if kinds == {msgspec.inspect.IntType}:
                members = ", ".join(f'"{field.encode_name}": %d' for field in fields)
                get_numbers = attrgetter(*(field.name for field in fields))
                self[kind] = f"{{{members}}}".encode(), get_numbers
        return self[kind]


templates = _Templates()


def encode(value: object) -> bytes:
    """Encode *value*, built of JSON's types and msgspec structs, as JSON."""
    if type(value) is RawJSON:
        return value
    template = templates[type(value)]
    if template is not None:
        return template[0] % template[1](value)
    data = _format(_encode(value), indent=0)
    if b"\\u00" in data:
        data = _ESCAPE.sub(_upper_case, data)
    if data.isascii() and b"\x7f" not in data:
        return data
    return data.decode().translate(_Escapes()).encode("ascii")


class _Verbatim(str):
    """A piece of text that is already JSON."""

    __slots__ = ()


def encode_any(value: Any) -> bytes:
    """Encode a value that a client has sent, of any depth; see :func:`iter_encode`."""
    kind = type(value)
    if kind is not dict and kind is not list and kind is not float:
        return encode(value)
    return b"".join(iter_encode(value))


#: Number of pieces of text that one step of :func:`iter_encode` joins, and of characters in the
#: longest piece: a step takes 0.2 ms.
_PIECES = 256
LONG_TEXT = 4096


def iter_encode(value: Any) -> Iterator[bytes]:
    """Encode a value that a client has sent, in steps: of any depth and size, with any floats.

    A float out of range is written as ``1e999``: a JSON number out of range, as the client's was.
    (QEMU writes ``inf``, which no JSON parser accepts.)
    """
    out: list[str] = []
    todo = [_steps(value)]  # a stack instead of recursion: values nest deeper than Python allows
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
            return f"{item:.17g}"  # QEMU's format: no digit is lost, and 1.0 is written as 1
        return "1e999" if item > 0 else "-1e999"
    return encode(item).decode("ascii")


def _steps(value: Any) -> Iterator[Any]:
    """Yield the members of *value* and the text between them, in order."""
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
