"""Shell patterns, many at once."""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import translate

_WILDCARD = re.compile(r"[*?\[]")

#: Characters of the texts whose verdicts are remembered: all that one user may store.
_REMEMBERED = 8 << 20


class Patterns:
    """Shell patterns (fnmatch), tried all at once.

    A pattern is looked at only where the text begins, or ends, as it does; others that begin with
    a star are looked for together.  A verdict is remembered: the same texts are asked for again and
    again.

    Args:
        patterns: the patterns.
    """

    __slots__ = (
        "_anywhere",
        "_by_prefix",
        "_lengths",
        "_remembered",
        "_substrings",
        "_suffixes",
        "_verdicts",
    )

    def __init__(self, patterns: Iterable[str]) -> None:
        suffixes: list[str] = []
        substrings: list[str] = []
        anywhere: list[str] = []
        rests: dict[str, list[str]] = {}
        for pattern in patterns:
            prefix = _WILDCARD.split(pattern, maxsplit=1)[0]
            rest = pattern[len(prefix) :]
            if prefix or not rest.startswith("*"):
                rests.setdefault(prefix, []).append(rest)
                continue
            rest = rest.lstrip("*")
            if not _WILDCARD.search(rest):
                suffixes.append(rest)
            elif not _WILDCARD.search(literal := rest.rstrip("*")):
                substrings.append(re.escape(literal))
            else:
                anywhere.append(rest)
        self._suffixes = tuple(suffixes)
        self._substrings = re.compile("|".join(substrings)) if substrings else None
        self._anywhere = re.compile(f"(?s:.*)(?:{_any_of(anywhere)})") if anywhere else None
        self._by_prefix = {prefix: re.compile(_any_of(each)) for prefix, each in rests.items()}
        self._lengths = sorted({len(prefix) for prefix in rests})
        self._verdicts: dict[str, bool] = {}
        self._remembered = 0

    def match(self, text: str) -> bool:
        """Whether one of them matches the whole of *text*."""
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
        if self._anywhere is not None and self._anywhere.match(text):
            return True
        for length in self._lengths:
            rest = self._by_prefix.get(text[:length])
            if rest is not None and rest.match(text, length):
                return True
        return False


def _any_of(patterns: list[str]) -> str:
    """The regular expression that one of them matches."""
    return "|".join(map(translate, patterns))
