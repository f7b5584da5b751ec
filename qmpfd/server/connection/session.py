"""Session of one client: reads its input in pieces, has requests executed, sends events."""

from __future__ import annotations

import logging
from contextlib import suppress
from time import monotonic
from typing import NamedTuple

import trio
from outcome import Value

from ...commands import DECODER, NOTHING, VERSION, Client, Context, Ending
from ...errors import GenericError, QMPError
from ...fdsets import Peer
from ...kernel.fd import Fd
from ...limits import (
    LIGHT_BYTES,
    LIGHT_SECONDS,
    LOCK_TIMEOUT,
    NEGOTIATION_TIMEOUT,
    READ_BYTES,
)
from ...policy import Access
from ...protocol.connection import State
from ...protocol.server import ServerConnection
from ...transport import Arrival, FdStream
from ..listen.admission import rejection_reply
from ..services import Services
from .fd_accounting import CLOSES_A_STEP, FdAccounting
from .request_processor import BatchState, RequestProcessor
from .send_buffer import SendBuffer, Unsent
from .session_state import TRANSITIONS, Event, SessionEnd, SessionState

_log = logging.getLogger("qmpfd")


class _Piece(NamedTuple):
    """Result of a piece of work.

    Args:
        arrival: what the last read has found.
        done: whether all requests that were read are executed, and their replies sent.
        heavy: whether the next piece has to be done in the gate.
    """

    arrival: Arrival = Arrival.ALL
    done: bool = True
    heavy: bool = False


# Local names: an Enum member takes 0.16 us before Python 3.12, and a command 20 us.
_ALL, _NOTHING = Arrival.ALL, Arrival.NOTHING


