"""Context in which the commands of one connection are executed."""

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
    """Command that ends a connection."""

    QUIT = auto()  #: ``quit``
    TAKEOVER = auto()  #: ``takeover``: the client is the successor daemon


@dataclass(slots=True, eq=False)
class Context:
    """Context in which the commands of one connection are executed.

    Args:
        shared: the state that all connections share.
        connection: the protocol state of the connection.
        peer: the client's process and user.
        access: the client's rights.
        send_events: sends some of the pending events; returns whether more can be sent at once.
        names: the descriptors of ``getfd``, by name; owned here.
        fds: the descriptors of the command being executed; those that the command leaves in the
            list are closed.
        reply_fds: the descriptors to attach to the reply; owned here until they are sent.
        taken: the entry that the command has removed from the store for the reply, or None.
        events: the client's position in the event log; None if it does not watch.
        ending: the command after which no more commands of the connection are executed.
        touched_store: whether a command was executed that depends on the store.
        closed: whether the connection has ended.
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
        """Return the first descriptor that came with the command.

        Raises:
            FdNotSupplied: the command came without a descriptor.
        """
        if not self.fds:
            raise FdNotSupplied("No file descriptor supplied via SCM_RIGHTS")
        return self.fds[0]

    @property
    def fd_count(self) -> int:
        """Number of stored descriptors that are closed when this connection ends."""
        return len(self.names) + self.shared.store.owned_count(self)

    def store_named(self, name: str) -> None:
        """Store the command's descriptor under *name*, and close an older one of that name."""
        self.close_named(name)
        fd = self.fds.pop(0)
        self.adopt_named(name, fd)
        if self.shared.audit is not None:
            self.shared.audit.record_named("added", name, fd.number)

    def adopt_named(self, name: str, fd: Fd) -> None:
        """Store *fd* under *name*, which must be unused."""
        self.names[name] = fd
        self.shared.quotas.charge(self.peer, name)

    def close_named(self, name: str) -> bool:
        """Close the descriptor of *name*; return whether there was one."""
        fd = self.names.pop(name, None)
        if fd is None:
            return False
        self.shared.quotas.refund(self.peer, name)
        if self.shared.audit is not None:
            self.shared.audit.record_named("removed", name, fd.number)
        self.connection.fds_to_close.append(fd)
        return True

    def put_back(self, stored: StoredFd) -> bool:
        """Store again an entry that was removed for a reply which was not sent: as the newest of
        its set; in a new set if another set has its id by now.

        Return whether the entry is stored: not if the connection that limits its lifetime has
        ended, or its hang-ups cannot be watched any more.
        """
        owner = stored.lifetime.owner
        if isinstance(owner, Context) and owner.closed:
            return False
        fdset, shared = stored.fdset, self.shared
        try:
            shared.add(
                [stored.fd],
                fdset.id if shared.store.get(fdset.id) in (None, fdset) else None,
                stored.opaque,
                stored.added_by,
                stored.lifetime,
                create=True,
                now=stored.added_at,
            )
        except QMPError:  # hang-ups cannot be watched
            return False
        return True

    def watch(self, enable: bool) -> None:
        """Start or stop sending events to this connection."""
        if enable and self.events is None:
            self.events = Watcher(self.shared.log_for(self.access), self.send_events)
            self.shared.watchers.add(self.events)
        elif not enable and self.events is not None:
            self.shared.watchers.discard(self.events)
            self.events = None

    def change_access(self, access: Access) -> None:
        """Replace the client's rights, after a change of the policy."""
        if self.events is not None and access != self.access:
            self.events.move(self.shared.log_for(access))
        self.access = access

    def close(self, limit: int | None = None) -> bool:
        """Remove the descriptors whose lifetime is that of the connection; return whether some are
        left.

        Args:
            limit: maximum number of stored, and of named, descriptors to remove; None for all.
        """
        self.watch(False)
        audit = self.shared.audit
        if audit is not None:
            audit.begin(self.peer, None)
        removed = self.shared.store.owned(self, limit)
        self.shared.remove(removed, "connection", self.connection.fds_to_close)
        for name in list(islice(self.names, limit)):
            self.close_named(name)
        if audit is not None:
            audit.end()
        self.connection.fds_to_close += self.reply_fds
        self.reply_fds.clear()
        self.closed = True
        return bool(self.names) or len(removed) == limit
