"""One connection to a server, for Trio: requests and replies of many tasks at once.

A system task of Trio's reads: with a nursery in the caller's block, an exception of the block would
come out of it in a group.  The task ends with the connection, and raises nothing.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import trio

from ..kernel.fd import Fd, FileDescriptorLike, close_all
from ..limits import CLEANUP_TIMEOUT
from ..protocol.client import ClientConnection, QMPEvent, Request
from ..protocol.connection import State
from ..transport import Arrival, FdStream
from .connecting import RETRY, connect_nowait
from .errors import ClientClosed, NoDaemon


class ConnectionLost(NoDaemon, trio.BrokenResourceError):
    """The connection to the server is lost."""


class Closed(ClientClosed, trio.ClosedResourceError):
    """This client is closed."""


async def open_connection(
    path: str | os.PathLike[str], events: deque[QMPEvent] | None = None, *, watch: bool = False
) -> QMPConnection:
    """Connect to the server at *path*, and negotiate.

    Args:
        path: the server's socket.
        events: where its events go, behind those that are there.
        watch: have it send those of ``watch-fdsets``.

    Raises:
        NoDaemon: no server listens at *path*, or it closed the connection at once.
        QMPError: the server refuses the connection.
        ProtocolError: the peer does not speak QMP.
    """
    await trio.lowlevel.checkpoint()
    while (sock := connect_nowait(path)) is None:  # noqa: ASYNC110 - nothing tells
        await trio.sleep(RETRY)
    stream = FdStream(trio.socket.from_stdlib_socket(sock))
    connection = QMPConnection(stream, events)
    try:
        await connection.negotiate()
        if watch:
            await connection.execute("watch-fdsets", {"enable": True})
    except BaseException:
        connection.close()
        raise
    return connection


class QMPConnection:
    """The requests, replies and events of one connection.

    A call that is cancelled breaks no other: if its request was sent already, the server executes
    it, and the reply is dropped.

    Args:
        stream: the connection; owned from here on.
        events: where its events go, if there is a place for them.
    """

    def __init__(self, stream: FdStream, events: deque[QMPEvent] | None) -> None:
        self._stream = stream
        self._connection = ClientConnection(events)
        #: The events that nobody has asked for yet.
        self.events = self._connection.events
        #: Why the connection is of no use any more; None as long as it is of use.
        self.failure: Exception | None = None
        self._arrived = trio.lowlevel.ParkingLot()  # of those who wait for what is no reply
        self._sending = trio.Lock()
        self._unsent = b""  # the rest of a request whose call was cancelled halfway
        trio.lowlevel.spawn_system_task(self._read)

    @property
    def greeting(self) -> Mapping[str, Any]:
        """The server's greeting: its ``version`` and ``capabilities``."""
        return self._connection.greeting or {}

    async def negotiate(self) -> None:
        """Wait for the greeting and enter command mode."""
        while self._connection.state is State.CONNECTED:
            await self._await_arrival()
        await self.execute("qmp_capabilities")
        if self.failure is None:
            self._connection.negotiated()

    async def next_event(self) -> QMPEvent:
        """The server's next event."""
        await trio.lowlevel.checkpoint()
        while not self.events:
            await self._await_arrival()
        return self.events.popleft()

    async def _await_arrival(self) -> None:
        if self.failure is not None:
            raise self.failure
        await self._arrived.park()

    async def execute(self, command: str, arguments: Mapping[str, Any] | None = None) -> None:
        """Execute a command whose result is of no interest."""
        close_all((await self.send(self.request(command, arguments)))[1])

    def request(self, command: str, arguments: Mapping[str, Any] | None = None) -> Request:
        """As :meth:`ClientConnection.request`."""
        return self._connection.request(command, arguments)

    async def send(
        self, request: Request, fds: Sequence[FileDescriptorLike] = ()
    ) -> tuple[Any, list[Fd]]:
        """Send *request* and wait for its reply: its result, and the descriptors with that.

        Args:
            request: what :meth:`request` has made.
            fds: descriptors to pass with it.

        Raises:
            OSError: *fds* cannot be passed.
            Exception: the server's error, or why the connection is of no use.
        """
        answered = trio.Event()
        request.on_reply = answered.set
        with request:
            try:
                await self._send(request, fds)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                # The server receives nothing more; it may have said why before that.
                with trio.move_on_after(CLEANUP_TIMEOUT):  # noqa: ASYNC912 - if it has not failed yet
                    while self.failure is None:
                        await self._arrived.park()
                self._fail(ConnectionLost("the server has closed the connection"))
            else:
                await answered.wait()
            if request.reply is None:
                assert self.failure is not None
                raise self.failure
            return request.result()

    async def _send(self, request: Request, fds: Sequence[FileDescriptorLike]) -> None:
        async with self._sending:
            await self._send_rest()
            sent = await self._stream.send_some(request.data, fds)
            self._connection.begun(request)
            self._unsent = request.data[sent:]
            await self._send_rest()

    async def _send_rest(self) -> None:
        """Send what is left of a request that the server has seen the beginning of.  Cancelled
        here, the next call goes on where this one stopped.
        """
        while self._unsent:
            self._unsent = self._unsent[await self._stream.send_some(self._unsent) :]

    async def _read(self) -> None:
        """Read until the connection fails."""
        try:
            arrival = Arrival.NOTHING
            while arrival is not Arrival.END:
                await self._stream.wait_readable()
                arrival = self._stream.receive_nowait(self._connection)
                self._connection.deliver()
                self._arrived.unpark_all()
                if self._connection.refusal is not None:
                    raise self._connection.refusal
            raise ConnectionLost("the server has closed the connection")
        except Exception as exc:  # noqa: BLE001 - those who wait raise it; here, it would end Trio
            self._fail(exc)

    def _fail(self, failure: Exception) -> None:
        if self.failure is not None:
            return
        self.failure = failure
        self._connection.close()
        self._stream.close()
        self._arrived.unpark_all()
        for request in self._connection.unanswered.values():
            request.on_reply()

    def close(self) -> None:
        """Close the connection; calls that wait for a reply raise ClientClosed."""
        closed = Closed("this client is closed")
        self._fail(closed)
        self.failure = closed  # also of a connection that was broken before
