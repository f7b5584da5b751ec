"""The contents of strings, by QEMU's rules."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from qmpfd.errors import GenericError
from qmpfd.protocol.strings import unquote


def refused(token: bytes) -> str:
    with pytest.raises(GenericError) as caught:
        unquote(token)
    return str(caught.value).removeprefix("JSON parse error, ")


@pytest.mark.parametrize(
    "token, text",
    [
        (b'""', ""),
        (b"''", ""),
        (b'"a\'b"', "a'b"),
        (b"'a\"b'", 'a"b'),
        (rb'"\"\'\\\/\b\f\n\r\t"', "\"'\\/\b\f\n\r\t"),
        (b'"\x7f"', "\x7f"),
        (rb'"\u0000"', "\0"),
        (b'"\xc0\x80"', "\0"),
        (b'"a\xc0\x80\\n\xc0\x80"', "a\0\n\0"),
        (rb'"\u00e9\u00E9"', "éé"),
        (b'"\xc3\xa9"', "é"),
        (rb'"\ufffd"', "\ufffd"),
        (b'"\xef\xbf\xbd"', "\ufffd"),
        (rb'"\ud83d\ude00"', "\U0001f600"),
        (rb'"\uD83D\uDE00"', "\U0001f600"),
        (rb'"\uDBFF\uDFFD"', "\U0010fffd"),
        (b'"\xf4\x8f\xbf\xbd"', "\U0010fffd"),
        (rb'"\\u0041"', "\\u0041"),
        (rb'"\\\u0041"', "\\A"),
        (rb'"\u00410"', "A0"),
        (b'"\\u0041\xc3\xa9\\u0042"', "AéB"),
    ],
)
def test_text(token: bytes, text: str) -> None:
    assert unquote(token) == text


@pytest.mark.parametrize("escape", [b"x", b"a", b"v", b"0", b"U0041", b"\xc3\xa9", b" ", b"N"])
def test_unknown_escapes(escape: bytes) -> None:
    assert refused(b'"\\' + escape + b'"') == "invalid escape sequence in string"


@pytest.mark.parametrize(
    "escape",
    [
        r"\ud800",
        r"\udc00",
        r"\udfff",
        r"\ufdd0",
        r"\ufdef",
        r"\ufffe",
        r"\uffff",
        r"\uD83F\uDFFE",
        r"\uDBFF\uDFFF",
        r"\u12",
        r"\u",
        r"\u12g4",
        r"\u-123",
        r"\u 123",
    ],
)
def test_no_characters(escape: str) -> None:
    shown = f"{escape} is not a valid Unicode character"
    assert refused(b'"' + escape.encode() + b'"') == shown
    assert refused(b'"abc' + escape.encode() + b'"') == shown


@pytest.mark.parametrize(
    "pair", [rb"\ud800A", rb"\ud800\n", rb"\ud800\u0041", rb"\ud800\ud800", rb"\udc00\ud800"]
)
def test_lone_surrogates(pair: bytes) -> None:
    assert re.fullmatch(r"\\ud[8c]00.* is not a valid Unicode character", refused(b'"%s"' % pair))


@pytest.mark.parametrize(
    "raw",
    [
        b"\x80",  # a lone continuation
        b"\xbf",
        b"\xc3",  # truncated
        b"\xe2\x82",
        b"\xf0\x9f\x98",
        b"\xc3A",
        b"\xc0\xaf",  # overlong
        b"\xc1\xbf",
        b"\xe0\x80\xaf",
        b"\xf0\x80\x80\xaf",
        b"\xc0\x81",
        b"\xed\xa0\x80",  # surrogates
        b"\xed\xbf\xbf",
        b"\xf4\x90\x80\x80",  # past U+10FFFF
        b"\xf8\x88\x80\x80\x80",  # of five and six bytes
        b"\xfc\x84\x80\x80\x80\x80",
        b"\xef\xb7\x90",  # noncharacters
        b"\xef\xb7\xaf",
        b"\xef\xbf\xbe",
        b"\xef\xbf\xbf",
        b"\xf0\x9f\xbf\xbe",
        b"\xf4\x8f\xbf\xbf",
    ],
)
def test_bad_utf8(raw: bytes) -> None:
    expected = "invalid UTF-8 sequence in string"
    assert refused(b'"%s"' % raw) == expected
    assert refused(b'"ok%s\\n"' % raw) == expected
    assert refused(b'"\\n%s"' % raw) == expected


def noncharacter(text: str) -> bool:
    return any(0xFDD0 <= ord(c) <= 0xFDEF or ord(c) & 0xFFFE == 0xFFFE for c in text)


@given(st.text(st.characters(codec="utf-8")))
@example("\ufffe")
@example("\U0001ffff")
@example("\ufdcf\ufdf0\ufffd")
def test_every_text_raw_and_escaped(text: str) -> None:
    for ascii_only in (True, False):
        token = json.dumps(text, ensure_ascii=ascii_only).encode()
        if noncharacter(text):
            refused(token)
        else:
            assert unquote(token) == text


@given(st.binary().filter(lambda raw: b"\\" not in raw))
@example(b"\xc0\x80")
@example(b"\xe0\xc0\x80")
def test_raw_bytes_as_python_reads_them(raw: bytes) -> None:
    try:
        expected = raw.replace(b"\xc0\x80", b"\0").decode("utf-8")
    except UnicodeDecodeError:
        assert refused(b'"%s"' % raw) == "invalid UTF-8 sequence in string"
        return
    if noncharacter(expected):
        refused(b'"%s"' % raw)
    else:
        assert unquote(b'"%s"' % raw) == expected


@given(st.lists(st.sampled_from([b"\\", b"u", b"0", b"d", b"8", b"D", b"c", b"n", b"\xe9", b"{"])))
def test_any_escapes_give_text_or_its_error(parts: list[bytes]) -> None:
    body = b"".join(parts)
    if (len(body) - len(body.rstrip(b"\\"))) % 2:
        body += b"\\"  # the lexer yields no token with an incomplete escape
    try:
        text = unquote(b'"%s"' % body)
    except GenericError:
        # What qmpfd refuses, Python refuses too, except for half a surrogate pair.
        try:
            assert re.search("[\ud800-\udfff]", json.loads(b'"%s"' % body))
        except ValueError:
            return
    else:
        assert json.loads(b'"%s"' % body) == text
