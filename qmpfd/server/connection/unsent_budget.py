"""Replies that their clients have not taken yet: how much of that there is in all."""

from __future__ import annotations

from collections.abc import Callable

from ...limits import MAX_UNSENT_BYTES


class UnsentBudget:
    """What waits to be sent, of all connections together.

    Each can wait for a long listing.  When it is too much in all, the one that has waited for its
    client the longest is cut off: who reads at all is done in no time.
    """

    def __init__(self) -> None:
        self._waiting: dict[object, tuple[int, Callable[[], None]]] = {}  # oldest first
        self._size = 0

    def begin(self, size: int, cut_off: Callable[[], None]) -> object:
        """So many bytes wait; the token is for :meth:`end`."""
        token = object()
        self._waiting[token] = size, cut_off
        self._size += size
        while self._size > MAX_UNSENT_BYTES and len(self._waiting) > 1:
            oldest = next(iter(self._waiting))
            victim = self._waiting[oldest][1]
            self.end(oldest)
            victim()
        return token

    def end(self, token: object) -> None:
        """They were sent, or never will be."""
        self._size -= self._waiting.pop(token, (0, None))[0]
