"""Tokens of QEMU's JSON dialect, over any split."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from splits import bytewise, fed, json_soup, pieces

from qmpfd.protocol.lexer import Lexer, Token

LIMIT = 1 << 20


def tokens(chunks: Iterator[bytes], limit: int = LIMIT) -> list[tuple[str, bytes]]:
    lexer = Lexer(limit)
    return [(token.name, text) for token, text, _ in fed(lexer.feed, chunks)]


CASES: list[tuple[bytes, list[tuple[str, bytes]]]] = [
    (b"", []),
    (b" \t\r\n", []),
    (b"{", [("LCURLY", b"{")]),
    (b"}", [("RCURLY", b"}")]),
    (b"[", [("LSQUARE", b"[")]),
    (b"]", [("RSQUARE", b"]")]),
    (b":,", [("COLON", b":"), ("COMMA", b",")]),
    (b'""', [("STRING", b'""')]),
    (b"''", [("STRING", b"''")]),
    (b'"it\'s"', [("STRING", b'"it\'s"')]),
    (b"'say \"x\"'", [("STRING", b"'say \"x\"'")]),
    (b'"\\""', [("STRING", b'"\\""')]),
    (b"'\\''", [("STRING", b"'\\''")]),
    (b'"\\\\"', [("STRING", b'"\\\\"')]),
    (b'"{}[]:, "', [("STRING", b'"{}[]:, "')]),
    (b'"\x7f\xc3\xa9\xfd"', [("STRING", b'"\x7f\xc3\xa9\xfd"')]),
    (b"0 ", [("INTEGER", b"0")]),
    (b"-0 ", [("INTEGER", b"-0")]),
    (b"120\n", [("INTEGER", b"120")]),
    (b"-9,", [("INTEGER", b"-9"), ("COMMA", b",")]),
    (b"1.25 ", [("FLOAT", b"1.25")]),
    (b"0.5 ", [("FLOAT", b"0.5")]),
    (b"1e5 ", [("FLOAT", b"1e5")]),
    (b"1E+5 ", [("FLOAT", b"1E+5")]),
    (b"1.5e-5 ", [("FLOAT", b"1.5e-5")]),
    (b"0e1 ", [("FLOAT", b"0e1")]),  # valid JSON, which QEMU refuses
    (b"1-", [("INTEGER", b"1")]),  # the sign begins an incomplete token
    (b"true ", [("KEYWORD", b"true")]),
    (b"nan}", [("KEYWORD", b"nan"), ("RCURLY", b"}")]),
    (b"true{", [("KEYWORD", b"true"), ("LCURLY", b"{")]),
    (b'1"a"', [("INTEGER", b"1"), ("STRING", b'"a"')]),
    # Lexical errors: the token up to the invalid byte; the bytes behind it are skipped.
    (b"@", [("ERROR", b"@")]),
    (b"@@@ xyz", [("ERROR", b"@")]),
    (b"@ junk\t{", [("ERROR", b"@"), ("LCURLY", b"{")]),
    (b"@ junk}", [("ERROR", b"@"), ("RCURLY", b"}")]),
    (b"@ junk\n1 ", [("ERROR", b"@"), ("INTEGER", b"1")]),
    (b"@ junk\t1 ,", [("ERROR", b"@"), ("COMMA", b",")]),
    (b"@ junk'\"\x1b", [("ERROR", b"@"), ("ERROR", b"\x1b")]),
    (b"@ \xfe", [("ERROR", b"@"), ("ERROR", b"\xfe")]),
    (b"@ \xff", [("ERROR", b"@"), ("ERROR", b"\xff")]),
    (b"01 ", [("ERROR", b"01")]),
    (b"-01 ", [("ERROR", b"-01")]),
    (b"+1 ", [("ERROR", b"+")]),
    (b".5 ", [("ERROR", b".")]),
    (b"1. ", [("ERROR", b"1. ")]),
    (b"1e ", [("ERROR", b"1e ")]),
    (b"1e+ ", [("ERROR", b"1e+ ")]),
    (b"- ", [("ERROR", b"- ")]),
    (b"NaN ", [("ERROR", b"N")]),
    (b"tRue ", [("KEYWORD", b"t"), ("ERROR", b"R")]),
    (b"// ", [("ERROR", b"/")]),
    (b"\xef\xbb\xbf{", [("ERROR", b"\xef"), ("LCURLY", b"{")]),
    (b'"a\nb"\n', [("ERROR", b'"a\n')]),
    (b'"a\tb"\n', [("ERROR", b'"a\t')]),
    (b'"a\0', [("ERROR", b'"a\0')]),
    (b'"a\xfe', [("ERROR", b'"a\xfe')]),
    (b"'a\xff", [("ERROR", b"'a\xff")]),
    (b'"\\\n', [("ERROR", b'"\\\n')]),
]


@pytest.mark.parametrize("data, expected", CASES)
def test_tokens(data: bytes, expected: list[tuple[str, bytes]]) -> None:
    assert tokens(iter([data])) == expected
    assert tokens(bytewise(data)) == expected
    # A control byte is an error in every state, unless it ends a token.
    last = tokens(iter([data + b"\x1b\x1b"]))[-1]
    assert last == ("ERROR", b"\x1b")


@given(json_soup, st.lists(st.integers(1, 60), max_size=8))
def test_any_split_gives_the_same_tokens(data: bytes, cuts: list[int]) -> None:
    assert tokens(pieces(data, cuts)) == tokens(iter([data])) == tokens(bytewise(data))


@given(json_soup, st.lists(st.integers(1, 60), max_size=8))
def test_tokens_are_the_bytes_in_their_order(data: bytes, cuts: list[int]) -> None:
    """Tokens are consecutive slices of the input, and their ends ascend."""
    lexer = Lexer(LIMIT)
    rest = data
    for chunk in pieces(data, cuts):
        before = 0
        for _, text, end in lexer.feed(chunk):
            assert before <= end <= len(chunk)
            before = end
            at = rest.find(text)
            assert at >= 0
            rest = rest[at + len(text) :]


@pytest.mark.parametrize(
    "data, ends",
    [(b"{1 }", [1, 2, 4]), (b'"a" ', [3]), (b"true}", [4, 5]), (b"@x,", [1, 3]), (b"  {", [3])],
)
def test_ends(data: bytes, ends: list[int]) -> None:
    assert [end for _, _, end in Lexer(LIMIT).feed(data)] == ends


@pytest.mark.parametrize(
    "begin, fill, end", [(b'"', b"x", b'"'), (b"", b"1", b" "), (b"", b"a", b" ")]
)
def test_a_token_past_the_limit_is_dropped(begin: bytes, fill: bytes, end: bytes) -> None:
    lexer = Lexer(100)
    found = []
    assert list(lexer.feed(begin)) == []
    for _ in range(50):
        found += [token for token, _, _ in lexer.feed(fill * 30)]
        assert lexer.buffered <= 100
    assert found
    assert set(found) == {Token.TOO_BIG}
    last = [token for token, _, _ in lexer.feed(end + b"\n{")]
    assert last[-1] is Token.LCURLY
    assert lexer.idle


@given(st.lists(st.binary(max_size=40), max_size=20))
def test_memory_is_bounded_whatever_comes(chunks: list[bytes]) -> None:
    lexer = Lexer(50)
    for chunk in chunks:
        for _ in lexer.feed(chunk):
            pass
        assert lexer.buffered <= 50


def test_idle() -> None:
    lexer = Lexer(LIMIT)
    assert lexer.idle
    for data, idle in [(b" ", True), (b'"a', False), (b'"', True), (b"@ ", False), (b"\n", True)]:
        list(lexer.feed(data))
        assert lexer.idle is idle, data
