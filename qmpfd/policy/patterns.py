"""Matches texts against many shell patterns at once."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from fnmatch import translate

#: The elements of a pattern (fnmatch): a star, a set of characters, or one character.
_ELEMENT = re.compile(r"\[!?+\]?+[^\]]*+\]|.", re.DOTALL)

#: Maximum characters of the texts whose results are cached: as many as one user may store.
_MAX_CACHED = 8 << 20


class Patterns:
    """Set of shell patterns (fnmatch).

    A pattern is tried only if the text contains one of its literals, the one that the fewest
    patterns have.  Results are cached, because the same texts are tested repeatedly.

    Args:
        patterns: the patterns.
    """

    __slots__ = ("_cached_size", "_patterns", "_results")

    def __init__(self, patterns: Iterable[str]) -> None:
        compiled = [_compile(_ELEMENT.findall(pattern)) for pattern in patterns]
        counts = Counter(literal for literals, _ in compiled for literal in literals)
        self._patterns = [
            (min(literals, key=lambda each: (counts[each], -len(each)), default=""), matches)
            for literals, matches in compiled
        ]
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
        return any(literal in text and matches(text) for literal, matches in self._patterns)


def _is_wildcard(element: str) -> bool:
    return element == "?" or len(element) > 1


def _compile(elements: list[str]) -> tuple[list[str], Callable[[str], bool]]:
    """Return the literals of a pattern, and a function that matches the pattern with a text.

    A text is searched for one piece after the other, each from the end of the one before.  So the
    time grows with the length of the text only: a regular expression takes 20 ns for each character
    at which a piece could begin.
    """
    literals = "".join("*" if _is_wildcard(each) else each for each in elements).split("*")
    pieces: list[list[str]] = [[]]
    for element in elements:
        if element == "*":
            pieces.append([])
        else:
            pieces[-1].append(element)
    first, *middle = map(_Piece, pieces)
    last = middle.pop() if middle else None

    def matches(text: str) -> bool:
        at, end = first.width, len(text) - (last.width if last else 0)
        if not first.stands_at(text, 0) or at > end:
            return False
        if last is None:
            return at == end
        if not last.stands_at(text, end):
            return False
        for piece in middle:
            at = piece.find(text, at)
            if at < 0:
                return False
            at += piece.width
        return at <= end

    return list(filter(None, literals)), matches


class _Piece:
    """A part of a pattern without a star: each of its elements stands for one character.

    Args:
        elements: its elements.
    """

    def __init__(self, elements: list[str]) -> None:
        self._text = "".join(elements)
        #: Number of characters.
        self.width = len(elements)
        self._expression = (
            re.compile(translate(self._text + "*")) if any(map(_is_wildcard, elements)) else None
        )

    def stands_at(self, text: str, at: int) -> bool:
        """Whether the piece stands in *text* at the position *at*."""
        if self._expression is None:
            return text.startswith(self._text, at)
        return self._expression.match(text, at) is not None

    def find(self, text: str, start: int) -> int:
        """Return its first position in *text* from *start* on, or -1."""
        if self._expression is None:
            return text.find(self._text, start)
        found = self._expression.search(text, start)
        return -1 if found is None else found.start()
