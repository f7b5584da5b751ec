"""Events for watching connections, in logs of bounded size.

A change of the store is appended to one log for each distinct set of rights among the watchers;
each watcher has a position in its log.  So the cost of a change does not grow with the watchers.
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

#: Types of the events' data, by the event's name.
EVENTS: dict[str, type[Struct]] = {
    "FD_ADDED": FdAdded,
    "FD_REMOVED": FdRemoved,
    "FD_EVENTS_LOST": FdEventsLost,
}


#: Maximum memory of an event in bytes, without the opaque text.
_EVENT_BYTES = 256


class SavedWatch(Struct, forbid_unknown_fields=True):
    """Position of a watcher, for the transfer to a successor daemon.

    Args:
        log: index of the watcher's log among the saved logs.
        behind: number of events of the log that were not sent to the watcher.
        lost: number of older events that were lost and not reported yet.
    """

    log: int
    behind: int
    lost: int


class Event(Struct, forbid_unknown_fields=True, dict=True):
    """An event; also its format in the transfer to a successor daemon.

    Args:
        name: the event's name.
        time: time of the event, in nanoseconds since the epoch.
        data: the event's data, of JSON's types.
    """

    name: Annotated[str, Meta(pattern="^(FD_ADDED|FD_REMOVED)$")]
    time: int
    data: dict[str, Any]

    @classmethod
    def added(cls, stored: StoredFd) -> Event:
        """Create the event for the addition of *stored*."""
        return cls.now("FD_ADDED", FdAdded(stored.fdset.id, stored.fd.fileno(), stored.opaque))

    @classmethod
    def removed(cls, stored: StoredFd, reason: str) -> Event:
        """Create the event for the removal of *stored*."""
        data = FdRemoved(stored.fdset.id, stored.fd.fileno(), reason, stored.opaque)
        return cls.now("FD_REMOVED", data)

    @classmethod
    def now(cls, name: str, data: Struct) -> Event:
        """Create an event with the current time."""
        return cls(name, time.time_ns(), to_builtins(data))

    @property
    def size(self) -> int:
        """Estimated memory of the event, in bytes."""
        return _EVENT_BYTES + 6 * len(self.data.get("opaque", ""))

    @cached_property
    def encoded(self) -> bytes:
        """The encoded event, cached for all watchers."""
        seconds, nanoseconds = divmod(self.time, 1_000_000_000)
        stamp = {"seconds": seconds, "microseconds": nanoseconds // 1000}
        return encode({"timestamp": stamp, "event": self.name, "data": self.data}) + b"\r\n"


class EventLog:
    """The newest events for all watchers with the same rights: stored and encoded once."""

    def __init__(self, access: Access) -> None:
        self.access = access
        self.events: deque[Event] = deque()
        self._size = 0
        #: Number of the next event; events are numbered from 0.
        self.end = 0

    @property
    def begin(self) -> int:
        """Number of the oldest event that was not discarded."""
        return self.end - len(self.events)

    def put(self, event: Event) -> None:
        """Append *event* if the watchers may see it; discard the oldest beyond the limits."""
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
        """Append the events of a predecessor daemon that the watchers may see.

        Raises:
            msgspec.ValidationError: the data of an event is invalid.
        """
        for event in events:
            convert(event.data, EVENTS[event.name])
            self.put(event)


class Watcher:
    """Position of one watching connection in a log, which begins at the log's end.

    Args:
        log: the log of the connection's rights.
        send: sends some of the pending events; returns whether more can be sent at once.
    """

    def __init__(self, log: EventLog, send: Callable[[], bool]) -> None:
        self.log = log
        self.send = send
        self._next = log.end
        self._lost = 0

    @property
    def is_behind(self) -> bool:
        """Whether events, or a report of lost events, are pending."""
        return self._next < self.log.end or self._lost > 0

    def next_batch(self) -> bytes:
        """Pop some pending events, at least one, encoded; empty if none is pending."""
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
        """Return the position, for a successor daemon that receives *logs*."""
        return SavedWatch(logs.index(self.log), self.log.end - self._next, self._lost)

    def restore(self, behind: int, lost: int) -> None:
        """Restore a saved position: *behind* events of the log were not sent."""
        self._next, self._lost = self.log.end - behind, lost

    def move(self, log: EventLog) -> None:
        """Change to the end of *log*; count the unsent events of the former log as lost."""
        self._lost += self.log.end - self._next
        self.log, self._next = log, log.end
