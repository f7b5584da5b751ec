"""The fuzz target without a fuzzer: the corpus, and random input."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from fuzz.target import check

CORPUS = sorted((Path(__file__).parents[1] / "fuzz" / "corpus").iterdir())

WORDS = [
    b'{"execute":"add-fd"}',
    b'{"execute":"add-fds","arguments":{"lifetime":"connection"},"id":7}',
    b'{"execute":"getfd","arguments":{"fdname":"a"}}\r\n',
    b'{"execute":"query-name","id":{"a":[1,"\\u20ac"]}}\n',
    b"{'execute': 'remove-fd', 'arguments': {'fdset-id': -1}}",
    b'{"exec-oob":"add-fd"}',
    b'{"execute":"add-fd","execute":1}',
    *(b" ", b"\n", b"{", b"}", b"[", b"]", b",", b":", b'"', b"'", b"\\", b"\xff", b"\x1b"),
    *(b"1e999", b"-1", b"null", b"nope", b"\xe2\x82\xac", b"\0"),
]


def test_there_is_a_corpus() -> None:
    assert len(CORPUS) > 20


@pytest.mark.parametrize("path", CORPUS, ids=[path.name for path in CORPUS])
def test_the_corpus(path: Path) -> None:
    check(path.read_bytes())


@pytest.mark.parametrize("seed", range(100))
def test_chance(seed: int) -> None:
    dice = random.Random(seed)
    words = b"".join(dice.choice(WORDS) for _ in range(dice.randrange(40)))
    check(dice.randbytes(2) + words)
