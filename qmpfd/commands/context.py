"""What a command can reach while it is carried out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias

from ..closing import Closer
from ..errors import FdNotSupplied, GenericError
from ..fd import Fd
from ..fdsets import FdSet, FdSets, Peer, StoredFd
from ..limits import MAX_OPAQUE_TOTAL, Limits
from ..policy import Access
from ..protocol import ServerConnection
from .events import EventQueue, fd_added, fd_removed
from .hangups import Hangups

if TYPE_CHECKING:
    from .table import Table

Dialect: TypeAlias = Literal["spec", "qemu"]


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
    commands: Counter[str] = field(default_factory=Counter)  #: carried out, by name
    errors: Counter[str] = field(default_factory=Counter)  #: replies, by error class


class Keeper(Protocol):
    """Whoever keeps a second copy of what is stored, see :mod:`qmpfd.server.keeper`."""

    def check_room(self, count: int, opaque: str | None) -> None:
        """Refuse to add so many, with a GenericError."""

    def added(self, fdset: FdSet, stored: StoredFd) -> None:
        """*stored* is now in *fdset*."""

    def removed(self, stored: StoredFd) -> None:
        """*stored* is no longer in its set."""


@dataclass(slots=True)
class Daemon:
    """What all connections share.

    Args:
        dialect: ``"spec"`` or ``"qemu"``.
        limits: what each client is allowed.
        clock: the time in seconds, never set back.
        stop: ends the daemon, gracefully.
        table: the commands there are.
    """

    dialect: Dialect
    limits: Limits
    clock: Callable[[], float]
    stop: Callable[[], None]
    table: Table
    store: FdSets = field(default_factory=FdSets)
    hangups: Hangups = field(default_factory=Hangups)
    closer: Closer = field(default_factory=Closer)
    watchers: set[EventQueue] = field(default_factory=set)
    keeper: Keeper | None = None  #: where there is one
    opaque_total: int = 0  #: characters of the stored opaque texts
    kept: int = 0  #: descriptors kept for clients, those of ``getfd`` included
    kept_of: Counter[int] = field(default_factory=Counter)  #: the same by uid
    stats: Stats = field(init=False)

    def __post_init__(self) -> None:
        self.stats = Stats(self.clock())
        self.store.observer = self

    # The store tells of every change, whatever its cause.

    def added(self, fdset: FdSet, stored: StoredFd) -> None:
        """A descriptor was stored: count it, and tell those who watch."""
        if stored.added_by is not None:
            self.kept += 1
            self.kept_of[stored.added_by.uid] += 1
        if stored.opaque:
            self.opaque_total += len(stored.opaque)
        if self.keeper is not None:
            self.keeper.added(fdset, stored)
        if self.watchers:
            event = fd_added(fdset.id, stored)
            for queue in self.watchers:
                queue.put(event, fdset.id, stored.opaque)

    def removed(self, fdset: FdSet, stored: StoredFd, reason: str) -> None:
        """A descriptor was taken out: count it, and tell those who watch."""
        if stored.added_by is not None:
            self.release(stored.added_by.uid)
        if stored.opaque:
            self.opaque_total -= len(stored.opaque)
        if self.keeper is not None:
            self.keeper.removed(stored)
        if stored.terms.watch_hangup:
            self.hangups.unwatch(stored)
        if self.watchers:
            event = fd_removed(fdset.id, stored, reason)
            for queue in self.watchers:
                queue.put(event, fdset.id, stored.opaque)

    def hold(self, uid: int) -> None:
        """A descriptor is kept for a client of *uid*."""
        self.kept += 1
        self.kept_of[uid] += 1

    def release(self, uid: int) -> None:
        """A descriptor that was kept for a client of *uid* is kept no more."""
        self.kept -= 1
        self.kept_of[uid] -= 1
        if not self.kept_of[uid]:
            del self.kept_of[uid]

    def check_room(self, uid: int, count: int, opaque: str | None = None) -> None:
        """Refuse to keep *count* more descriptors for a client of *uid*, each with that opaque
        text, when that is too much.

        Raises:
            GenericError: naming the limit.
        """
        limits = self.limits
        # What hangs in its close still takes a place.
        if self.kept + self.closer.pending + count > limits.max_fds:
            raise GenericError(f"Too many file descriptors: the limit is {limits.max_fds}")
        if opaque and self.opaque_total + count * len(opaque) > MAX_OPAQUE_TOTAL:
            raise GenericError(
                f"Too much opaque text: the limit is {MAX_OPAQUE_TOTAL} characters in all"
            )
        if self.kept_of[uid] + count > limits.max_fds_per_uid:
            raise GenericError(
                f"Too many file descriptors of uid {uid}: the limit is {limits.max_fds_per_uid}"
            )


@dataclass(slots=True, eq=False)
class Context:
    """One connection, as its commands see it.

    Args:
        daemon: what it shares with the others.
        connection: its protocol state.
        peer: who is at the other end.
        access: what it may do.
        wake: called when an event waits to be sent.
        names: the descriptors of ``getfd``, by name; owned here.
        fds: the descriptors that came with the command being carried out; what the command
            leaves in the list is closed.
        passed: the descriptors that go back with the reply; owned here until they are sent.
        events: what the client is to be told unasked, while it watches.
        takes_over: the client is a daemon that takes over.
        about_store: a command was carried out that depends on what is stored.
        quitting: the client has said ``quit``: what follows of it is not carried out.
    """

    daemon: Daemon
    connection: ServerConnection
    peer: Peer
    access: Access
    wake: Callable[[], None]
    names: dict[str, Fd] = field(default_factory=dict)
    fds: list[Fd] = field(default_factory=list)
    passed: list[Fd] = field(default_factory=list)
    events: EventQueue | None = None
    quitting: bool = False
    takes_over: bool = False
    about_store: bool = False

    def first_fd(self) -> Fd:
        """The descriptor that came with the command.

        Raises:
            FdNotSupplied: none did.
        """
        if not self.fds:
            raise FdNotSupplied("No file descriptor supplied via SCM_RIGHTS")
        return self.fds[0]

    def discard(self, removed: list[StoredFd]) -> None:
        """What was taken out of the store is closed once the lock is released."""
        self.connection.garbage += [stored.fd for stored in removed]

    def keep(self, name: str) -> None:
        """Keep the descriptor that came with the command under *name*."""
        self.drop(name)
        self.names[name] = self.fds.pop(0)
        self.daemon.hold(self.peer.uid)
        self.daemon.opaque_total += len(name)

    def drop(self, name: str) -> bool:
        """Close the descriptor that is kept under *name*; whether there is one."""
        fd = self.names.pop(name, None)
        if fd is None:
            return False
        self.daemon.release(self.peer.uid)
        self.daemon.opaque_total -= len(name)
        self.connection.garbage.append(fd)
        return True

    def watch(self, enable: bool) -> None:
        """Tell this connection of changes to the store, or do not."""
        if enable and self.events is None:
            self.events = EventQueue(self.wake, lambda *fd: self.access.may("query", *fd))
            self.daemon.watchers.add(self.events)
        elif not enable and self.events is not None:
            self.daemon.watchers.discard(self.events)
            self.events = None

    def close(self) -> None:
        """The connection is over, and with it all that was kept for its time only."""
        self.watch(False)
        self.discard(self.daemon.store.remove_owned(self))
        for name in list(self.names):
            self.drop(name)
        self.connection.garbage += self.passed
        self.passed.clear()
