"""The descriptors that expire, in the order of their times."""

from __future__ import annotations

from collections.abc import Iterator
from heapq import heapify, heappop, heappush
from itertools import count

from .entry import StoredFd


class Expiries:
    """A heap of the descriptors that expire, by their times.

    One that is removed earlier stays in the heap until its time comes or the heap is half waste,
    so that removing costs nothing and adding and removing for ever costs no memory.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, StoredFd]] = []
        self._ties = count()
        self._waste = 0

    def __len__(self) -> int:
        """The number of descriptors that expire."""
        return len(self._heap) - self._waste

    def add(self, time: float, stored: StoredFd) -> None:
        """Have *stored* expire at *time*."""
        heappush(self._heap, (time, next(self._ties), stored))

    def discard(self) -> None:
        """One of the descriptors was taken out of its set."""
        self._waste += 1
        if self._waste * 2 > len(self._heap):
            self._heap = [entry for entry in self._heap if not entry[2].removed]
            heapify(self._heap)
            self._waste = 0

    def next(self) -> float | None:
        """When the next descriptor expires; None if none does."""
        heap = self._heap
        while heap and heap[0][2].removed:
            heappop(heap)
            self._waste -= 1
        return heap[0][0] if heap else None

    def until(self, now: float) -> Iterator[StoredFd]:
        """Those whose time is over at *now*, and that are still in their sets: take out all that
        are given.
        """
        while (time := self.next()) is not None and time <= now:
            self._waste -= 1  # it will be discarded, and is no longer in the heap
            yield heappop(self._heap)[2]
