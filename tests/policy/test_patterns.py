"""Shell patterns, matched all at once, with the results of fnmatch for each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from fnmatch import fnmatchcase
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

import qmpfd.policy.patterns
from qmpfd.policy.patterns import Patterns

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


@pytest.mark.parametrize(
    "form",
    ["vm*:disk{}", "*vm*-{}", "vm*-disk{}-*", "[v-z]*/disk{}/*", "v?*disk{}-?", "*k{}", "vm*k*{}x"],
)
def test_wildcards_inside(form: str) -> None:
    """Of 300 patterns, few or none are tried for a text."""
    made = Patterns(form.format(n) for n in range(300))
    tried: list[str] = []

    def count(matches: Callable[[str], bool], text: str) -> bool:
        tried.append(text)
        return matches(text)

    made._patterns = [(literal, partial(count, matches)) for literal, matches in made._patterns]
    texts = [f"vm{n}-disk{n}:b" for n in range(1000)]
    for text in texts:
        made.match(text)
    assert max(Counter(tried).values(), default=0) <= 3


@pytest.mark.parametrize("pattern", ["vm:*:disk1:*:ro", "vm*1*.img*", "*", "[", "vm1"])
def test_literals_are_searched_without_a_regular_expression(
    pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A regular expression takes 20 ns for each character at which a piece may begin: a second for
    100 patterns and one long text.
    """

    def no_expression(_: str) -> str:
        raise AssertionError

    monkeypatch.setattr(qmpfd.policy.patterns, "translate", no_expression)
    assert not Patterns([pattern]).match("") or pattern == "*"


def test_what_is_remembered_is_bounded() -> None:
    made = Patterns(["a*"])
    for n in range(300):
        assert made.match(f"a{n}" + "x" * 100_000)
    assert sum(map(len, made._results)) < 10 << 20
