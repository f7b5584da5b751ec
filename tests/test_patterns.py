"""Shell patterns, matched all at once, with the results of fnmatch for each."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpfd.patterns import Patterns

TEXT = st.text("ab*?[]!-\\\n\N{EURO SIGN}", max_size=6)


@given(st.lists(TEXT, max_size=5), st.lists(TEXT, min_size=1, max_size=5))
def test_as_fnmatch(patterns: list[str], texts: list[str]) -> None:
    made = Patterns(patterns)
    for text in texts * 2:  # the second time from the cache
        assert made.match(text) == any(fnmatchcase(text, pattern) for pattern in patterns)


@pytest.mark.parametrize("form", ["vm{}:*", "*:disk{}", "vm{}", "*x{}*", "v?{}:[ab]*", "*{}??-"])
def test_each_text_is_matched_once(form: str) -> None:
    """300 patterns and 15,000 texts: each text is matched once for any number of queries."""

    class Counting(Patterns):
        __slots__ = ("matched",)
        matched: int

        def _match(self, text: str) -> bool:
            self.matched += 1
            return super()._match(text)

    made = Counting(form.format(n) for n in range(300))
    made.matched = 0
    texts = [f"vm-{n}" for n in range(15_000)]
    for _ in range(3):
        assert not any(map(made.match, texts))
    assert made.matched == 15_000


class _Counting:
    """A regular expression that counts its matches."""

    def __init__(self, expression: Any) -> None:
        self._expression = expression
        self.tried = 0

    def match(self, text: str) -> object:
        self.tried += 1
        return self._expression.match(text)


@pytest.mark.parametrize(
    "form", ["vm*:disk{}", "*vm*-{}", "vm*-disk{}-*", "[v-z]*/disk{}/*", "v?*disk{}-?", "*k{}"]
)
def test_wildcards_inside(form: str) -> None:
    """Of 300 expressions, few or none are tried for a text."""
    made = Patterns(form.format(n) for n in range(300))
    counting = [_Counting(each) for each in (*made._ends.values(), made._others) if each]
    made._ends = dict(zip(made._ends, counting, strict=False))  # type: ignore[arg-type]
    made._others = made._others and counting[-1]  # type: ignore[assignment]
    for n in range(1000):
        made.match(f"vm{n}-disk{n}:b")
    assert sum(each.tried for each in counting) == 0
    made.match("vm1-disk17-x:disk17")
    assert sum(each.tried for each in counting) <= 1


def test_what_is_remembered_is_bounded() -> None:
    made = Patterns(["a*"])
    for n in range(300):
        assert made.match(f"a{n}" + "x" * 100_000)
    assert sum(map(len, made._results)) < 10 << 20
