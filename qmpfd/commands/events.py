"""Events for watching connections, and a bounded queue of them for those that do not read.

A change costs the same however many watch: it is put into a log, of which each watcher has read
up to somewhere.  There is a log for each set of rights among the watchers.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from itertools import islice
from typing import Annotated, Any

from msgspec import Meta, Struct, convert, to_builtins

from ..fdsets import StoredFd
from ..limits import EVENT_BYTES_A_TURN, MAX_EVENT_BYTES, MAX_EVENTS
from ..policy import Access
from ..protocol.encode import encode
from .extension_types import FdAdded, FdEventsLost, FdRemoved

#: The events there are, by name: the types of their data.
EVENTS: dict[str, type[Struct]] = {
    "FD_ADDED": FdAdded,
    "FD_REMOVED": FdRemoved,
    "FD_EVENTS_LOST": FdEventsLost,
}


#: Bytes that an event takes in memory at most, apart from the opaque text.
_EVENT_BYTES = 256


class SavedWatch(Struct, forbid_unknown_fields=True):
    """How far a connection has read the events.

    Args:
        log: which of the saved logs it reads.
        behind: how many events have happened since the last that it was sent.
        lost: how many of those before it has missed, and was not told so yet.
    """

    log: int
    behind: int
    lost: int


class Event(Struct, forbid_unknown_fields=True, dict=True):
    """An event, as it goes over to a successor too.  The first watcher that is sent it has it
    encoded.

    Args:
        name: its name.
        time: when it happened, in nanoseconds since the epoch.
        data: what there is to tell, of JSON's types.
    """

    name: Annotated[str, Meta(pattern="^(FD_ADDED|FD_REMOVED)$")]
    time: int
    data: dict[str, Any]

    @classmethod
    def added(cls, stored: StoredFd) -> Event:
        """*stored* was added."""
        return cls.now("FD_ADDED", FdAdded(stored.fdset.id, stored.fd.fileno(), stored.opaque))

    @classmethod
    def removed(cls, stored: StoredFd, reason: str) -> Event:
        """*stored* was removed, and why."""
        data = FdRemoved(stored.fdset.id, stored.fd.fileno(), reason, stored.opaque)
        return cls.now("FD_REMOVED", data)

    @classmethod
    def now(cls, name: str, data: Struct) -> Event:
        """An event that happens now."""
        return cls(name, time.time_ns(), to_builtins(data))

    @cached_property
    def size(self) -> int:
        """About how many bytes of memory it may take."""
        return _EVENT_BYTES + 6 * len(self.data.get("opaque", ""))

    @cached_property
    def encoded(self) -> bytes:
        """The event as it is sent."""
        seconds, nanoseconds = divmod(self.time, 1_000_000_000)
        stamp = {"seconds": seconds, "microseconds": nanoseconds // 1000}
        return encode({"timestamp": stamp, "event": self.name, "data": self.data}) + b"\r\n"


class EventLog:
    """The newest events, for all watchers who may see the same: each is kept and encoded once."""

    def __init__(self, access: Access) -> None:
        self.access = access
        self.watchers = 0  #: how many there are
        self.events: deque[Event] = deque()
        self._size = 0
        #: The number of the next event; they are numbered from 0.
        self.end = 0

    @property
    def begin(self) -> int:
        """The number of the oldest event that is still there."""
        return self.end - len(self.events)

    def put(self, event: Event) -> None:
        """Add *event*, if it may be seen; the oldest are given up for it."""
        if not self.may_see(event):
            return
        events = self.events
        events.append(event)
        self.end += 1
        self._size += event.size
        while len(events) > MAX_EVENTS or (self._size > MAX_EVENT_BYTES and len(events) > 1):
            self._size -= events.popleft().size

    def may_see(self, event: Event) -> bool:
        """Whether the watchers may see the descriptor that the event is about."""
        return self.access.may("query", event.data["fdset-id"], event.data.get("opaque"))

    def restore(self, events: Iterable[Event]) -> None:
        """Add the events of another process, those that may be seen.

        Raises:
            msgspec.ValidationError: one of them is no event.
        """
        for event in events:
            convert(event.data, EVENTS[event.name])
            self.put(event)


class Watcher:
    """One connection that watches.

    Args:
        log: where they are; what happened before is not told.
        send: called to send some of what waits; whether more of it can be sent at once.
    """

    def __init__(self, log: EventLog, send: Callable[[], bool]) -> None:
        self.log = log
        self.send = send
        self._next = log.end
        self._lost = 0

    @property
    def is_behind(self) -> bool:
        """Whether something waits."""
        return self._next < self.log.end or self._lost > 0

    def next_batch(self) -> bytes:
        """Some of what waits, at least one event, ready to be sent; empty if nothing does."""
        log = self.log
        self._lost += max(0, log.begin - self._next)
        self._next = max(self._next, log.begin)
        if self._lost:
            lost = Event.now("FD_EVENTS_LOST", FdEventsLost(self._lost))
            self._lost = 0
            return lost.encoded
        found = []
        left = EVENT_BYTES_A_TURN
        for event in islice(log.events, self._next - log.begin, None):
            found.append(event.encoded)
            left -= len(event.encoded)
            if left <= 0:
                break
        self._next += len(found)
        return b"".join(found)

    def save(self, logs: Sequence[EventLog]) -> SavedWatch:
        """How far it is, for another process that is given *logs*."""
        return SavedWatch(logs.index(self.log), self.log.end - self._next, self._lost)

    def restore(self, behind: int, lost: int) -> None:
        """Go on where another process was: so many events of the log were not sent."""
        self._next, self._lost = self.log.end - behind, lost

    def move(self, log: EventLog) -> None:
        """Read *log* from its end on; unsent events of the former log count as lost."""
        self._lost += self.log.end - self._next
        self.log, self._next = log, log.end
