"""One connection, as its commands see it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, auto
from itertools import islice

from ..errors import FdNotSupplied, QMPError
from ..fdsets import Peer, StoredFd
from ..kernel.fd import Fd
from ..policy import Access
from ..protocol.server import ServerConnection
from .events import Watcher
from .shared import SharedState


class Ending(Enum):
    """What ends a connection, but for its client being gone."""

    QUIT = auto()  #: ``quit``
    TAKEOVER = auto()  #: ``takeover``: the client is a daemon that takes this one's place


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
        taken: what these were stored as, where the command has taken them out of the store.
        events: what the client is to be told unasked, while it watches.
        ending: the command after which no other of the client is carried out.
        touched_store: a command was carried out that depends on what is stored.
        closed: the connection is over.
    """

    shared: SharedState
    connection: ServerConnection
    peer: Peer
    access: Access
    send_events: Callable[[], bool]
    names: dict[str, Fd] = field(default_factory=dict)
    fds: list[Fd] = field(default_factory=list)
    reply_fds: list[Fd] = field(default_factory=list)
    taken: StoredFd | None = None
    events: Watcher | None = None
    ending: Ending | None = None
    touched_store: bool = False
    closed: bool = False

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
        """The number of stored descriptors that are closed when this connection ends."""
        return len(self.names) + self.shared.store.owned_count(self)

    def store_named(self, name: str) -> None:
        """Keep the descriptor that came with the command under *name*."""
        self.close_named(name)
        fd = self.fds.pop(0)
        self.adopt_named(name, fd)
        if self.shared.audit is not None:
            self.shared.audit.record_named("added", name, fd.number)

    def adopt_named(self, name: str, fd: Fd) -> None:
        """Keep *fd* under *name*, which no other has."""
        self.names[name] = fd
        self.shared.quotas.charge(self.peer, name)

    def close_named(self, name: str) -> bool:
        """Close the descriptor that is kept under *name*; whether there is one."""
        fd = self.names.pop(name, None)
        if fd is None:
            return False
        self.shared.quotas.refund(self.peer, name)
        if self.shared.audit is not None:
            self.shared.audit.record_named("removed", name, fd.number)
        self.connection.fds_to_close.append(fd)
        return True

    def put_back(self, stored: StoredFd) -> bool:
        """The client has not received what was taken out of the store for it: store it again,
        unless it was kept for the time of a connection that is over; whether it is stored.
        """
        owner = stored.lifetime.owner
        if isinstance(owner, Context) and owner.closed:
            return False
        try:
            self.shared.put_back(stored)
        except QMPError:  # its other end cannot be watched any more
            return False
        return True

    def watch(self, enable: bool) -> None:
        """Begin or stop to send events to this connection."""
        if enable and self.events is None:
            self.events = Watcher(self.shared.log_for(self.access), self.send_events)
            self.shared.watchers.add(self.events)
        elif not enable and self.events is not None:
            self.shared.leave_log(self.events.log)
            self.shared.watchers.discard(self.events)
            self.events = None

    def change_access(self, access: Access) -> None:
        """Replace the client's rights: the policy has changed."""
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
        audit = self.shared.audit
        if audit is not None:
            audit.begin(self.peer, None)
        removed = self.shared.store.owned(self, most)
        self.shared.remove(removed, "connection", self.connection.fds_to_close)
        for name in list(islice(self.names, most)):
            self.close_named(name)
        if audit is not None:
            audit.end()
        self.connection.fds_to_close += self.reply_fds
        self.reply_fds.clear()
        self.closed = True
        return bool(self.names) or len(removed) == most
