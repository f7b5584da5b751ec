"""Events for watching connections, and a bounded queue of them for those that do not read.

A change costs the same however many watch: it is put into a log, of which each watcher has read
up to somewhere.  There is a log for each set of rights among the watchers.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
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


class SavedEvent(Struct, forbid_unknown_fields=True):
    """An event that a successor may have to send.

    Args:
        name: its name.
        time: when it happened, in nanoseconds since the epoch.
        data: its data.
    """

    name: Annotated[str, Meta(pattern="^(FD_ADDED|FD_REMOVED)$")]
    time: int
    data: dict[str, Any]


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


class Event:
    """An event.  The first watcher that is sent it has it encoded.

    Args:
        name: its name.
        data: what there is to tell.
        size: about how many bytes of memory it may take.
        happened: when it happened, in nanoseconds since the epoch; None for now.
    """

    __slots__ = ("_data", "_encoded", "_name", "_time", "size")

    def __init__(self, name: str, data: Struct, size: int, happened: int | None = None) -> None:
        self.size = size
        self._name = name
        self._data = data
        self._time = time.time_ns() if happened is None else happened
        self._encoded: bytes | None = None

    @classmethod
    def added(cls, stored: StoredFd) -> Event:
        """*stored* was added."""
        data = FdAdded(stored.fdset.id, stored.fd.fileno(), stored.opaque)
        return cls("FD_ADDED", data, _EVENT_BYTES + 6 * len(stored.opaque or ""))

    @classmethod
    def removed(cls, stored: StoredFd, reason: str) -> Event:
        """*stored* was removed, and why."""
        data = FdRemoved(stored.fdset.id, stored.fd.fileno(), reason, stored.opaque)
        return cls("FD_REMOVED", data, _EVENT_BYTES + 6 * len(stored.opaque or ""))

    def save(self) -> SavedEvent:
        """The event, for another process."""
        return SavedEvent(self._name, self._time, to_builtins(self._data))

    def encode(self) -> bytes:
        """The event as bytes, encoded once."""
        if self._encoded is None:
            seconds, nanoseconds = divmod(self._time, 1_000_000_000)
            stamp = {"seconds": seconds, "microseconds": nanoseconds // 1000}
            whole = {"timestamp": stamp, "event": self._name, "data": self._data}
            self._encoded = encode(whole) + b"\r\n"
        return self._encoded


class EventLog:
    """The newest events, for all watchers who may see the same: each is kept and encoded once."""

    def __init__(self, access: Access) -> None:
        self.access = access
        self.watchers = 0  #: how many there are
        self._events: deque[Event] = deque()
        self._size = 0
        #: The number of the next event; they are numbered from 0.
        self.end = 0

    @property
    def begin(self) -> int:
        """The number of the oldest event that is still there."""
        return self.end - len(self._events)

    def save(self) -> list[SavedEvent]:
        """The events, for another process."""
        return [event.save() for event in self._events]

    def put(self, event: Event, fdset_id: int, opaque: str | None) -> None:
        """Add *event*, about a descriptor of that fd set with that opaque text, if it may be seen;
        the oldest are given up for it.
        """
        if not self.access.may("query", fdset_id, opaque):
            return
        events = self._events
        events.append(event)
        self.end += 1
        self._size += event.size
        while len(events) > MAX_EVENTS or (self._size > MAX_EVENT_BYTES and len(events) > 1):
            self._size -= events.popleft().size

    def may_see(self, saved: SavedEvent) -> bool:
        """Whether the watchers may see the descriptor that the event is about."""
        return self.access.may("query", saved.data["fdset-id"], saved.data.get("opaque"))

    def restore(self, events: Iterable[SavedEvent]) -> None:
        """Add the events of another process, those that may be seen.

        Raises:
            msgspec.ValidationError: one of them is no event.
        """
        for saved in events:
            data: Any = convert(saved.data, EVENTS[saved.name])
            size = _EVENT_BYTES + 6 * len(data.opaque or "")
            event = Event(saved.name, data, size, saved.time)
            self.put(event, data.fdset_id, data.opaque)

    def since(self, number: int, most: int) -> list[bytes]:
        """The events from *number* on, up to *most* bytes of them but at least one."""
        found = []
        for event in islice(self._events, number - self.begin, None):
            encoded = event.encode()
            found.append(encoded)
            most -= len(encoded)
            if most <= 0:
                break
        return found


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
        """Some of what waits, ready to be sent; empty if nothing does."""
        log = self.log
        self._lost += max(0, log.begin - self._next)
        self._next = max(self._next, log.begin)
        if self._lost:
            event = Event("FD_EVENTS_LOST", FdEventsLost(self._lost), 0)
            self._lost = 0
            return event.encode()
        events = log.since(self._next, EVENT_BYTES_A_TURN)
        self._next += len(events)
        return b"".join(events)

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
