"""What a command can reach while it is carried out."""

from __future__ import annotations

import os
import resource
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import islice
from math import inf
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, TypeAlias

from ..errors import FdNotSupplied, GenericError
from ..fdsets import FdSet, FdSets, Peer, StoredFd
from ..kernel.close_pool import ClosePool
from ..kernel.fd import Fd, InFlightProbe
from ..limits import FDS_AT_ONCE, LOOK_INTERVAL, MAX_OPAQUE_PER_UID, MAX_OPAQUE_TOTAL, Limits
from ..policy import Access
from ..protocol import ServerConnection
from .events import Event, EventLog, Watcher
from .hangups import Hangups

if TYPE_CHECKING:
    from .table import Table

Dialect: TypeAlias = Literal["spec", "qemu"]


def memory_size(text: str) -> int:
    """Bytes that *text* takes in memory: one wide character makes all of them wide."""
    return len(text) if text.isascii() else sys.getsizeof(text)


def _zeros() -> dict[str, int]:
    return defaultdict(int)


def _add(counts: dict[int, int], uid: int, more: int) -> None:
    """Count so many more, or fewer, for *uid*; users with none are forgotten."""
    left = counts.get(uid, 0) + more
    if left:
        counts[uid] = left
    else:
        counts.pop(uid, None)


@dataclass(slots=True)
class Stats:
    """What has happened since the start.

    Args:
        started_at: when that was, by the daemon's clock.
    """

    started_at: float
    connections: int = 0  #: clients connected now
    accepted: int = 0  #: clients ever served
    turned_away: int = 0  #: clients refused
    # No Counter: each addition to one takes as long as a call, as it has a __delitem__ of its own.
    commands: dict[str, int] = field(default_factory=_zeros)  #: carried out, by name
    errors: dict[str, int] = field(default_factory=_zeros)  #: replies, by error class


class FdStoreMirror(Protocol):
    """Whoever keeps a second copy of what is stored, see :mod:`qmpfd.server.fdstore.mirror`."""

    @property
    def is_over(self) -> bool:
        """Whether nothing is kept any more."""

    def check_room(self, count: int, opaque: str | None) -> None:
        """Refuse to add so many, with a GenericError."""

    def added(self, fdset: FdSet, stored: StoredFd) -> None:
        """*stored* is now in *fdset*."""

    def removed(self, stored: StoredFd) -> None:
        """*stored* is no longer in its set."""


class Client(NamedTuple):
    """One that is connected.

    Args:
        peer: who it is.
        age: seconds since it connected, or came from a predecessor.
        idle: seconds since it asked something, or connected.
        fds: descriptors that are kept until it is gone.
        watching: whether it is told of changes.
    """

    peer: Peer
    age: float
    idle: float
    fds: int
    watching: bool


