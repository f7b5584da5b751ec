"""Matches texts against many shell patterns at once."""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import translate

_WILDCARD = re.compile(r"[*?\[]")

#: Maximum characters of the texts whose results are cached: as many as one user may store.
_MAX_CACHED = 8 << 20


class Patterns:
    """Set of shell patterns (fnmatch).

    Patterns of the form ``*text`` are tested by one str.endswith, and those of the form ``*text*``
    by one regular expression.  Results are cached, because the same texts are tested repeatedly.

    Args:
        patterns: the patterns.
    """

    __slots__ = ("_cached_size", "_others", "_results", "_substrings", "_suffixes")

    def __init__(self, patterns: Iterable[str]) -> None:
        suffixes: list[str] = []
        substrings: list[str] = []
        others: list[str] = []
        for pattern in patterns:
            rest = pattern.lstrip("*")
            literal = rest.rstrip("*")
            if rest == pattern or _WILDCARD.search(literal):
                others.append(translate(pattern))
            elif rest == literal:
                suffixes.append(literal)
            else:
                substrings.append(re.escape(literal))
        self._suffixes = tuple(suffixes)
        self._substrings = re.compile("|".join(substrings)) if substrings else None
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
        if text.endswith(self._suffixes):
            return True
        if self._substrings is not None and self._substrings.search(text):
            return True
        return self._others is not None and self._others.match(text) is not None
