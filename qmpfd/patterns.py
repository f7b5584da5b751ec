"""Matches texts against many shell patterns at once."""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import translate

#: A set of characters; and all else that is no literal text, a bracket that begins no set included.
_SET, _SPECIAL = re.compile(r"\[!?\]?[^\]]*\]"), re.compile(r"[*?\[\]]")

#: Maximum characters of the texts whose results are cached: as many as one user may store.
_MAX_CACHED = 8 << 20


class Patterns:
    """Set of shell patterns (fnmatch).

    A regular expression of some hundred alternatives with wildcards inside takes a quarter of a
    millisecond for each text.  So the patterns that end with literal text are found by it, those of
    the form ``*text*`` are one expression of literals, and all others are tried only if the text
    contains the longest literal of one of them.  Results are cached, because the same texts are
    tested repeatedly.

    Args:
        patterns: the patterns.
    """

    __slots__ = (
        "_cached_size",
        "_ends",
        "_lengths",
        "_needed",
        "_others",
        "_results",
        "_substrings",
    )

    def __init__(self, patterns: Iterable[str]) -> None:
        ends: dict[str, list[str]] = {}
        substrings: list[str] = []
        needed: list[str] = []
        others: list[str] = []
        for pattern in patterns:
            pieces = _SPECIAL.split(_SET.sub("*", pattern))
            literal, end = max(pieces, key=len), pieces[-1]
            if end:
                ends.setdefault(end, []).append(translate(pattern))
            elif pattern[:1] == "*" and pattern.strip("*") == literal:
                substrings.append(re.escape(literal))
            else:
                needed.append(re.escape(literal))
                others.append(translate(pattern))
        self._ends = {end: re.compile("|".join(each)) for end, each in ends.items()}
        self._lengths = sorted(set(map(len, ends)))
        self._substrings = re.compile("|".join(substrings)) if substrings else None
        self._needed = re.compile("|".join(needed))
        self._others = re.compile("|".join(others)) if others else None
        self._results: dict[str, bool] = {}
        self._cached_size = 0

    def match(self, text: str) -> bool:
        """Whether one of the patterns matches the whole of *text*."""
        result = self._results.get(text)
        if result is None:
            result = self._match(text)
            if self._cached_size > _MAX_CACHED:
                self._results.clear()
                self._cached_size = 0
            self._results[text] = result
            self._cached_size += len(text) + 1
        return result

    def _match(self, text: str) -> bool:
        for length in self._lengths:
            expression = self._ends.get(text[-length:])
            if expression is not None and expression.match(text):
                return True
        if self._substrings is not None and self._substrings.search(text):
            return True
        if self._others is None or not self._needed.search(text):
            return False
        return self._others.match(text) is not None