class Session:
    """Serves one client.

    Args:
        services: the daemon's services.
        stream: the connection; owned from here on.
        peer: the client.
        groups: all groups of the client.
        access: the client's rights.
        idle: seconds since the last request, for a session that a predecessor has begun.
    """

    def __init__(
        self,
        services: Services,
        stream: FdStream,
        peer: Peer,
        groups: frozenset[int],
        access: Access,
        idle: float = 0.0,
    ) -> None:
        self.peer = peer
        self.groups = groups
        self._services = services
        #: The connection.
        self.stream = stream
        self._connection = ServerConnection(
            DECODER,
            max_request_bytes=services.shared.limits.max_request_bytes,
            qemu_classes=services.shared.dialect == "qemu",
            budget=services.input_budget,
            owner=peer.uid,
        )
        self._max_fds = services.shared.quotas.fds_at_once
        #: The connection as its commands see it.
        self.context = Context(services.shared, self._connection, peer, access, self._send_events)
        if address := stream.socket.getsockname():
            services.shared.addresses.add(address)
        # When the client connected, or was last found active.
        self._since = trio.current_time() - idle
        self._connected_at = self._since
        self._state = SessionState.SERVING
        self._scope = trio.CancelScope()
        #: Sends replies and events.
        self.send_buffer = SendBuffer(services, stream, peer, self.context, self._on_drained)
        #: Closes removed descriptors, and charges the client's user for undelivered ones.
        self.fd_accounting = FdAccounting(services, self._connection, self.send_buffer, peer.uid)
        #: Executes the requests.
        self.processor = RequestProcessor(
            services,
            self._connection,
            self.context,
            self.send_buffer,
            self.fd_accounting,
            self._park,
        )

    async def serve(self) -> SessionEnd:
        """Serve the client until it disconnects, asks for a takeover, or the daemon stops.  The
        caller has to call :meth:`aclose` after that.
        """
        with self._scope:
            if self._connection.state is State.CONNECTED:
                self.send_buffer.enqueue(Unsent(self._connection.greeting(VERSION)))
            await self.send_buffer.drain()
            return await self._serve()
        if self._state is SessionState.EVICTED:
            return SessionEnd.CLOSED
        # finish() was called: execute what the client has sent so far.
        self._move(Event.INPUT)
        return await self._serve_rest()

    async def aclose(self) -> None:
        """Close the connection, its named descriptors, and those with lifetime "connection"."""
        self._services.reader.forget(self.stream.socket.fileno())
        self.processor.close()
        self._services.close_stream(self.stream, self.peer.uid)
        self._connection.close()
        self.fd_accounting.update_undelivered()
        with trio.move_on_after(LOCK_TIMEOUT, shield=True):
            await self._remove_owned()
        self.fd_accounting.close_after_sync()

    async def _remove_owned(self) -> None:
        """Remove the connection's own descriptors in steps: there may be thousands."""
        more = True
        while more:
            async with self._services.locked():
                more = self.context.close(CLOSES_A_STEP)
            while self._connection.fds_to_close:
                self.fd_accounting.close_after_sync(CLOSES_A_STEP)
                if more or self._connection.fds_to_close:
                    await trio.lowlevel.checkpoint()

    def finish(self) -> None:
        """End once everything that the client has sent is answered."""
        if self._state is SessionState.WAITING:
            self._scope.cancel()

    def _move(self, event: Event) -> None:
        self._state = TRANSITIONS[self._state, event]

    def about(self, now: float) -> Client:
        """The client as ``query-stats`` shows it."""
        return Client(
            self.peer,
            now - self._connected_at,
            self.idle(now),
            self.context.fd_count,
            self.context.events is not None,
        )

    def idle(self, now: float) -> float:
        """Seconds since the last request, or since the client connected."""
        return 0.0 if self.processor.active_since_check else now - self._since

    def evict_if_idle(self, now: float) -> None:
        """Disconnect a client that has not negotiated in time, or has been idle for too long."""
        if self._state is SessionState.EVICTED:
            return
        if self.processor.active_since_check:
            self._since, self.processor.active_since_check = now, False
        if self._connection.state is not State.COMMANDS:
            limit: float | None = NEGOTIATION_TIMEOUT
            desc = f"No 'qmp_capabilities' within {NEGOTIATION_TIMEOUT:g} s"
        else:
            waits = self._state is SessionState.WAITING and self.processor.state is BatchState.SENT
            if not waits or self.context.events is not None:
                return
            limit = self._services.shared.limits.idle_timeout
            desc = f"Idle for more than {limit} s"
        if limit is not None and now - self._since > limit:
            _log.info("evicted pid %d, uid %d: %s", self.peer.pid, self.peer.uid, desc)
            self._move(Event.EVICT)
            if not self.send_buffer.size:  # else the error would cut a reply in two
                with suppress(trio.BrokenResourceError):
                    self.stream.send_nowait(rejection_reply(GenericError(desc)))
            self._scope.cancel()

    # -- takeover ------------------------------------------------------------------------------

    @property
    def is_quiescent(self) -> bool:
        """Whether the session has stopped, in a paused daemon, and can be handed over."""
        return self._state in (SessionState.WAITING, SessionState.PAUSED)

    async def _park(self) -> None:
        """Wait while the daemon is paused."""
        self._move(Event.PAUSE)
        await self._services.lifecycle.wait_running()
        self._move(Event.RESUME)
        await self.send_buffer.drain()

    def refuse_takeover(self, reason: QMPError) -> None:
        """Answer the request for a takeover with an error, without waiting: another takeover may be
        under way.  A successor reads its replies.
        """
        reply = self.processor.refuse(*self.processor.unfinished_request, reason)
        if not self.send_buffer.size:
            with suppress(trio.BrokenResourceError):
                self.stream.send_nowait(reply)

    async def reply_to_takeover(self, memory: Fd, lifeline: Fd) -> None:
        """Answer the request for a takeover, passing the daemon's state and a lifeline."""
        _, request_id = self.processor.unfinished_request
        reply = self._connection.reply(Value(NOTHING), request_id)
        await self.stream.send_all(reply, [memory, lifeline])

    def release(self) -> None:
        """Close our duplicates after a takeover, without shutdown(2): the successor serves the
        client.
        """
        self.processor.close()
        self.context.close()
        self._connection.close()
        fds_to_close = self._connection.fds_to_close
        self._services.shared.closer.close_duplicates(fds_to_close)
        fds_to_close.clear()

    # -- requests ------------------------------------------------------------------------------

    async def _serve(self) -> SessionEnd:
        """Do one bounded piece of work after the other; the event loop runs between two of them.

        The reader does light pieces.  After one that leaves work over, or two in a row that take
        long, the next piece is done in the gate, a FIFO lock that admits one client in each pass of
        the loop.
        """
        services, stream, context = self._services, self.stream, self.context
        if self.processor.unfinished:  # requests that a predecessor has read and not executed
            await self.processor.process()
        piece = _Piece()
        while True:  # noqa: ASYNC913 - each way round has a checkpoint
            if piece.arrival is not Arrival.SOME and services.lifecycle.stopping:
                return await self._serve_rest()
            if not piece.heavy:
                self._move(Event.WAIT)
                left_over = await services.reader.serve(stream.socket.fileno(), self._serve_chunk)
                if left_over is None:  # two slow pieces in a row
                    self._move(Event.INPUT)
                    left_over = _Piece(heavy=True)
                piece = left_over
            else:
                if piece.arrival is not Arrival.SOME:
                    self._move(Event.WAIT)
                    await stream.wait_readable()
                    self._move(Event.INPUT)
                if services.lifecycle.paused:
                    await self._park()
                async with services.gate, services.locked():
                    if not services.lifecycle.paused:
                        piece = self._serve_chunks(services.turn_ends())
            if not piece.done:
                await self.processor.process()
            if context.ending is Ending.TAKEOVER:
                return SessionEnd.TAKEOVER
            if context.ending is Ending.QUIT or piece.arrival is Arrival.END:
                return SessionEnd.CLOSED

    def _serve_chunk(self, now: float) -> _Piece | None:
        """Do a light piece, for the reader; return None if nothing is left to do."""
        arrival = self.stream.receive_nowait(self._connection, LIGHT_BYTES, self._max_fds)
        done = self.processor.process_nowait(now + LIGHT_SECONDS)
        if done and (arrival is _ALL or arrival is _NOTHING):
            return None
        self._move(Event.INPUT)
        return _Piece(arrival, done, arrival is Arrival.SOME or self.processor.unfinished)

    def _serve_chunks(self, ends: float) -> _Piece:
        """Do a heavy piece: read and execute until *ends* (time.monotonic())."""
        arrival, done = Arrival.SOME, True
        while arrival is Arrival.SOME and done and monotonic() < ends:
            arrival = self.stream.receive_nowait(self._connection, READ_BYTES, self._max_fds)
            done = self.processor.process_nowait(ends)
            self._services.durability.push()  # the next batch waits for the acknowledgement
        heavy = monotonic() > ends or arrival is Arrival.SOME or self.processor.unfinished
        return _Piece(arrival, done, heavy)

    async def _serve_rest(self) -> SessionEnd:
        """Execute what the client has sent so far; nothing that comes later."""
        arrival = Arrival.SOME
        while arrival not in (Arrival.NOTHING, Arrival.END):
            arrival = self.stream.receive_nowait(self._connection)
            # With a checkpoint, so that a client that sends without end delays neither others nor
            # the end.
            async with self._services.gate, self._services.locked():
                done = self.processor.process_nowait(self._services.turn_ends())
            if not done:
                await self.processor.process()
            if self.context.ending is Ending.TAKEOVER:
                return SessionEnd.TAKEOVER  # which is refused
            if self.context.ending is Ending.QUIT:
                break
        return SessionEnd.CLOSED

    # -- events --------------------------------------------------------------------------------

    def _send_events(self) -> bool:
        """Send some of the pending events; return whether more can be sent at once."""
        events, processor = self.context.events, self.processor
        if events is None or self._services.lifecycle.paused:
            return False
        if self.send_buffer.size or processor.is_busy:
            return False  # _on_drained asks again
        data = events.next_batch()
        return bool(data) and processor.send_events(data)

    def _on_drained(self) -> None:
        """Callback of the send buffer, which has become empty."""
        if self.fd_accounting.undelivered:
            self.fd_accounting.update_undelivered()
        if self.context.events is not None and self.context.events.is_behind:
            self._services.shared.on_event()
