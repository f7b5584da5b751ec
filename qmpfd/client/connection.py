"""One connection to a server, for Trio: requests and replies of many tasks at once.

A Trio system task reads replies and events.  A nursery in the caller's block would wrap exceptions
of that block in an ExceptionGroup.  The task ends with the connection, and raises nothing.
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
        events: queue to append its events to; a new one if None.
        watch: whether to enable the events of ``watch-fdsets``.

    Raises:
        NoDaemon: no server listens at *path*, or it closed the connection at once.
        QMPError: the server refuses the connection.
        ProtocolError: the peer does not speak QMP.
    """
    await trio.lowlevel.checkpoint()
    while (sock := connect_nowait(path)) is None:  # noqa: ASYNC110 - no event to wait for
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
        events: queue to append its events to; a new one if None.
    """

    def __init__(self, stream: FdStream, events: deque[QMPEvent] | None) -> None:
        self._stream = stream
        self._connection = ClientConnection(events)
        #: The events that no caller has received yet.
        self.events = self._connection.events
        #: Why the connection has failed; None while it works.
        self.failure: Exception | None = None
        self._arrived = trio.lowlevel.ParkingLot()  # tasks that wait for greeting, event or failure
        self._sending = trio.Lock()
        self._unsent = b""  # rest of a request whose call was cancelled after a partial send
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
        """Wait for the server's next event."""
        await trio.lowlevel.checkpoint()
        while not self.events:
            await self._await_arrival()
        return self.events.popleft()

    async def _await_arrival(self) -> None:
        if self.failure is not None:
            raise self.failure
        await self._arrived.park()

    async def execute(self, command: str, arguments: Mapping[str, Any] | None = None) -> None:
        """Execute a command and ignore its result."""
        close_all((await self.send(self.request(command, arguments)))[1])

    def request(self, command: str, arguments: Mapping[str, Any] | None = None) -> Request:
        """As :meth:`ClientConnection.request`."""
        return self._connection.request(command, arguments)

    async def send(
        self, request: Request, fds: Sequence[FileDescriptorLike] = ()
    ) -> tuple[Any, list[Fd]]:
        """Send *request*, wait for its reply, and return the result and the reply's descriptors.

        Args:
            request: a request made by :meth:`request`.
            fds: descriptors to pass with it.

        Raises:
            OSError: *fds* cannot be passed.
            Exception: the server's error, or the failure of the connection.
        """
        answered = trio.Event()
        request.on_reply = answered.set
        with request:
            try:
                await self._send(request, fds)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                # The server has closed its end; it may have sent an error before.
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
            self._connection.mark_sent(request)
            self._unsent = request.data[sent:]
            await self._send_rest()

    async def _send_rest(self) -> None:
        """Send the rest of a request of which the server has the first part.  If this is cancelled,
        the next call continues where it stopped.
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
                if self._connection.failure is not None:
                    raise self._connection.failure
            raise ConnectionLost("the server has closed the connection")
        except Exception as exc:  # noqa: BLE001 - raised by waiting calls: a system task must not
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
        self.failure = closed  # replaces the failure of a connection that was lost before