@dataclass(slots=True)
class SharedState:
    """What all connections share.

    Args:
        dialect: ``"spec"`` or ``"qemu"``.
        limits: what each client is allowed.
        clock: the time in seconds, never set back.
        stop: ends the daemon, gracefully.
        table: the commands there are.
        clients: tells who is connected.
        on_event: called when an event waits for those who watch.
        refresh_in_flight: counts what clients have taken meanwhile no more as waiting.
        in_flight_probe: tells whether descriptors can be handed out, where that is not sure.
    """

    dialect: Dialect
    limits: Limits
    clock: Callable[[], float]
    stop: Callable[[], None]
    table: Table
    clients: Callable[[], Iterable[Client]] = tuple
    store: FdSets = field(default_factory=FdSets)
    hangups: Hangups = field(default_factory=Hangups)
    closer: ClosePool = field(default_factory=ClosePool)
    keeper: FdStoreMirror | None = None  #: where there is one
    on_event: Callable[[], None] = lambda: None
    refresh_in_flight: Callable[[], None] = lambda: None
    in_flight_probe: InFlightProbe | None = None
    watchers: set[Watcher] = field(default_factory=set)
    logs: dict[Access, EventLog] = field(default_factory=dict)  #: of the events, by who may see
    opaque_total: int = 0  #: bytes of the stored opaque texts, and of names
    opaque_by_uid: dict[int, int] = field(default_factory=dict)  #: the same by uid
    fds_total: int = 0  #: descriptors kept for clients, those of ``getfd`` included
    fds_by_uid: dict[int, int] = field(default_factory=dict)  #: the same by uid
    waiting: int = 0  #: descriptors that no command has yet, and that their clients do not take
    waiting_by_uid: dict[int, int] = field(default_factory=dict)  #: the same by uid
    waiting_limit: int = field(init=False)  #: of the process's table
    refreshed_at: float = -inf  #: when clients were last looked at for what they have taken
    stats: Stats = field(init=False)

    def __post_init__(self) -> None:
        table = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self.limits = self.limits.within(table)
        self.waiting_limit = table // 2
        self.stats = Stats(self.clock())
        self.store.observer = self

    # The store tells of every change, whatever its cause.

    def added(self, fdset: FdSet, stored: StoredFd) -> None:
        """A descriptor was stored: count it, and tell those who watch."""
        self.charge(stored.added_by, stored.opaque)
        if self.keeper is not None:
            self.keeper.added(fdset, stored)
        if self.logs:
            self._log_event(Event.added(fdset.id, stored), fdset, stored)

    def removed(self, fdset: FdSet, stored: StoredFd, reason: str) -> None:
        """A descriptor was taken out: count it, and tell those who watch."""
        self.refund(stored.added_by, stored.opaque)
        if self.keeper is not None:
            self.keeper.removed(stored)
        if stored.lifetime.watch_hangup:
            self.hangups.unwatch(stored)
        if self.logs:
            self._log_event(Event.removed(fdset.id, stored, reason), fdset, stored)

    def _log_event(self, event: Event, fdset: FdSet, stored: StoredFd) -> None:
        for log in self.logs.values():
            log.put(event, fdset.id, stored.opaque)
        self.on_event()

    def log_for(self, access: Access) -> EventLog:
        """The events for one more watcher who may do that."""
        log = self.logs.setdefault(access, EventLog(access))
        log.watchers += 1
        return log

    def leave_log(self, log: EventLog) -> None:
        """A watcher reads *log* no more."""
        log.watchers -= 1
        if not log.watchers:
            self.logs.pop(log.access, None)

    def charge(self, peer: Peer | None, text: str | None) -> None:
        """A descriptor is kept for *peer*, under that opaque text or name."""
        if peer is not None:
            self.fds_total += 1
            _add(self.fds_by_uid, peer.uid, 1)
        if text:
            self._count_text(peer, memory_size(text))

    def refund(self, peer: Peer | None, text: str | None) -> None:
        """What :meth:`charge` has counted is kept no more."""
        if peer is not None:
            self.fds_total -= 1
            _add(self.fds_by_uid, peer.uid, -1)
        if text:
            self._count_text(peer, -memory_size(text))

    def _count_text(self, peer: Peer | None, weight: int) -> None:
        self.opaque_total += weight
        if peer is not None:
            _add(self.opaque_by_uid, peer.uid, weight)

    @property
    def fds_at_once(self) -> int:
        """How many descriptors a connection may take before the first of their commands is carried
        out: one, where the table may be full before that, and what is removed makes room.
        """
        full = self.fds_total + self.waiting + FDS_AT_ONCE > self.limits.max_fds
        return 1 if full else FDS_AT_ONCE

    def charge_waiting(self, uid: int, more: int) -> None:
        """So many descriptors more, or fewer, wait in connections of *uid*."""
        self.waiting += more
        _add(self.waiting_by_uid, uid, more)

    def check_waiting(self, uid: int, more: int) -> None:
        """Refuse to let *more* descriptors wait in a connection of *uid* when that is too much.
        Of what may wait in all, a user has half; root and the daemon's own have all.

        Raises:
            GenericError: it is.
        """
        refused = self._refused_waiting(uid, more)
        if refused and self.clock() - self.refreshed_at > LOOK_INTERVAL:
            self.refreshed_at = self.clock()
            self.refresh_in_flight()
            refused = self._refused_waiting(uid, more)
        if refused:
            raise GenericError(refused)

    def _refused_waiting(self, uid: int, more: int) -> str:
        most = self.waiting_limit  # may wait in all
        if uid not in (0, os.geteuid()) and self.waiting_by_uid.get(uid, 0) + more > most // 2:
            return (
                f"Too many file descriptors of uid {uid} wait in its connections: "
                f"the limit is {most // 2}"
            )
        if self.waiting + more > most:
            return f"Too many file descriptors wait in connections: the limit is {most}"
        return ""

    def check_quota(self, uid: int, count: int, opaque: str | None = None) -> None:
        """Refuse to keep *count* more descriptors for a client of *uid*, each with that opaque
        text, when that is too much.

        Raises:
            GenericError: naming the limit.
        """
        limits = self.limits
        # What hangs in its close still takes a place.
        if self.fds_total + self.closer.pending + count > limits.max_fds:
            raise GenericError(f"Too many file descriptors: the limit is {limits.max_fds}")
        if opaque:
            more = count * memory_size(opaque)
            if self.opaque_total + more > MAX_OPAQUE_TOTAL:
                raise GenericError(
                    f"Too much opaque text: the limit is {MAX_OPAQUE_TOTAL} bytes in all"
                )
            theirs = self.opaque_by_uid.get(uid, 0) + more
            if theirs > MAX_OPAQUE_PER_UID and uid not in (0, os.geteuid()):
                raise GenericError(
                    f"Too much opaque text of uid {uid}: the limit is {MAX_OPAQUE_PER_UID} bytes"
                )
        kept, most = self.fds_by_uid.get(uid, 0) + count, limits.max_fds_per_uid
        if kept > self.waiting_limit and uid not in (0, os.geteuid()):
            most = min(most, self.waiting_limit)  # others have to find room as well
        if kept > most:
            raise GenericError(f"Too many file descriptors of uid {uid}: the limit is {most}")


