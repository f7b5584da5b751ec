"""Matches texts against many shell patterns at once."""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import translate

_WILDCARD = re.compile(r"[*?\[]")

#: Maximum characters of the texts whose results are cached: as many as one user may store.
_REMEMBERED = 8 << 20


class Patterns:
    """Set of shell patterns (fnmatch).

    Patterns of the form ``*text`` are tested by one str.endswith, and those of the form ``*text*``
    by one regular expression.  Results are cached, because the same texts are tested repeatedly.

    Args:
        patterns: the patterns.
    """

    __slots__ = ("_others", "_remembered", "_substrings", "_suffixes", "_verdicts")

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
        self._verdicts: dict[str, bool] = {}
        self._remembered = 0

    def match(self, text: str) -> bool:
        """Whether one of the patterns matches the whole of *text*."""
        verdict = self._verdicts.get(text)
        if verdict is None:
            verdict = self._match(text)
            if self._remembered > _REMEMBERED:
                self._verdicts.clear()
                self._remembered = 0
            self._verdicts[text] = verdict
            self._remembered += len(text) + 1
        return verdict

    def _match(self, text: str) -> bool:
        if text.endswith(self._suffixes):
            return True
        if self._substrings is not None and self._substrings.search(text):
            return True
        return self._others is not None and self._others.match(text) is not None
