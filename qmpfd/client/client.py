"""A QMP client for Trio that passes descriptors, and reconnects on request.

No background task reconnects: the call that needs a connection makes it.
"""

from __future__ import annotations

import os
import time
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Mapping,
)
from contextlib import asynccontextmanager, suppress
from typing import Any, Concatenate

import trio

from ..commands.events import EVENTS
from ..errors import QMPError
from ..kernel.fd import Fd
from ..limits import CLEANUP_TIMEOUT
from ..protocol.client import QMPEvent
from ..protocol.connection import ProtocolError
from . import calls
from .calls import Call, ParamsT, ResultT, as_method
from .connection import Closed, ConnectionLost, QMPConnection, open_connection
from .errors import ClientClosed, NoDaemon

#: Seconds between two tries to connect.
_RETRY = 0.05

#: Connections over which a request is tried: a server that closes them all cannot read it, or reads
#: nothing.
_MOST_TRIES = 10

#: Errors of connecting after which the client tries again.
_TRANSIENT = (OSError, QMPError, ProtocolError)


class ReplyLost(ConnectionLost):
    """The connection was lost between a request and its reply: the server may have executed the
    request or not.  The next call makes a new connection.
    """


class _Events(AsyncIterator[QMPEvent]):
    """Iterator over the events of a client.  Not an async generator: a generator would have to be
    closed when a loop over it is left, and could not be iterated again.
    """

    def __init__(self, following: Callable[[], Awaitable[QMPEvent]]) -> None:
        self._following = following

    async def __anext__(self) -> QMPEvent:
        return await self._following()


def _is_repeatable(command: str) -> bool:
    """Return whether executing *command* twice has the effect of executing it once."""
    return command.startswith("query-") or command in ("open-fdset", "watch-fdsets")


def _awaited(
    description: Callable[Concatenate[Any, ParamsT], Call[ResultT]],
) -> Callable[Concatenate[Client, ParamsT], Coroutine[Any, Any, ResultT]]:
    """Make a method that sends the described call and awaits its reply."""

    async def method(self: Client, /, *args: ParamsT.args, **kwargs: ParamsT.kwargs) -> ResultT:
        call = description(self, *args, **kwargs)
        return call.result(*await self._execute(call))

    return as_method(method, description)