@dataclass(slots=True, eq=False)
class Context:
    """One connection, as its commands see it.

    Args:
        shared: what it shares with the others.
        connection: its protocol state.
        peer: who is at the other end.
        access: what it may do.
        send_events: sends some of the events that wait; whether more of them can be sent at once.
        names: the descriptors of ``getfd``, by name; owned here.
        fds: the descriptors that came with the command being carried out; what the command
            leaves in the list is closed.
        reply_fds: the descriptors that go back with the reply; owned here until they are sent.
        events: what the client is to be told unasked, while it watches.
        takes_over: the client is a daemon that takes over.
        quitting: the client has said ``quit``: what follows of it is not carried out.
        touched_store: a command was carried out that depends on what is stored.
    """

    shared: SharedState
    connection: ServerConnection
    peer: Peer
    access: Access
    send_events: Callable[[], bool]
    names: dict[str, Fd] = field(default_factory=dict)
    fds: list[Fd] = field(default_factory=list)
    reply_fds: list[Fd] = field(default_factory=list)
    events: Watcher | None = None
    quitting: bool = False
    takes_over: bool = False
    touched_store: bool = False

    def first_fd(self) -> Fd:
        """The descriptor that came with the command.

        Raises:
            FdNotSupplied: none did.
        """
        if not self.fds:
            raise FdNotSupplied("No file descriptor supplied via SCM_RIGHTS")
        return self.fds[0]

    @property
    def fd_count(self) -> int:
        """How many descriptors are kept until the connection is over."""
        return len(self.names) + self.shared.store.owned_count(self)

    def discard(self, removed: list[StoredFd]) -> None:
        """What was taken out of the store is closed once the lock is released."""
        fds_to_close = self.connection.fds_to_close
        for stored in removed:
            fds_to_close.append(stored.fd)

    def store_named(self, name: str) -> None:
        """Keep the descriptor that came with the command under *name*."""
        self.close_named(name)
        self.adopt_named(name, self.fds.pop(0))

    def adopt_named(self, name: str, fd: Fd) -> None:
        """Keep *fd* under *name*, which no other has."""
        self.names[name] = fd
        self.shared.charge(self.peer, name)

    def close_named(self, name: str) -> bool:
        """Close the descriptor that is kept under *name*; whether there is one."""
        fd = self.names.pop(name, None)
        if fd is None:
            return False
        self.shared.refund(self.peer, name)
        self.connection.fds_to_close.append(fd)
        return True

    def watch(self, enable: bool) -> None:
        """Tell this connection of changes to the store, or do not."""
        if enable and self.events is None:
            self.events = Watcher(self.shared.log_for(self.access), self.send_events)
            self.shared.watchers.add(self.events)
        elif not enable and self.events is not None:
            self.shared.leave_log(self.events.log)
            self.shared.watchers.discard(self.events)
            self.events = None

    def change_access(self, access: Access) -> None:
        """The policy has changed: what the client may do from now on."""
        if self.events is not None and access != self.access:
            self.shared.leave_log(self.events.log)
            self.events.move(self.shared.log_for(access))
        self.access = access

    def close(self, most: int | None = None) -> bool:
        """The connection is over, and with it all that was kept for its time only; whether there
        is more of it.

        Args:
            most: how many descriptors are taken out; None for all.
        """
        self.watch(False)
        removed = self.shared.store.remove_owned(self, most)
        self.discard(removed)
        for name in list(islice(self.names, most)):
            self.close_named(name)
        self.connection.fds_to_close += self.reply_fds
        self.reply_fds.clear()
        return bool(self.names) or len(removed) == most
