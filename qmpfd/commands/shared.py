"""The state that all connections share: the store, and what follows each change of it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

from ..errors import GenericError
from ..fdsets import PERMANENT, FdSet, FdSets, Lifetime, Peer, StoredFd
from ..kernel.close_pool import ClosePool
from ..kernel.fd import Fd, InFlightProbe, peer_address
from ..kernel.hangups import Hangups
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
    """Counters since the start.

    Args:
        started_at: when that was, by the daemon's clock.
    """

    started_at: float
    accepted: int = 0  #: clients ever served
    turned_away: int = 0  #: clients refused
    # No Counter: each addition to one takes as long as a call, as it has a __delitem__ of its own.
    commands: dict[str, int] = field(default_factory=_zeros)  #: carried out, by name
    errors: dict[str, int] = field(default_factory=_zeros)  #: replies, by error class


class FdStoreMirror(Protocol):
    """The second copy of what is stored, see :mod:`qmpfd.server.fdstore.mirror`."""

    @property
    def is_over(self) -> bool:
        """Whether mirroring has ended for good."""

    def check_quota(self, count: int, opaque: str | None) -> None:
        """Refuse to add so many, with a GenericError."""

    def added(self, fdset: FdSet, stored: StoredFd) -> None:
        """*stored* is about to be in *fdset*, unless this raises."""

    def removed(self, stored: StoredFd) -> None:
        """*stored* is about to be taken out of its set; it is still open."""


class Client(NamedTuple):
    """A connected client.

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
    """The state that all connections share.

    Args:
        dialect: ``"spec"`` or ``"qemu"``.
        limits: what each client is allowed.
        clock: the time in seconds, never set back.
        stop: ends the daemon, gracefully.
        table: the commands there are.
        closer: closes what was removed.
        hangups: watches sockets and pipes for their other end's close.
        clients: tells who is connected.
        audit: records what comes, goes, is handed out or refused; None where nobody wants that.
        on_event: called when an event waits for those who watch.
        on_expiry: called when a descriptor was stored that expires.
        in_flight_probe: tells whether descriptors can be handed out, where that is not sure.
        addresses: of this daemon's own sockets.
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
    mirror: FdStoreMirror | None = None  #: where there is one
    audit: Audit | None = None
    on_event: Callable[[], None] = lambda: None
    on_expiry: Callable[[], None] = lambda: None
    in_flight_probe: InFlightProbe | None = None
    addresses: set[str | bytes] = field(default_factory=set)
    watchers: set[Watcher] = field(default_factory=set)
    logs: dict[Access, EventLog] = field(default_factory=dict)  #: of the events, by who may see
    quotas: Quotas = field(init=False)
    stats: Stats = field(init=False)

    def __post_init__(self) -> None:
        self.quotas = Quotas(self.limits, self.clock, self.closer)
        self.limits = self.quotas.limits
        self.stats = Stats(self.clock())

    def check_no_client_end(self, fds: Iterable[Fd]) -> None:
        """Refuse to keep a client's end of a connection to this daemon until a connection ends.

        It would keep that connection up by itself, also when all clients are gone.

        Raises:
            GenericError: one of *fds* is one.
        """
        for fd in fds:
            if peer_address(fd) in self.addresses:
                raise GenericError(
                    "The client's end of a connection to this daemon cannot have lifetime "
                    "'connection'"
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
        """Store descriptors, all or none; the entries made of them.

        All that can fail comes before the store is changed.

        Args:
            fds: the descriptors: taken out of this list once they are stored.
            fdset_id: the set to join; None for a new set under the lowest free id.
            opaque: a free-form text to find them by.
            added_by: the client that they are charged to, or None.
            lifetime: how long they are kept.
            create: create the set of that id where there is none.
            now: when they were added, by the daemon's clock; None for now.

        Raises:
            QMPError: they cannot be stored; see :meth:`FdSets.prepare`, :meth:`Hangups.watch`.
        """
        if now is None:
            now = self.clock()
        entries = self.store.prepare(fds, fdset_id, opaque, added_by, now, create, lifetime)
        if self.mirror is not None or lifetime.watch_hangup:
            self._announce(entries)
        self.store.commit(entries)
        fds.clear()
        self.quotas.charge(added_by, opaque, len(entries))
        if self.audit is not None or self.logs:
            self._note_added(entries)
        if lifetime.expires_at is not None:
            self.on_expiry()
        return entries

    def put_back(self, stored: StoredFd) -> None:
        """Store again what was taken out, as the newest of its set; in a new set if there is
        another one of that id by now.

        Raises:
            QMPError: see :meth:`Hangups.watch`.
        """
        fdset_id: int | None = stored.fdset.id
        if self.store.get(stored.fdset.id) not in (None, stored.fdset):
            fdset_id = None
        opaque, added_by, lifetime = stored.opaque, stored.added_by, stored.lifetime
        now = stored.added_at
        self.add([stored.fd], fdset_id, opaque, added_by, lifetime, create=True, now=now)

    def _note_added(self, entries: list[StoredFd]) -> None:
        """Tell the audit trail and those who watch."""
        for stored in entries:
            if self.audit is not None:
                self.audit.record("added", stored)
            if self.logs:
                self._log_event(Event.added(stored))

    def _announce(self, entries: list[StoredFd]) -> None:
        """Have *entries* watched and mirrored before they are stored: all of them, or none."""
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
                    mirror.added(stored.fdset, stored)
                    mirrored.append(stored)
        except BaseException:
            for stored in watched:
                self.hangups.unwatch(stored.fd)
            for stored in mirrored:
                assert mirror is not None
                mirror.removed(stored)
            raise

    def remove(self, entries: Iterable[StoredFd], reason: str, fds_to_close: list[Fd]) -> None:
        """Take descriptors out of the store.

        Args:
            entries: what is stored.
            reason: why, as watchers are told.
            fds_to_close: where the descriptors go, whose owner this list is from then on.
        """
        for stored in entries:
            if stored.added_by is not None:
                stored.fd.uid = stored.added_by.uid
            if self.mirror is not None:
                self.mirror.removed(stored)
            if stored.lifetime.watch_hangup:
                self.hangups.unwatch(stored.fd)
            event = Event.removed(stored, reason) if self.logs else None
            self.store.pop(stored)
            if self.audit is not None:
                self.audit.record(reason, stored)
            fds_to_close.append(stored.fd)
            self.quotas.refund(stored.added_by, stored.opaque)
            if event is not None:
                self._log_event(event)

    def _log_event(self, event: Event) -> None:
        for log in self.logs.values():
            log.put(event)
        self.on_event()

    # -- who watches -----------------------------------------------------------------------------

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
