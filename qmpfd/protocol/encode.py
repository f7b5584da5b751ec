"""JSON as QEMU writes it: one line, ", " and ": " between things, ASCII only."""

from __future__ import annotations

import math
import re
from typing import Any

import msgspec

_encode, _format = msgspec.json.Encoder().encode, msgspec.json.format
_NOT_ASCII = re.compile("[^\x00-\x7f]")


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    if code < 0x10000:
        return f"\\u{code:04X}"
    code -= 0x10000
    return f"\\u{0xD800 | code >> 10:04X}\\u{0xDC00 | code & 0x3FF:04X}"


class Encoded(bytes):
    """A result that is JSON already."""


def encode(value: object) -> bytes:
    """*value*, built of JSON's types and msgspec structs, as JSON."""
    if type(value) is Encoded:
        return value
    data = _format(_encode(value), indent=0)
    return data if data.isascii() else _NOT_ASCII.sub(_escape, data.decode()).encode("ascii")


class _Verbatim(str):
    """Text that goes out as it is."""


def encode_any(value: Any) -> bytes:
    """As :func:`encode`, for a value that came from outside: nested to any depth, and with floats
    that are out of range.

    Those are written as ``1e999``: still a JSON number, and the one that was asked for.  (QEMU
    answers ``inf``, which no JSON parser takes.)
    """
    kind = type(value)
    if kind is not dict and kind is not list and kind is not float:
        return encode(value)
    out: list[str] = []
    todo: list[Any] = [value]  # a stack, not recursion: values nest deeper than Python likes
    while todo:
        item = todo.pop()
        if isinstance(item, _Verbatim):
            out.append(item)
        elif isinstance(item, dict):
            todo.append(_Verbatim("}"))
            pairs = [(_Verbatim(encode(key).decode("ascii") + ": "), v) for key, v in item.items()]
            for number in range(len(pairs) - 1, -1, -1):
                key, v = pairs[number]
                todo += (v, key) if number == 0 else (v, key, _Verbatim(", "))
            todo.append(_Verbatim("{"))
        elif isinstance(item, list):
            todo.append(_Verbatim("]"))
            for number in range(len(item) - 1, -1, -1):
                todo += (item[number],) if number == 0 else (item[number], _Verbatim(", "))
            todo.append(_Verbatim("["))
        elif isinstance(item, float):
            if math.isfinite(item):
                out.append(f"{item:.17g}")  # as QEMU writes it: exact, and 1 for 1.0
            else:
                out.append("1e999" if item > 0 else "-1e999")
        else:
            out.append(encode(item).decode("ascii"))
    return "".join(out).encode("ascii")
