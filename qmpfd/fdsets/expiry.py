"""Priority queue of the descriptors that expire."""

from __future__ import annotations

from collections.abc import Iterator
from heapq import heapify, heappop, heappush
from itertools import count

from .entry import StoredFd


class Expiries:
    """Heap of the descriptors that expire, ordered by time of expiry.

    A descriptor removed before it expires stays in the heap until its time comes, or until half of
    the heap are such entries: then the heap is rebuilt.  Removal is O(1), and memory is bounded.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, StoredFd]] = []
        self._ties = count()
        self._removed = 0

    def __len__(self) -> int:
        """Number of stored descriptors that expire."""
        return len(self._heap) - self._removed

    def add(self, time: float, stored: StoredFd) -> None:
        """Schedule the expiry of *stored* at *time*."""
        heappush(self._heap, (time, next(self._ties), stored))

    def discard(self) -> None:
        """Count one descriptor of the heap as removed from its set."""
        self._removed += 1
        if self._removed * 2 > len(self._heap):
            self._heap = [entry for entry in self._heap if not entry[2].removed]
            heapify(self._heap)
            self._removed = 0

    def next(self) -> float | None:
        """Return the time of the next expiry; None if no descriptor expires."""
        heap = self._heap
        while heap and heap[0][2].removed:
            heappop(heap)
            self._removed -= 1
        return heap[0][0] if heap else None

    def pop_expired(self, now: float) -> Iterator[StoredFd]:
        """Pop and yield the descriptors that have expired by *now*.

        The caller has to remove each from its set, which calls :meth:`discard`.
        """
        while (time := self.next()) is not None and time <= now:
            self._removed -= 1  # discard() will count the entry, which is popped here
            yield heappop(self._heap)[2]
