"""Requests and replies of one client connection, from many tasks at once.

There is no background task: of the calls that wait for their replies, one reads for all of them,
and hands that over when its own reply has come or it is cancelled.  So an exception in the
caller's block stays what it is, and nothing is left running.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import count
from typing import Any

import trio

from ..kernel.fd import FileDescriptorLike, close_all
from ..limits import CLEANUP_TIMEOUT, MAX_EVENTS
from ..protocol.client import ClientConnection, QMPEvent, Reply
from ..protocol.connection import ProtocolError, State
from ..transport import Arrival, FdStream
from .errors import ClientClosed, NoDaemon


class ConnectionLost(NoDaemon, trio.BrokenResourceError):
    """The connection to the server is lost."""


class Closed(ClientClosed, trio.ClosedResourceError):
    """This client is closed."""


class Call:
    """A request that waits for its reply."""

    __slots__ = ("reply", "sent", "wake")

    def __init__(self) -> None:
        self.sent = False  # some of it, so that the server may carry it out
        self.reply: Reply | None = None
        self.wake: trio.Event | None = None  # while it waits for another call that reads

    def wake_up(self) -> None:
        """The reply is here, or it is this call's turn to read."""
        if self.wake is not None:
            self.wake.set()


class QMPConnection:
    """The requests, replies and events of one connection, and the calls that wait for them.

    A call that is cancelled breaks no other: if its request was sent already, the server carries
    it out, and the reply is thrown away.

    Args:
        stream: the connection; owned from here on.
    """

    def __init__(self, stream: FdStream) -> None:
        self._stream = stream
        self._connection = ClientConnection()
        self._ids = count(1)
        self._calls: dict[int, Call] = {}
        # The ids of requests that were sent and not answered, in that order: an error without an id
        # is about the oldest, whose text the server could not read.
        self._unanswered: dict[int, None] = {}
        self._sending = trio.Lock()
        self._unsent = b""  # the rest of a request whose call was cancelled halfway
        self._reading: trio.CancelScope | None = None  # of the call that reads for all
        self._events: deque[QMPEvent] = deque(maxlen=MAX_EVENTS)
        self._failure: Exception | None = None

    @property
    def greeting(self) -> Mapping[str, Any]:
        """The server's greeting: its ``version`` and ``capabilities``."""
        return self._connection.greeting or {}

    @property
    def failed(self) -> bool:
        """Whether the connection is of no use any more."""
        return self._failure is not None

    def prepend_events(self, events: Iterable[QMPEvent]) -> None:
        """Put these before all events that wait."""
        self._events = deque([*events, *self._events], maxlen=MAX_EVENTS)

    def drop_events(self, names: Container[str]) -> None:
        """Drop the waiting events of these names."""
        others = [event for event in self._events if event.name not in names]
        self._events = deque(others, maxlen=MAX_EVENTS)

    async def next_event(self) -> QMPEvent:
        await trio.lowlevel.checkpoint()
        if not self._events:
            call = Call()
            # It has no request, and no reply will ever have its id: it is woken to read.
            request_id = next(self._ids)
            self._calls[request_id] = call
            try:
                await self._wait(call, lambda: bool(self._events))
            finally:
                self._forget(request_id)
        return self._events.popleft()

    async def negotiate(self) -> None:
        """Wait for the greeting and enter command mode; :func:`connect` has done so already."""
        while self._connection.state is State.CONNECTED:
            if self._failure is not None:
                raise self._failure
            await self._read()
        reply = await self.request("qmp_capabilities")
        close_all(reply.fds)
        reply.unwrap()
        self._connection.negotiated()

    async def request(
        self,
        command: str,
        arguments: Mapping[str, Any] | None = None,
        fds: Sequence[FileDescriptorLike] = (),
        call: Call | None = None,
    ) -> Reply:
        """Carry out a command; its reply.

        Args:
            command: its name.
            arguments: its arguments.
            fds: descriptors to pass with it.
            call: tells afterwards whether it was sent.

        Raises:
            ValueError: JSON cannot carry *arguments*.
        """
        call = call or Call()
        await trio.lowlevel.checkpoint()
        if self._connection.state is State.CLOSED:
            raise Closed("this client is closed")
        request_id = next(self._ids)
        request = self._connection.execute(command, arguments, request_id)
        self._calls[request_id] = call
        try:
            gone = False
            try:
                await self._send(request, fds, call, request_id)
            except trio.BrokenResourceError:
                gone = True
            if gone:
                await self._await_failure(call)
            await self._wait(call, lambda: call.reply is not None)
            assert call.reply is not None
            return call.reply
        except BaseException:
            if call.reply is not None:
                close_all(call.reply.fds)
            raise
        finally:
            self._forget(request_id)

    async def _send(
        self, request: bytes, fds: Sequence[FileDescriptorLike], call: Call, request_id: int
    ) -> None:
        async with self._sending:
            if self._failure is not None:
                raise self._failure
            if self._unsent:
                await self._send_rest()
            sent = self._stream.send_nowait(request, fds)
            while not sent:
                await self._wait_writable()
                sent = self._stream.send_nowait(request, fds)
            call.sent = True
            self._unanswered[request_id] = None
            self._unsent = request[sent:]
            if self._unsent:
                await self._send_rest()

    async def _await_failure(self, call: Call) -> None:
        """The server receives nothing any more; it may have answered other calls before that, or
        said why.
        """
        with trio.move_on_after(CLEANUP_TIMEOUT):
            await self._wait(call, lambda: self._failure is not None)
        self._fail(ConnectionLost("the server has closed the connection"))
        assert self._failure is not None
        raise self._failure

    async def _send_rest(self) -> None:
        """Send what is left of a request that the server has seen the beginning of.  Cancelled
        here, the next call goes on where this one stopped.
        """
        while self._unsent:
            await self._wait_writable()
            self._unsent = self._unsent[self._stream.send_nowait(self._unsent) :]

    async def _wait_writable(self) -> None:
        """Wait until the server takes more.  It may have to be rid of its answers first, those
        to calls that were cancelled too: they are read meanwhile.

        Raises:
            Exception: why the connection is of no use any more.
        """
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._read_until_failed, nursery.cancel_scope)
            with suppress(trio.ClosedResourceError):  # then there is a failure, raised below
                await self._stream.wait_writable()
            nursery.cancel_scope.cancel()
        if self._failure is not None:
            raise self._failure

    async def _read_until_failed(self, scope: trio.CancelScope) -> None:
        call = Call()
        request_id = next(self._ids)
        self._calls[request_id] = call
        try:
            await self._wait(call, lambda: self._failure is not None)
        except Exception:
            if self._failure is None:
                raise
        finally:
            self._forget(request_id)
            scope.cancel()

    async def _wait(self, call: Call, done: Callable[[], bool]) -> None:
        """Wait until *done*, reading for everybody while nobody else does."""
        while not done():
            if self._failure is not None:
                raise self._failure
            if self._reading is not None:
                call.wake = trio.Event()
                try:
                    await call.wake.wait()
                finally:
                    call.wake = None
            else:
                await self._read()

    def _forget(self, request_id: int) -> None:
        """The call is over; if it was reading, another one that waits takes over."""
        self._calls.pop(request_id, None)
        if self._reading is None:
            for call in self._calls.values():
                if call.wake is not None and call.reply is None:
                    call.wake_up()
                    return

    async def _read(self) -> None:
        """Read what the server sent, for whoever waits for it; wait if there is nothing."""
        try:
            # Cancelled when the connection has failed.
            with trio.CancelScope() as self._reading:  # noqa: ASYNC912 - something may be there already
                # Closed meanwhile, its descriptor may be another file's by now.
                while self._failure is None and not self._receive_nowait():
                    await self._stream.wait_readable()
        except trio.ClosedResourceError:
            if self._failure is None:
                raise
        finally:
            self._reading = None

    def _receive_nowait(self) -> bool:
        try:
            arrival = self._stream.receive_nowait(self._connection)
            if arrival is Arrival.NOTHING:
                return False
            for message in self._connection.messages():
                self._deliver(message)
        except ProtocolError as exc:
            self._fail(exc)
        else:
            if arrival is Arrival.END:
                self._fail(ConnectionLost("the server has closed the connection"))
        self._close_fds()
        return True

    def _deliver(self, message: Reply | QMPEvent) -> None:
        if isinstance(message, QMPEvent):
            self._events.append(message)
            for waiting in self._calls.values():
                waiting.wake_up()
            return
        answered = self._answered(message)
        if answered is None:
            close_all(message.fds)
            if message.id is None and message.error is not None:
                # Not the answer to a request: the server turns us away.
                self._fail(message.error)
        elif (call := self._calls.get(answered)) is None:  # cancelled
            close_all(message.fds)
        else:
            call.reply = message
            call.wake_up()

    def _answered(self, reply: Reply) -> int | None:
        """The id of the request that a reply answers; None if it is none of ours."""
        answered = reply.id
        if answered is None and reply.error is not None:
            answered = next(iter(self._unanswered), None)
        if type(answered) is not int or answered not in self._unanswered:
            return None
        del self._unanswered[answered]
        return answered

    def _fail(self, failure: Exception) -> None:
        if self._failure is None:
            self._failure = failure
        if self._reading is not None:
            self._reading.cancel()
        for call in self._calls.values():
            call.wake_up()

    def _close_fds(self) -> None:
        close_all(self._connection.fds_to_close)
        self._connection.fds_to_close.clear()

    def retire(self) -> list[QMPEvent]:
        """Close a connection that has failed, and whose calls know that, or have their replies but
        did not get round to them; the events that nobody has asked for.
        """
        self._connection.close()
        self._close_fds()
        self._stream.close()
        return list(self._events)

    def close(self) -> None:
        """Close the connection; calls that wait for a reply raise ClientClosed."""
        if self._connection.state is State.CLOSED:
            return
        self._connection.close()
        self._close_fds()
        self._fail(Closed("this client is closed"))
        for call in self._calls.values():
            if call.reply is not None:  # its call has not seen it yet, and raises now
                close_all(call.reply.fds)
                call.reply = None
        self._stream.close()
