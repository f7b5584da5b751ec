"""A connection to a server, and another one when that is broken, if the caller wants so.

There is no background task here either: the call that needs a connection makes it.
"""

from __future__ import annotations

import errno
import os
import socket
import time
from collections.abc import Container, Mapping, Sequence
from typing import Any

import trio

from ..errors import QMPError
from ..kernel.fd import FileDescriptorLike, close_all
from ..kernel.unix_address import connectable
from ..protocol.client import QMPEvent, Reply
from ..protocol.connection import ProtocolError
from ..transport import FdStream
from .connection import Call, Closed, ConnectionLost, QMPConnection
from .errors import cannot_connect

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


async def open_connection(path: str | os.PathLike[str]) -> QMPConnection:
    """Connect to the server at *path*, and negotiate.

    Raises:
        NoDaemon: no server listens at *path*, or it closed the connection at once.
        QMPError: the server refuses the connection.
        ProtocolError: the peer does not speak QMP.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # A byte sent with MSG_OOB stays one of the stream, where it belongs (unix(7)).
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
        sock.setblocking(False)
        await _connect(sock, path)
    except BaseException:
        sock.close()
        raise
    connection = QMPConnection(FdStream(trio.socket.from_stdlib_socket(sock)))
    try:
        await connection.negotiate()
    except BaseException:
        connection.close()
        raise
    return connection


async def _connect(sock: socket.socket, path: str | os.PathLike[str]) -> None:
    while True:
        await trio.lowlevel.checkpoint()
        try:
            with connectable(path) as address:
                sock.connect(address)
            return
        except BlockingIOError:  # the backlog is full; nothing tells when it is not any more
            await trio.sleep(_RETRY)
        except (OSError, ValueError) as exc:
            error = exc if isinstance(exc, OSError) else OSError(errno.EINVAL, str(exc))
            why = f"cannot connect to {os.fsdecode(path)}: {error.strerror or error}"
            raise cannot_connect(why, error) from exc


class ReconnectingConnection:
    """Carries requests and events, over the connection that there is.

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
        self._resumed: dict[str, Mapping[str, Any]] = {}

    @property
    def greeting(self) -> Mapping[str, Any]:
        """What the server said of itself."""
        return self._connection.greeting

    def drop_events(self, names: Container[str]) -> None:
        """Drop the waiting events of these names."""
        self._connection.drop_events(names)

    async def request(
        self,
        command: str,
        arguments: Mapping[str, Any] | None = None,
        fds: Sequence[FileDescriptorLike] = (),
    ) -> Reply:
        """Carry out a command; its reply.

        Raises:
            ReplyLost: it may have been carried out.
            NoDaemon: there is no connection any more.
            ValueError: JSON cannot carry *arguments*.
            OSError: *fds* cannot be passed.
        """
        tries = 0
        while True:
            connection = await self._working()
            call = Call()
            try:
                return await connection.request(command, arguments, fds, call)
            except Exception as exc:
                if not self._goes_on_after(connection):
                    raise
                if call.sent and not _is_repeatable(command):
                    raise ReplyLost(
                        f"the connection was lost before the reply to {command!r} came: "
                        "it may have been carried out"
                    ) from exc
                tries += 1
                if tries == _MOST_TRIES:
                    raise

    async def next_event(self) -> QMPEvent:
        """The server's next event."""
        while True:
            connection = await self._working()
            try:
                return await connection.next_event()
            except Exception:
                if not self._goes_on_after(connection):
                    raise
            await trio.sleep(_RETRY)  # it may be one that is lost again at once

    async def begin(self, command: str, arguments: Mapping[str, Any]) -> None:
        """Carry out a command, over this connection and each later one."""
        reply = await self.request(command, arguments)
        close_all(reply.fds)
        reply.unwrap()
        self._resumed[command] = arguments

    async def cease(self, command: str, arguments: Mapping[str, Any]) -> None:
        """Undo what :meth:`begin` has begun by another command of that name."""
        self._resumed.pop(command, None)
        connection = self._connection
        if connection.failed:
            return
        try:
            reply = await connection.request(command, arguments)
            close_all(reply.fds)
            reply.unwrap()
        except Exception:
            if not self._goes_on_after(connection):  # there is nothing to undo in another one
                raise

    def _goes_on_after(self, connection: QMPConnection) -> bool:
        """Whether *connection* is broken, and another one may be tried."""
        return self._reconnect is not None and not self._closed and connection.failed

    async def _working(self) -> QMPConnection:
        """A connection that is not broken, as far as is known.

        Raises:
            NoDaemon: there is none within the time for that.
            ClientClosed: the client is closed.
        """
        if self._closed:
            raise Closed("this client is closed")
        if not self._goes_on_after(self._connection):
            return self._connection
        assert self._reconnect is not None
        with trio.move_on_after(self._reconnect) as scope:
            self._waiting.add(scope)
            try:
                async with self._connecting:
                    if self._goes_on_after(self._connection):  # else another call has done so
                        await self._renew()
            finally:
                self._waiting.discard(scope)
            return self._connection
        if self._closed:
            raise Closed("this client is closed")
        raise ConnectionLost(
            f"no connection to {os.fspath(self._path)!r} again within {self._reconnect:g} s"
        ) from self._why

    async def _renew(self) -> None:
        while True:
            try:
                connection = await self._open_again()
            except _TRANSIENT as exc:
                self._why = exc
                await trio.sleep(_RETRY)
                continue
            lost = QMPEvent("FD_EVENTS_LOST", {"count": 0}, time.time())
            connection.prepend_events([*self._connection.retire(), lost])
            self._connection = connection
            return

    async def _open_again(self) -> QMPConnection:
        connection = await open_connection(self._path)
        try:
            for command, arguments in list(self._resumed.items()):
                reply = await connection.request(command, arguments)
                close_all(reply.fds)
                reply.unwrap()
        except BaseException:
            connection.close()
            raise
        return connection

    def close(self) -> None:
        """Close the connection; calls that wait for a reply raise ClientClosed."""
        self._closed = True
        for scope in self._waiting:
            scope.cancel()
        self._connection.close()
