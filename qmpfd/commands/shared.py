"""State that all connections share: the store, and what has to follow each change of it."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias
from weakref import WeakValueDictionary

from ..errors import GenericError
from ..fdsets import PERMANENT, FdSets, Lifetime, Peer, StoredFd
from ..kernel.close_pool import ClosePool
from ..kernel.fd import Fd, peer_address
from ..kernel.hangups import Hangups
from ..kernel.in_flight import InFlightProbe
from ..limits import Limits
from ..policy import Access
from .audit import Audit
from .events import Event, EventLog, Watcher
from .quotas import Quotas
from .table import Table

Dialect: TypeAlias = Literal["spec", "qemu"]


def _zeros() -> dict[str, int]:
    return defaultdict(int)


@dataclass(slots=True)
class Stats:
    """Counters since the daemon's start.

    Args:
        started_at: time of the start, by the daemon's clock.
    """

    started_at: float
    accepted: int = 0  #: accepted connections
    turned_away: int = 0  #: rejected connections
    # Not Counter, whose methods are Python functions: each addition would take a call's time.
    commands: dict[str, int] = field(default_factory=_zeros)  #: executed commands, by name
    errors: dict[str, int] = field(default_factory=_zeros)  #: error replies, by error class


class FdStoreMirror(Protocol):
    """Mirror of the store in the fd store, see :mod:`qmpfd.server.fdstore.mirror`."""

    @property
    def is_over(self) -> bool:
        """Whether mirroring has ended permanently."""

    def check_quota(self, count: int, opaque: str | None) -> None:
        """Raise GenericError if the fd store has no room for *count* more descriptors."""

    def added(self, stored: StoredFd) -> None:
        """Mirror *stored* before it is added to its set; if this raises, it is not added."""

    def removed(self, stored: StoredFd) -> None:
        """Mirror the removal of *stored* from its set, before the descriptor is closed."""


class Client(NamedTuple):
    """A connected client.

    Args:
        peer: its process and user.
        age: seconds since it connected, or was transferred from a predecessor.
        idle: seconds since its last request, or since it connected.
        fds: number of descriptors that are removed when its connection ends.
        watching: whether it receives events.
    """

    peer: Peer
    age: float
    idle: float
    fds: int
    watching: bool


@dataclass(slots=True)
class SharedState:
    """The state that all connections share.

    Args:
        dialect: ``"spec"`` or ``"qemu"``.
        limits: the configured limits.
        clock: returns the time in seconds, monotonic.
        stop: ends the daemon gracefully.
        table: the table of commands.
        closer: closes removed descriptors.
        hangups: watches stored sockets and pipes for hang-ups.
        clients: returns the connected clients.
        audit: records additions, removals, openings and refusals; None without an audit trail.
        on_event: called when an event was added to a log.
        on_expiry: called when a descriptor that expires was stored.
        in_flight_probe: tests whether descriptors can be sent; None if there is no limit.
        addresses: addresses of the daemon's own listening sockets.
    """

    dialect: Dialect
    limits: Limits
    clock: Callable[[], float]
    stop: Callable[[], None]
    table: Table[Any]
    closer: ClosePool
    hangups: Hangups[StoredFd]
    clients: Callable[[], Collection[Client]] = tuple
    store: FdSets = field(default_factory=FdSets)
    mirror: FdStoreMirror | None = None  #: None without an fd store
    audit: Audit | None = None
    on_event: Callable[[], None] = lambda: None
    on_expiry: Callable[[], None] = lambda: None
    in_flight_probe: InFlightProbe | None = None
    addresses: set[str | bytes] = field(default_factory=set)
    watchers: set[Watcher] = field(default_factory=set)
    #: Event logs by watchers' rights.
    logs: WeakValueDictionary[Access, EventLog] = field(default_factory=WeakValueDictionary)
    quotas: Quotas = field(init=False)
    stats: Stats = field(init=False)

    def __post_init__(self) -> None:
        self.quotas = Quotas(self.limits, self.clock, self.closer)
        self.limits = self.quotas.limits
        self.stats = Stats(self.clock())

    def check_no_client_end(self, fds: Iterable[Fd]) -> None:
        """Check that none of *fds* is a client's end of a connection to this daemon.

        With the lifetime of a connection, the stored descriptor would keep that connection open
        after the client has exited.

        Raises:
            GenericError: one of *fds* is such an end.
        """
        for fd in fds:
            if peer_address(fd) in self.addresses:
                raise GenericError(
                    "The client's end of a connection to this daemon cannot have lifetime "
                    "'connection'"
                )

    def check_in_flight(self, use: str) -> None:
        """Check that a descriptor can be sent, to be *use*: "handed out".

        Raises:
            GenericError: sendmsg(2) would fail with ETOOMANYREFS.
        """
        if self.in_flight_probe is not None and self.in_flight_probe.exhausted():
            raise GenericError(
                f"The file descriptor cannot be {use}: too many that processes of "
                f"uid {os.geteuid()} have sent wait to be received"
            )

    # -- changes of the store --------------------------------------------------------------------

    def add(
        self,
        fds: list[Fd],
        fdset_id: int | None = None,
        opaque: str | None = None,
        added_by: Peer | None = None,
        lifetime: Lifetime = PERMANENT,
        *,
        create: bool = False,
        now: float | None = None,
    ) -> list[StoredFd]:
        """Store descriptors, all or none; return their entries.

        Everything that can fail is done before the store is changed.

        Args:
            fds: the descriptors; the list is emptied once they are stored.
            fdset_id: the set to add to; None for a new set under the lowest free id.
            opaque: free-form text, a name to find the descriptors by.
            added_by: the client whose quota they count for, or None.
            lifetime: when they are removed without a command.
            create: whether to create a set of that id if none exists.
            now: the time of addition, by the daemon's clock; None for now.

        Raises:
            QMPError: they cannot be stored; see :meth:`FdSets.prepare`, :meth:`Hangups.watch`.
        """
        if now is None:
            now = self.clock()
        entries = self.store.prepare(fds, fdset_id, opaque, added_by, now, create, lifetime)
        if self.mirror is not None or lifetime.watch_hangup:
            self._watch_and_mirror(entries)
        self.store.commit(entries)
        fds.clear()
        self.quotas.charge(added_by, opaque, len(entries))
        if self.audit is not None or self.watchers:
            self._record_added(entries)
        if lifetime.expires_at is not None:
            self.on_expiry()
        return entries

    def _record_added(self, entries: list[StoredFd]) -> None:
        """Record additions in the audit trail and in the event logs."""
        if self.audit is not None:
            for stored in entries:
                self.audit.record("added", stored)
        if self.watchers:
            self._log_events(Event.added(stored) for stored in entries)

    def _watch_and_mirror(self, entries: list[StoredFd]) -> None:
        """Watch and mirror *entries* before they are stored; undo all if one fails."""
        mirror = self.mirror
        watched: list[StoredFd] = []
        mirrored: list[StoredFd] = []
        try:
            for stored in entries:
                if stored.lifetime.watch_hangup:
                    self.hangups.watch(stored.fd, stored)
                    watched.append(stored)
            for stored in entries:
                if mirror is not None:
                    mirror.added(stored)
                    mirrored.append(stored)
        except BaseException:
            for stored in watched:
                self.hangups.unwatch(stored.fd)
            for stored in mirrored:
                assert mirror is not None
                mirror.removed(stored)
            raise

    def remove(self, entries: Sequence[StoredFd], reason: str, fds_to_close: list[Fd]) -> None:
        """Remove descriptors from the store.

        Args:
            entries: the entries to remove.
            reason: the reason in events and the audit trail.
            fds_to_close: receives the descriptors; its owner owns and closes them.
        """
        for stored in entries:
            if stored.added_by is not None:
                stored.fd.uid = stored.added_by.uid
            if self.mirror is not None:
                self.mirror.removed(stored)
            if stored.lifetime.watch_hangup:
                self.hangups.unwatch(stored.fd)
            self.store.pop(stored)
            if self.audit is not None:
                self.audit.record(reason, stored)
            fds_to_close.append(stored.fd)
            self.quotas.refund(stored.added_by, stored.opaque)
        if self.watchers:
            self._log_events(Event.removed(stored, reason) for stored in entries)

    def _log_events(self, events: Iterable[Event]) -> None:
        logs = list(self.logs.values())
        for event in events:
            for log in logs:
                log.put(event)
        self.on_event()

    # -- event logs ------------------------------------------------------------------------------

    def log_for(self, access: Access) -> EventLog:
        """Return the event log of *access*, which exists as long as it has watchers."""
        log = self.logs.get(access)
        if log is None:
            log = self.logs[access] = EventLog(access)
        return log
