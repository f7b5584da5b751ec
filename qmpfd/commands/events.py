"""What watching connections are told, and how much of it waits for one that does not read."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from msgspec import Struct

from ..fdsets import StoredFd
from ..limits import MAX_EVENT_BYTES, MAX_EVENTS
from ..protocol.encode import encode
from .types import FdAdded, FdEventsLost, FdRemoved

#: The events there are, by name: the types of their data.
EVENTS: dict[str, type[Struct]] = {
    "FD_ADDED": FdAdded,
    "FD_REMOVED": FdRemoved,
    "FD_EVENTS_LOST": FdEventsLost,
}


def _event(name: str, data: Struct) -> bytes:
    seconds, nanoseconds = divmod(time.time_ns(), 1_000_000_000)
    stamp = {"seconds": seconds, "microseconds": nanoseconds // 1000}
    return encode({"timestamp": stamp, "event": name, "data": data}) + b"\r\n"


def fd_added(fdset_id: int, stored: StoredFd) -> bytes:
    """The event that *stored* was added."""
    return _event("FD_ADDED", FdAdded(fdset_id, stored.fd.fileno(), stored.opaque))


def fd_removed(fdset_id: int, stored: StoredFd, reason: str) -> bytes:
    """The event that *stored* was removed, and why."""
    return _event("FD_REMOVED", FdRemoved(fdset_id, stored.fd.fileno(), reason, stored.opaque))


class EventQueue:
    """The events that wait to be sent to one connection; what does not fit is counted and told.

    Args:
        wake: called when there is something to send.
        may_see: whether its peer is shown a descriptor of that fd set, with that opaque text.
    """

    def __init__(
        self, wake: Callable[[], None], may_see: Callable[[int, str | None], bool]
    ) -> None:
        self._wake = wake
        self._may_see = may_see
        self._events: deque[bytes] = deque()
        self._size = 0
        self._lost = 0

    def put(self, event: bytes, fdset_id: int, opaque: str | None) -> None:
        """Queue *event*, about a descriptor of that fd set with that opaque text."""
        if not self._may_see(fdset_id, opaque):
            return
        count, size = len(self._events), self._size + len(event)
        # What comes after a lost one is lost as well, so that the count stands where they would.
        if self._lost or count == MAX_EVENTS or (count and size > MAX_EVENT_BYTES):
            self._lost += 1
        else:
            self._events.append(event)
            self._size = size
            self._wake()

    def take(self) -> bytes:
        """All that waits, ready to be sent; empty if nothing does."""
        if self._lost:
            self._events.append(_event("FD_EVENTS_LOST", FdEventsLost(self._lost)))
            self._lost = 0
        data = b"".join(self._events)
        self._events.clear()
        self._size = 0
        return data
