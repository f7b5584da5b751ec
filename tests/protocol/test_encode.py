"""Encoding: one line of ASCII, as QEMU writes it."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import UNSET, Struct, UnsetType

from qmpfd.protocol.encode import encode, encode_any


class Info(Struct, rename="kebab"):
    fdset_id: int
    opaque: str | UnsetType = UNSET


class Numbers(Struct, rename="kebab"):
    fdset_id: int
    fd: int


class Nothing(Struct):
    pass


@pytest.mark.parametrize(
    "value, expected",
    [
        ({}, b"{}"),
        ([], b"[]"),
        ({"a": 1, "b": [1, 2, {}]}, b'{"a": 1, "b": [1, 2, {}]}'),
        (None, b"null"),
        ([True, False], b"[true, false]"),
        (-(2**63), b"-9223372036854775808"),
        (2**64 - 1, b"18446744073709551615"),
        ("\b\f\n\r\t\"\\/'", b'"\\b\\f\\n\\r\\t\\"\\\\/\'"'),
        ("é", b'"\\u00E9"'),
        ("\x1b\x7f\x80", b'"\\u001B\\u007F\\u0080"'),  # recorded: add-fd/opaque-control
        ("\x7f", b'"\\u007F"'),
        ("\\u001b\\\x1f", b'"\\\\u001b\\\\\\u001F"'),
        ("\u2028", b'"\\u2028"'),
        ("\uabcd", b'"\\uABCD"'),
        ("\U0001f600", b'"\\uD83D\\uDE00"'),
        ({"é": "a, b: c"}, b'{"\\u00E9": "a, b: c"}'),
        (Info(3), b'{"fdset-id": 3}'),
        ([Info(3, "x")], b'[{"fdset-id": 3, "opaque": "x"}]'),
        (Numbers(0, -1), b'{"fdset-id": 0, "fd": -1}'),
        (Numbers(2**63 - 1, -(2**63)), b'{"fdset-id": %d, "fd": %d}' % (2**63 - 1, -(2**63))),
        ([Numbers(3, 4)], b'[{"fdset-id": 3, "fd": 4}]'),
        (Nothing(), b"{}"),
    ],
)
def test_encode(value: object, expected: bytes) -> None:
    assert encode(value) == expected


@pytest.mark.parametrize("character", ["\x00", "\x01", "\x1f"])
def test_control_characters(character: str) -> None:
    assert encode(character).upper() == b'"\\U%04X"' % ord(character)


texts = st.text(st.characters(codec="utf-8"))
plain = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | texts
values = st.recursive(
    plain | st.floats(allow_nan=False),
    lambda inner: st.lists(inner) | st.dictionaries(texts, inner),
    max_leaves=20,
)
finite = st.recursive(
    plain, lambda inner: st.lists(inner) | st.dictionaries(texts, inner), max_leaves=20
)


@given(finite)
def test_encode_is_one_line_of_ascii_that_reads_back(value: Any) -> None:
    data = encode(value)
    assert data.isascii()
    assert not any(byte < 0x20 for byte in data)
    assert json.loads(data) == value


@given(finite)
def test_encode_any_is_encode(value: Any) -> None:
    assert encode_any(value) == encode(value)


@given(values)
def test_encode_any_reads_back(value: Any) -> None:
    """Infinite numbers are encoded as 1e999, which is valid JSON and decodes as infinity."""
    data = encode_any(value)
    assert data.isascii()
    assert not any(byte < 0x20 for byte in data)
    assert json.loads(data, parse_constant=pytest.fail) == value


def test_encode_any_of_what_is_not_finite() -> None:
    assert encode_any([math.inf, -math.inf]) == b"[1e999, -1e999]"


@pytest.mark.parametrize("depth", [1024, 100_000])
def test_encode_any_is_not_recursive(depth: int) -> None:
    value: Any = "x"
    for level in range(depth):
        value = [value, 1] if level % 2 else {"a": value}
    data = encode_any(value)
    assert data.count(b"[") + data.count(b"{") == depth
    while isinstance(value, list | dict):  # Python's own clean-up is recursive too
        value = value.pop("a") if isinstance(value, dict) else value.pop(0)
