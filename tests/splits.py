"""Split inputs into chunks: byte by byte, or at random."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import TypeVar

from hypothesis import strategies as st

T = TypeVar("T")

_SPECIALS = rb"""{ } [ ] : , " ' \ \u \ud800 \n 0 - 1.5 e E+2 12 true null nan "a" 'b' "a":1"""
_BLANK_OR_BAD = [
    b" ",
    b"\t",
    b"\r\n",
    b"\0",
    b"\x1b",
    b"\xff",
    b"\xc3\xa9",
    b"\xc0\x80",
    b"\xed\xa0",
]
#: Random bytes in which tokens of JSON, blanks and invalid bytes are frequent.
json_soup = st.lists(
    st.sampled_from([*_SPECIALS.split(), *_BLANK_OR_BAD]) | st.binary(min_size=1, max_size=3),
    max_size=30,
).map(b"".join)


def pieces(data: bytes, cuts: Sequence[int]) -> Iterator[bytes]:
    """Yield *data* in pieces, cut at the offsets *cuts*."""
    edges = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    for begin, end in pairwise(edges):
        yield data[begin:end]


def bytewise(data: bytes) -> Iterator[bytes]:
    """Yield *data* byte by byte."""
    for at in range(len(data)):
        yield data[at : at + 1]


def fed(feed: Callable[[bytes], Iterator[T]], chunks: Iterator[bytes]) -> list[T]:
    """Return all items that *feed* yields for *chunks*, in order."""
    return [item for chunk in chunks for item in feed(chunk)]
