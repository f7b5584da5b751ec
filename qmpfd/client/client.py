"""A QMP client for Trio that passes descriptors."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Literal

import trio

from ..commands import AddfdInfo, FdInfo, FdsetInfo
from ..commands.events import EVENTS
from ..kernel.fd import Fd, FileDescriptorLike, close_all
from ..limits import CLEANUP_TIMEOUT
from ..protocol import QMPEvent
from .calls import members, one_fd, typed
from .reconnect import ReconnectingConnection, open_connection

if TYPE_CHECKING:
    from typing import Unpack

    from .calls import Selector


class _Events(AsyncIterator[QMPEvent]):
    """The events of a client.  No async generator, which would have to be closed: a loop over
    it can be left, and another one begun.
    """

    __slots__ = ("_next",)

    def __init__(self, following: Callable[[], Awaitable[QMPEvent]]) -> None:
        self._next = following

    async def __anext__(self) -> QMPEvent:
        return await self._next()


class Client:
    """A connection to a QMP server; made by :func:`connect`.

    Calls may be made from many tasks at once.  A call that is cancelled breaks no other: if its
    request was sent already, the server carries it out, and the reply is thrown away.

    Args:
        link: the connection; owned from here on.
    """

    def __init__(self, link: ReconnectingConnection) -> None:
        self._link = link
        self._watching = 0  # blocks of watch_fdsets

    @property
    def greeting(self) -> Mapping[str, Any]:
        """What the server said of itself: its ``version`` and ``capabilities``."""
        return self._link.greeting

    def close(self) -> None:
        """Close the connection; calls that wait raise ClientClosed."""
        self._link.close()

    # -- commands ------------------------------------------------------------------------------

    async def execute(
        self,
        command: str,
        arguments: Mapping[str, Any] | None = None,
        *,
        fds: Sequence[FileDescriptorLike] = (),
    ) -> Any:
        """Carry out any QMP command.

        Args:
            command: its name.
            arguments: its arguments, as they go over the wire.
            fds: descriptors to pass with it (SCM_RIGHTS); they stay the caller's.

        Returns:
            The ``return`` member of the reply.

        Raises:
            QMPError: the server refused it; the exception is named after the error's class.
            ReplyLost: the connection was lost before the reply, and is made anew: the command may
                have been carried out, or not.
            NoDaemon: the connection is lost; it is a trio.BrokenResourceError too.
            ClientClosed: this client is closed; it is a trio.ClosedResourceError too.
            ProtocolError: the server's answer is not QMP.
            ValueError: JSON cannot carry the arguments.
            OSError: *fds* cannot be passed.
        """
        reply = await self._link.request(command, arguments, fds)
        close_all(reply.fds)
        return reply.unwrap()

    async def add_fd(
        self,
        fd: FileDescriptorLike,
        fdset_id: int | None = None,
        opaque: str | None = None,
    ) -> AddfdInfo:
        """Add a duplicate of *fd* to an fd set (``add-fd``).

        Args:
            fd: an int or anything with ``fileno()``; it stays the caller's.
            fdset_id: the set; a new one if None.
            opaque: a free-form text to find the descriptor by.

        Returns:
            The set's id, and the descriptor's number in the server.

        Raises:
            InvalidParameterValue: the server wants an existing set.
            Exception: what :meth:`execute` raises.
        """
        arguments = members(fdset_id=fdset_id, opaque=opaque)
        return typed(await self.execute("add-fd", arguments, fds=[fd]), AddfdInfo)

    async def remove_fd(self, fdset_id: int, fd: int | None = None) -> None:
        """Remove a descriptor from an fd set (``remove-fd``).

        Args:
            fdset_id: the set.
            fd: the descriptor's number in the server; all of the set if None.

        Raises:
            FdNotFound: there is no such set, or no such descriptor in it.
            Exception: what :meth:`execute` raises.
        """
        arguments = members(fdset_id=fdset_id, fd=fd)
        await self.execute("remove-fd", arguments)

    async def query_fdsets(self) -> list[FdsetInfo]:
        """The fd sets, by descending id (``query-fdsets``)."""
        return typed(await self.execute("query-fdsets"), list[FdsetInfo])

    # -- commands that only qmpfd has ----------------------------------------------------------

    async def open_fdset(
        self,
        fdset_id: int | None = None,
        access: Literal["rdonly", "wronly", "rdwr"] | None = None,
        fd: int | None = None,
        *,
        remove: bool = False,
        **selector: Unpack[Selector],
    ) -> Fd:
        """Get a duplicate of the newest stored descriptor that is selected (``open-fdset``).

        Use it as ``with await client.open_fdset(...) as fd`` and, for a call that wants a number,
        ``fd.fileno()``: it is closed at the end of the block, unless it was given on with
        ``fd.detach()``.

        Args:
            fdset_id: the fd set.
            access: the access mode that it must have; any if None.
            fd: its number in the server; the newest that matches if None.
            remove: take it out of the store in the same step.
            selector: what else it is chosen by: *opaque* (or *name*), *opaque_prefix*,
                *added_by_pid*, *added_by_uid*.

        Raises:
            FdNotFound: there is no such descriptor.
            Exception: what :meth:`execute` raises.
        """
        arguments = members(
            fdset_id=fdset_id, access=access, fd=fd, remove=remove or None, **selector
        )
        reply = await self._link.request("open-fdset", arguments)
        reply.unwrap()
        return one_fd(reply.fds)

    async def add_fds(
        self,
        fds: Sequence[FileDescriptorLike],
        fdset_id: int | None = None,
        opaque: str | None = None,
        *,
        lifetime: Literal["daemon", "connection"] = "daemon",
        expires: int | None = None,
        watch_hangup: bool = False,
        if_exists: Literal["add", "fail", "replace"] = "add",
    ) -> FdsetInfo:
        """Add duplicates of up to 253 descriptors to an fd set, or none of them (``add-fds``).

        Args:
            fds: ints or anything with ``fileno()``; they stay the caller's.
            fdset_id: the set; a new one if None.
            opaque: a free-form text to find the descriptors by.
            lifetime: ``"connection"``: they are removed when this connection ends.
            expires: seconds after which they are removed.
            watch_hangup: remove each when the other end of the socket or pipe is gone.
            if_exists: what to do where there are descriptors of the same opaque text already (in
                the fd set that is named, or anywhere): add these beside them, refuse, or take the
                older ones out in the same step.

        Returns:
            The set's id, and what was added, in the order of *fds*.

        Raises:
            InvalidParameterValue: the server wants an existing set, or sockets and pipes.
            FdExists: there are such descriptors already, and *if_exists* is ``"fail"``.
            Exception: what :meth:`execute` raises.
        """
        arguments = members(
            fdset_id=fdset_id,
            opaque=opaque,
            lifetime=None if lifetime == "daemon" else lifetime,
            expires=expires,
            watch_hangup=watch_hangup or None,
            if_exists=None if if_exists == "add" else if_exists,
        )
        return typed(await self.execute("add-fds", arguments, fds=fds), FdsetInfo)

    async def query_fds(
        self, fdset_id: int | None = None, fd: int | None = None, **selector: Unpack[Selector]
    ) -> list[FdInfo]:
        """What is stored, in detail (``query-fds``).

        Args:
            fdset_id: only this fd set.
            fd: only the descriptor with this number in the server.
            selector: what else they are chosen by: *opaque* (or *name*), *opaque_prefix*,
                *added_by_pid*, *added_by_uid*.

        Raises:
            Exception: what :meth:`execute` raises.
        """
        arguments = members(fdset_id=fdset_id, fd=fd, **selector)
        return typed(await self.execute("query-fds", arguments), list[FdInfo])

    async def remove_fds(
        self, fdset_id: int | None = None, fd: int | None = None, **selector: Unpack[Selector]
    ) -> list[FdsetInfo]:
        """Remove all stored descriptors that are selected (``remove-fds``).

        Args:
            fdset_id: only of this fd set.
            fd: only the descriptor with this number in the server.
            selector: what else they are chosen by, as for :meth:`query_fds`.

        Returns:
            What was removed, by fd set.

        Raises:
            FdNotFound: there are none.
            Exception: what :meth:`execute` raises.
        """
        arguments = members(fdset_id=fdset_id, fd=fd, **selector)
        return typed(await self.execute("remove-fds", arguments), list[FdsetInfo])

    @asynccontextmanager
    async def watch_fdsets(self) -> AsyncGenerator[AsyncIterator[QMPEvent], None]:
        """Be told what is added and removed, while the block runs (``watch-fdsets``).

        Use it as ``async with client.watch_fdsets() as events`` and ``async for event in events``;
        the events are those from the beginning of the block on.  Of several blocks at a time,
        each event goes to one.

        Raises:
            Exception: what :meth:`execute` raises.
        """
        if not self._watching:  # what nobody asked for in an earlier block
            self._link.drop_events(EVENTS)
        await self._link.begin("watch-fdsets", {"enable": True})
        self._watching += 1
        try:
            yield self.events()
        finally:
            self._watching -= 1
            with trio.move_on_after(CLEANUP_TIMEOUT, shield=True):
                if not self._watching:
                    await self._link.cease("watch-fdsets", {"enable": False})

    def events(self) -> AsyncIterator[QMPEvent]:
        """The server's events, as they come; a QEMU sends some unasked.

        At most 4096 wait here to be asked for; the oldest are dropped then.

        Raises:
            NoDaemon: the connection is lost; it is a trio.BrokenResourceError too.
            ClientClosed: this client is closed; it is a trio.ClosedResourceError too.
        """
        return _Events(self._link.next_event)


@asynccontextmanager
async def connect(
    path: str | os.PathLike[str], *, reconnect: float | None = None
) -> AsyncGenerator[Client, None]:
    """Connect to the QMP server at *path*: a qmpfd daemon, or a real QEMU's monitor.

    Use it as ``async with qmpfd.connect(path) as client``; the connection is closed at the end.

    With *reconnect*, a connection that breaks later is made anew by the next call, or by whoever
    waits for events, and negotiated.  What can be repeated without harm is: the ``query-`` commands
    and ``open-fdset``.  A call of another command whose reply was lost raises :exc:`ReplyLost`.
    Watching goes on; the event ``FD_EVENTS_LOST``, its ``count`` 0, tells where others may be
    missing.  What belongs to a connection is gone with it: the names of ``getfd``, and
    descriptors that were added with ``lifetime="connection"``.

    Args:
        path: the server's Unix socket; ``@NAME`` is one in the abstract namespace (unix(7)).
        reconnect: seconds that a call may wait for a new connection; None if there shall be none.

    Raises:
        NoDaemon: nobody can be reached at *path*, or it closed the connection at once.
        QMPError: the server turns us away.
        ProtocolError: the peer does not speak QMP.
    """
    client = Client(ReconnectingConnection(path, await open_connection(path), reconnect))
    try:
        yield client
    finally:
        client.close()
