"""A connection to a server, and another one when that is broken, if the caller wants so.

There is no background task for that: the call that needs a connection makes it.
"""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import trio

from ..errors import QMPError
from ..kernel.fd import Fd, FileDescriptorLike
from ..protocol.client import QMPEvent
from ..protocol.connection import ProtocolError
from .connection import Closed, ConnectionLost, QMPConnection, open_connection

#: Seconds between two tries to connect.
_RETRY = 0.05

#: Over how many connections a request is tried: a server that closes each of them cannot read it,
#: or reads nothing.
_MOST_TRIES = 10

#: Why there may be no connection; what is in it for the next try.
_TRANSIENT = (OSError, QMPError, ProtocolError, trio.BrokenResourceError)


class ReplyLost(ConnectionLost):
    """The connection was lost between a request and its reply: the server may have executed the
    request or not.  The next call makes a new connection.
    """


def _is_repeatable(command: str) -> bool:
    """Whether it makes no difference that a command is carried out twice."""
    return command.startswith("query-") or command in ("open-fdset", "watch-fdsets")


class ReconnectingConnection(AsyncIterator[QMPEvent]):
    """Carries requests and events, over the connection that there is; iterates over the events.  No
    async generator, which would have to be closed: a loop over it can be left, and another begun.

    Args:
        path: the server's socket.
        connection: the first connection to it; owned from here on.
        reconnect: seconds that a call waits at most for another one; None if there is no other.
    """

    def __init__(
        self, path: str | os.PathLike[str], connection: QMPConnection, reconnect: float | None
    ) -> None:
        self._path = path
        self._connection = connection
        self._reconnect = reconnect
        self._connecting = trio.Lock()
        self._why: Exception | None = None  # there is no connection
        self._closed = False
        self._waiting: set[trio.CancelScope] = set()  # for a connection
        self._watching = False
        #: The events that nobody has asked for yet.
        self.events = connection.events

    @property
    def greeting(self) -> Mapping[str, Any]:
        """What the server said of itself."""
        return self._connection.greeting

    async def execute(
        self,
        command: str,
        arguments: Mapping[str, Any] | None = None,
        fds: Sequence[FileDescriptorLike] = (),
    ) -> tuple[Any, list[Fd]]:
        """Execute a command: its result, and the descriptors with that.

        Raises:
            QMPError: the server's error.
            ReplyLost: it may have been executed.
            NoDaemon: there is no connection any more.
            ValueError: JSON cannot carry *arguments*.
            OSError: *fds* cannot be passed.
        """
        connection = self._connection
        for tries_left in reversed(range(_MOST_TRIES)):
            request = connection.request(command, arguments)
            try:
                return await connection.send(request, fds)
            except Exception as exc:
                if not (tries_left and self._goes_on_after(connection)):
                    raise
                if request.sent and not _is_repeatable(command):
                    raise ReplyLost(
                        f"the connection was lost before the reply to {command!r} came: "
                        "it may have been carried out"
                    ) from exc
            connection = await self._next_connection(connection)
        raise AssertionError

    async def __anext__(self) -> QMPEvent:
        connection = self._connection
        while True:
            if not self._goes_on_after(connection):
                try:
                    return await connection.next_event()
                except Exception:
                    if not self._goes_on_after(connection):
                        raise
                await trio.sleep(_RETRY)  # the next one may be lost at once as well
            connection = await self._next_connection(connection)

    async def watch(self) -> None:
        """Have the events of ``watch-fdsets`` sent, over this connection and each later one."""
        await self.execute("watch-fdsets", {"enable": True})
        self._watching = True

    async def unwatch(self) -> None:
        """Undo :meth:`watch`."""
        self._watching = False
        connection = self._connection
        try:
            await connection.execute("watch-fdsets", {"enable": False})
        except Exception:
            if connection.failure is None:  # else there is nothing to undo
                raise

    def _goes_on_after(self, connection: QMPConnection) -> bool:
        """Whether *connection* is broken, and another one may be tried."""
        broken = connection.failure is not None
        return broken and self._reconnect is not None and not self._closed

    async def _next_connection(self, broken: QMPConnection) -> QMPConnection:
        """The connection that comes after *broken*.

        Raises:
            NoDaemon: there is none within the time for that.
            ClientClosed: the client is closed.
        """
        assert self._reconnect is not None
        with trio.move_on_after(self._reconnect) as scope:
            self._waiting.add(scope)
            try:
                async with self._connecting:
                    if self._connection is broken:  # else another call has made one
                        await self._renew()
            finally:
                self._waiting.discard(scope)
        if self._closed:
            self._connection.close()
            raise Closed("this client is closed")
        if scope.cancelled_caught:
            raise ConnectionLost(
                f"no connection to {os.fspath(self._path)!r} again within {self._reconnect:g} s"
            ) from self._why
        return self._connection

    async def _renew(self) -> None:
        if not self.events or self.events[-1].name != "FD_EVENTS_LOST":
            self.events.append(QMPEvent("FD_EVENTS_LOST", {"count": 0}, time.time()))
        while True:
            try:
                self._connection = await open_connection(self._path, self.events, self._watching)
                return
            except _TRANSIENT as exc:
                self._why = exc
            await trio.sleep(_RETRY)

    def close(self) -> None:
        """Close the connection; calls that wait for a reply raise ClientClosed."""
        self._closed = True
        for scope in self._waiting:
            scope.cancel()
        self._connection.close()
