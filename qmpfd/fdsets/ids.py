"""Which fd set id is free: the lowest one, in logarithmic time."""

from __future__ import annotations

from collections.abc import Container
from heapq import heappop, heappush


class IdPool:
    """The lowest free id, from 0.

    Every id below ``_next`` is in use or in ``_gaps``; an id in ``_gaps`` may have been taken by
    name meanwhile, and one above ``_next`` as well.  Both are found out when their turn comes.

    Args:
        used: the ids in use, kept by the caller.
    """

    __slots__ = ("_gaps", "_known_gaps", "_next", "_used")

    def __init__(self, used: Container[int]) -> None:
        self._used = used
        self._next = 0
        self._gaps: list[int] = []  # a heap
        self._known_gaps: set[int] = set()  # the same ids, so that none is in the heap twice

    def lowest(self) -> int:
        """The lowest id that is not in use; it stays free until it is used."""
        gaps, used = self._gaps, self._used
        while gaps:
            if gaps[0] not in used:
                return gaps[0]
            self._known_gaps.discard(heappop(gaps))
        while self._next in used:
            self._next += 1
        return self._next

    def free(self, fdset_id: int) -> None:
        """Note that *fdset_id* is not in use, or no longer."""
        if fdset_id < self._next and fdset_id not in self._known_gaps:
            self._known_gaps.add(fdset_id)
            heappush(self._gaps, fdset_id)