class Client:
    """A connection to a QMP server; made by :func:`connect`.

    Calls may be made from many tasks at once.  A call that is cancelled breaks no other: if its
    request was sent already, the server executes it, and the reply is dropped.

    Args:
        path: the server's socket.
        connection: the first connection to it; owned from here on.
        reconnect: seconds that a call waits at most for a new connection; None: never reconnect.
    """

    def __init__(
        self, path: str | os.PathLike[str], connection: QMPConnection, reconnect: float | None
    ) -> None:
        self._path = path
        self._connection = connection
        self._reconnect = reconnect
        self._connecting = trio.Lock()
        self._why: Exception | None = None  # the last error of connecting again
        self._closed = False
        self._renewing = trio.CancelScope()  # of the call that connects again
        self._watching = 0  # number of active watch_fdsets blocks
        self._unread = connection.events  # events that no caller has received yet

    @property
    def greeting(self) -> Mapping[str, Any]:
        """The server's greeting: its ``version`` and ``capabilities``."""
        return self._connection.greeting

    def close(self) -> None:
        """Close the connection; calls that wait for a reply raise ClientClosed."""
        self._closed = True
        self._renewing.cancel()
        self._connection.close()

    execute = _awaited(calls.execute)
    add_fd = _awaited(calls.add_fd)
    remove_fd = _awaited(calls.remove_fd)
    query_fdsets = _awaited(calls.query_fdsets)
    open_fdset = _awaited(calls.open_fdset)
    add_fds = _awaited(calls.add_fds)
    query_fds = _awaited(calls.query_fds)
    remove_fds = _awaited(calls.remove_fds)

    @asynccontextmanager
    async def watch_fdsets(self) -> AsyncGenerator[AsyncIterator[QMPEvent], None]:
        """Receive an event for each descriptor added or removed in the block (``watch-fdsets``).

        Use it as ``async with client.watch_fdsets() as events`` and ``async for event in events``;
        the events are those since the beginning of the block.  If several blocks run at a
        time, each event goes to one of them.

        Raises:
            Exception: what :meth:`execute` raises.
        """
        if not self._watching:  # drop unread events of an earlier block
            others = [event for event in self._unread if event.name not in EVENTS]
            self._unread.clear()
            self._unread.extend(others)
        self._watching += 1
        try:
            await self.execute("watch-fdsets", {"enable": True})
            yield self.events()
        finally:  # also if the call was cancelled after the server had received it
            self._watching -= 1
            connection = self._connection
            if not (self._watching or connection.failure):  # a lost connection watches no more
                with (
                    trio.move_on_after(CLEANUP_TIMEOUT, shield=True),
                    suppress(NoDaemon, ClientClosed, QMPError),
                ):
                    await connection.execute("watch-fdsets", {"enable": False})

    def events(self) -> AsyncIterator[QMPEvent]:
        """Iterate over the server's events as they arrive; a QEMU sends some without a request.

        At most 4096 unread events are kept; beyond that, the oldest is dropped.

        Raises:
            NoDaemon: the connection is lost; also a trio.BrokenResourceError.
            ClientClosed: this client is closed; also a trio.ClosedResourceError.
        """
        return _Events(self._next_event)

    async def _next_event(self) -> QMPEvent:
        connection = self._connection
        while True:
            if not self._goes_on_after(connection):
                try:
                    return await connection.next_event()
                except Exception:
                    if not self._goes_on_after(connection):
                        raise
                await trio.sleep(_RETRY)  # no busy loop if the next one is lost at once as well
            connection = await self._next_connection(connection)

    async def _execute(self, call: Call[Any]) -> tuple[Any, list[Fd]]:
        """Execute *call*; return the ``return`` member of the reply, and its descriptors."""
        connection = self._connection
        for tries_left in reversed(range(_MOST_TRIES)):
            request = connection.request(call.command, call.arguments)
            try:
                return await connection.send(request, call.fds)
            except Exception as exc:
                if not (tries_left and self._goes_on_after(connection)):
                    raise
                if request.sent and not _is_repeatable(call.command):
                    raise ReplyLost(
                        f"the connection was lost before the reply to {call.command!r} came: "
                        "it may have been carried out"
                    ) from exc
            connection = await self._next_connection(connection)
        raise AssertionError

    def _goes_on_after(self, connection: QMPConnection) -> bool:
        """Return whether *connection* is broken and the client may connect again."""
        broken = connection.failure is not None
        return broken and self._reconnect is not None and not self._closed

    async def _next_connection(self, broken: QMPConnection) -> QMPConnection:
        """Return the connection that replaces *broken*; the first caller makes it.

        Raises:
            NoDaemon: connecting did not succeed in time.
            ClientClosed: the client is closed.
        """
        assert self._reconnect is not None
        with trio.move_on_after(self._reconnect) as scope:
            async with self._connecting:
                if self._connection is broken and not self._closed:  # else another call made one
                    self._renewing = scope
                    await self._renew()
        if self._closed:
            self._connection.close()
            raise Closed("this client is closed")
        if scope.cancelled_caught:
            raise ConnectionLost(
                f"no connection to {os.fspath(self._path)!r} again within {self._reconnect:g} s"
            ) from self._why
        return self._connection

    async def _renew(self) -> None:
        if not self._unread or self._unread[-1].name != "FD_EVENTS_LOST":
            self._unread.append(QMPEvent("FD_EVENTS_LOST", {"count": 0}, time.time()))
        while True:
            try:
                self._connection = await open_connection(
                    self._path, self._unread, watch=self._watching > 0
                )
                return
            except _TRANSIENT as exc:
                self._why = exc
            await trio.sleep(_RETRY)


@asynccontextmanager
async def connect(
    path: str | os.PathLike[str], *, reconnect: float | None = None
) -> AsyncGenerator[Client, None]:
    """Connect to the QMP server at *path*: a qmpfd daemon, or a real QEMU's monitor.

    Use it as ``async with qmpfd.connect(path) as client``; the connection is closed at the end.

    With *reconnect*, the next call makes a broken connection again, and negotiates; so does waiting
    for events.  Requests that are harmless to repeat are sent again: the ``query-`` commands and
    ``open-fdset``.  A call of another command whose reply was lost raises :exc:`ReplyLost`.
    Watching continues with the event ``FD_EVENTS_LOST``, its ``count`` 0: other events may be
    missing.  What belonged to the old connection is gone: the names of ``getfd``, and descriptors
    that were added with ``lifetime="connection"``.

    Args:
        path: the server's Unix socket; ``@NAME`` is one in the abstract namespace (unix(7)).
        reconnect: seconds that a call may wait for a new connection; None: never connect again.

    Raises:
        NoDaemon: no server listens at *path*, or it closed the connection at once.
        QMPError: the server refuses the connection.
        ProtocolError: the peer does not speak QMP.
    """
    client = Client(path, await open_connection(path), reconnect)
    try:
        yield client
    finally:
        client.close()
