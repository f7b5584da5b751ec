"""Lowest free fd set id, found in logarithmic time."""

from __future__ import annotations

from collections.abc import Container
from heapq import heappop, heappush


class IdPool:
    """Finds the lowest free id, from 0.

    Invariant: every id below ``_next`` is in use or in ``_gaps``.  A client may name the id of a
    new set, so ids in ``_gaps`` and from ``_next`` on may be in use too; :meth:`lowest` skips them.

    Args:
        used: the ids in use; the caller updates this container.
    """

    __slots__ = ("_gaps", "_known_gaps", "_next", "_used")

    def __init__(self, used: Container[int]) -> None:
        self._used = used
        self._next = 0
        self._gaps: list[int] = []  # a heap
        self._known_gaps: set[int] = set()  # the ids in _gaps: none enters the heap twice

    def lowest(self) -> int:
        """Return the lowest id that is not in use, without reserving it."""
        gaps, used = self._gaps, self._used
        while gaps:
            if gaps[0] not in used:
                return gaps[0]
            self._known_gaps.discard(heappop(gaps))
        while self._next in used:
            self._next += 1
        return self._next

    def free(self, fdset_id: int) -> None:
        """Record that *fdset_id* is not in use."""
        if fdset_id < self._next and fdset_id not in self._known_gaps:
            self._known_gaps.add(fdset_id)
            heappush(self._gaps, fdset_id)
