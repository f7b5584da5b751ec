"""What watching connections are told, and how much of it waits for one that does not read.

A change costs the same however many watch: it is put into a log, of which each watcher has read
up to somewhere.  There is a log for each set of rights among the watchers.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from itertools import islice

from msgspec import Struct

from ..fdsets import StoredFd
from ..limits import EVENT_BYTES_A_TURN, MAX_EVENT_BYTES, MAX_EVENTS
from ..policy import Access
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


class EventLog:
    """The newest events, for all watchers who may see the same: each is encoded and kept once.

    Args:
        access: what they may do.
    """

    def __init__(self, access: Access) -> None:
        self.access = access
        self.watchers = 0  #: how many there are
        self._events: deque[bytes] = deque()
        self._size = 0
        #: The number of the next event; they are numbered from 0.
        self.end = 0

    @property
    def begin(self) -> int:
        """The number of the oldest event that is still there."""
        return self.end - len(self._events)

    def put(self, event: bytes, fdset_id: int, opaque: str | None) -> None:
        """Add *event*, about a descriptor of that fd set with that opaque text, if it may be seen;
        the oldest are given up for it.
        """
        if not self.access.may("query", fdset_id, opaque):
            return
        events = self._events
        events.append(event)
        self.end += 1
        self._size += len(event)
        while len(events) > MAX_EVENTS or (self._size > MAX_EVENT_BYTES and len(events) > 1):
            self._size -= len(events.popleft())

    def since(self, number: int, most: int) -> list[bytes]:
        """The events from *number* on, up to *most* bytes of them but at least one."""
        found = []
        for event in islice(self._events, number - self.begin, None):
            found.append(event)
            most -= len(event)
            if most <= 0:
                break
        return found


class Watcher:
    """One connection that is told of events.

    Args:
        log: where they are; what happened before is not told.
        tell: called to send some of what waits; whether more of it can be sent at once.
    """

    def __init__(self, log: EventLog, tell: Callable[[], bool]) -> None:
        self.log = log
        self.tell = tell
        self._next = log.end
        self._lost = 0

    def take(self) -> bytes:
        """Some of what waits, ready to be sent; empty if nothing does."""
        log = self.log
        self._lost += max(0, log.begin - self._next)
        self._next = max(self._next, log.begin)
        if self._lost:
            event = _event("FD_EVENTS_LOST", FdEventsLost(self._lost))
            self._lost = 0
            return event
        events = log.since(self._next, EVENT_BYTES_A_TURN)
        self._next += len(events)
        return b"".join(events)

    def move(self, log: EventLog) -> None:
        """Be told what is in *log* from now on; what waits of the other one is lost."""
        self._lost += self.log.end - self._next
        self.log, self._next = log, log.end
