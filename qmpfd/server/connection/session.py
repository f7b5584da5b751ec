"""One client: chunks in, commands under the lock, replies and events out."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import suppress
from enum import Enum, auto
from time import monotonic
from typing import NamedTuple

import trio
from outcome import Error, Value

from ...commands import DECODER, NOTHING, VERSION, Client, Context
from ...errors import GenericError, QMPError
from ...fdsets import Peer
from ...kernel.fd import Fd
from ...limits import (
    FEW_BYTES,
    LIGHT_SECONDS,
    LOCK_TIMEOUT,
    NEGOTIATION_TIMEOUT,
    READ_BYTES,
)
from ...policy import Access
from ...protocol import ServerConnection, State
from ...transport import Arrival, FdStream
from ..listen.rejections import rejection_reply
from ..services import Services
from .fd_accounting import CLOSES_A_STEP, FdAccounting
from .request_processor import RequestProcessor
from .saved import SavedSession, SharedParts
from .send_buffer import SendBuffer
from .snapshot import describe, restore, restore_reply

_log = logging.getLogger("qmpfd")


class SessionState(Enum):
    """What a session does."""

    SERVING = auto()  #: it carries out what its client has sent, or sends the replies
    WAITING = auto()  #: it waits for its client, of which nothing is unanswered
    PAUSED = auto()  #: the daemon is paused, and nothing of it is under way
    EVICTED = auto()  #: its client has been idle for too long, is told so and disconnected

    # As of any object: that of Enum is a Python function.
    __hash__ = object.__hash__


class _Event(Enum):
    WAIT = auto()
    INPUT = auto()  # the client has sent something, or is gone
    PAUSE = auto()
    RESUME = auto()
    EVICT = auto()

    __hash__ = object.__hash__


_TRANSITIONS = {
    (SessionState.SERVING, _Event.WAIT): SessionState.WAITING,
    (SessionState.WAITING, _Event.INPUT): SessionState.SERVING,
    (SessionState.SERVING, _Event.PAUSE): SessionState.PAUSED,
    (SessionState.PAUSED, _Event.RESUME): SessionState.SERVING,
    **{(state, _Event.EVICT): SessionState.EVICTED for state in SessionState},
    **{(SessionState.EVICTED, event): SessionState.EVICTED for event in _Event},
}


class _Piece(NamedTuple):
    """What a piece of work leaves over.

    Args:
        arrival: whether more of the client's input waits to be read.
        done: whether all that was read is carried out and the replies are sent.
        heavy: whether the next piece is done in the gate.
    """

    arrival: Arrival = Arrival.ALL
    done: bool = True
    heavy: bool = False


_ALL = Arrival.ALL  # a module's own names are found faster than the members of an enumeration


class SessionEnd(Enum):
    """Why a session serves its client no more."""

    #: The client is gone, was told to go, or the daemon ends.
    CLOSED = auto()
    #: The client asked for a takeover: its connection is for that from here on.
    TAKEOVER = auto()


class Session:
    """Serves one client.

    Args:
        services: what the daemon gives.
        stream: the connection; owned from here on.
        peer: who is at its other end.
        groups: all groups of the peer.
        access: what it may do.
    """

    def __init__(
        self,
        services: Services,
        stream: FdStream,
        peer: Peer,
        groups: frozenset[int],
        access: Access,
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
        self._context = Context(services.shared, self._connection, peer, access, self._send_events)
        if address := stream.socket.getsockname():
            services.shared.addresses.add(address)
        self._since = trio.current_time()  # when it connected, or was last seen to have asked
        self._connected_at = self._since
        self._state = SessionState.SERVING
        self._slow = False  # the last piece took long
        self._scope = trio.CancelScope()
        self.send_buffer = SendBuffer(
            services, stream, peer, self._connection.fds_to_close, self._on_drained, self._sync
        )
        self._fd_accounting = FdAccounting(services, self._connection, self.send_buffer, peer.uid)
        self._syncing = trio.Lock()
        self._sync_scope = trio.CancelScope()
        self._processor = RequestProcessor(
            services,
            self._connection,
            self._context,
            self.send_buffer,
            self._fd_accounting,
            self._sync,
            self._on_synced,
            self._park,
        )
        self._drain_scope: trio.CancelScope | None = None  # while a task of its own sends events

    async def serve(self) -> SessionEnd:
        """Serve the client until it is gone, asks for a takeover, or the daemon ends;
        :meth:`aclose` comes next.
        """
        with self._scope:
            if self._connection.state is State.CONNECTED:
                self.send_buffer.enqueue(self._connection.greeting(VERSION))
            await self.send_buffer.drain()
            return await self._serve()
        if self._state is SessionState.EVICTED:
            return SessionEnd.CLOSED
        # Told to finish: carry out what the client has sent so far.
        self._move(_Event.INPUT)
        return await self._serve_rest()

    async def aclose(self) -> None:
        """Close the connection and all that is kept for its time only."""
        self._services.reader.forget(self.stream.socket.fileno())
        self.send_buffer.discard()
        if self._drain_scope is not None:
            self._drain_scope.cancel()
        self._services.close_stream(self.stream, self.peer.uid)
        self._processor.close()
        self._connection.close()
        self._fd_accounting.update_undelivered()
        with trio.move_on_after(LOCK_TIMEOUT, shield=True):
            await self._remove_owned()
        self._fd_accounting.close_after_sync()

    async def _remove_owned(self) -> None:
        """Take out what was kept for the time of the connection; all of it may be a lot."""
        more = True
        while more:
            async with self._services.locked():
                more = self._context.close(CLOSES_A_STEP)
            while self._connection.fds_to_close:
                self._fd_accounting.close_after_sync(CLOSES_A_STEP)
                if more or self._connection.fds_to_close:
                    await trio.lowlevel.checkpoint()

    def finish(self) -> None:
        """End as soon as all that the client has sent is answered."""
        if self._state is SessionState.WAITING:
            self._scope.cancel()

    def _move(self, event: _Event) -> None:
        self._state = _TRANSITIONS[self._state, event]

    def change_access(self, access: Access) -> None:
        """The policy has changed: what the client may do from now on."""
        self._context.change_access(access)

    def refresh_in_flight(self) -> None:
        """Count no more what the client has received meanwhile."""
        self._fd_accounting.refresh_in_flight()

    def about(self, now: float) -> Client:
        """What others may be told of the client."""
        return Client(
            self.peer,
            now - self._connected_at,
            self._idle(now),
            self._context.fd_count,
            self._context.events is not None,
        )

    def _idle(self, now: float) -> float:
        """Seconds since it connected, or last asked something."""
        return 0.0 if self._processor.active_since_check else now - self._since

    def evict_if_idle(self, now: float) -> None:
        """End if the client has not negotiated in time, or has asked nothing for too long."""
        if self._state is SessionState.EVICTED:
            return
        if self._processor.active_since_check:
            self._since, self._processor.active_since_check = now, False
        if self._connection.state is not State.COMMANDS:
            limit: float | None = NEGOTIATION_TIMEOUT
            desc = f"No 'qmp_capabilities' within {NEGOTIATION_TIMEOUT:g} s"
        else:
            waits = self._state is SessionState.WAITING and not self.send_buffer.uncommitted
            if not waits or self._context.events is not None:
                return
            limit = self._services.shared.limits.idle_timeout
            desc = f"Idle for more than {limit} s"
        if limit is not None and now - self._since > limit:
            _log.info("evicted pid %d, uid %d: %s", self.peer.pid, self.peer.uid, desc)
            self._move(_Event.EVICT)
            with suppress(trio.BrokenResourceError):
                self.stream.send_nowait(rejection_reply(GenericError(desc)))
            self._scope.cancel()

    # -- takeover ------------------------------------------------------------------------------

    @property
    def context(self) -> Context:
        """The connection as its commands see it."""
        return self._context

    @property
    def is_quiescent(self) -> bool:
        """Whether nothing of it is under way, while the daemon is paused."""
        return self._state in (SessionState.WAITING, SessionState.PAUSED)

    async def _park(self) -> None:
        """Wait while the daemon is paused."""
        self._move(_Event.PAUSE)
        await self._services.lifecycle.wait_running()
        self._move(_Event.RESUME)
        await self.send_buffer.drain()

    def pause(self) -> None:
        """The daemon is paused: wait neither for the client, nor for a close, nor for the fd
        store, which may take for ever.
        """
        self.send_buffer.cancel_drain()
        self._fd_accounting.cancel_wait()
        self._sync_scope.cancel()

    def resume(self) -> None:
        """The daemon is no longer paused: see to it that what is unsent is sent."""
        if self.send_buffer.size:
            self._start_drain()

    def refuse_takeover(self, reason: QMPError) -> None:
        """Answer the request for a takeover with an error, without waiting: another takeover may be
        under way.  Who asks for one takes its replies.
        """
        reply = self._connection.reply(Error(reason), self._processor.takeover_id)
        if not self.send_buffer.size:
            with suppress(trio.BrokenResourceError):
                self.stream.send_nowait(reply)

    async def reply_to_takeover(self, memory: Fd) -> None:
        """Answer the request for a takeover, with the daemon's state."""
        reply = self._connection.reply(Value(NOTHING), self._processor.takeover_id)
        await self.stream.send_all(reply, [memory])

    def describe(self, now: float, parts: SharedParts) -> tuple[SavedSession, list[int]]:
        """All that a successor needs to go on, and the numbers of the descriptors.

        Args:
            now: the time, by the daemon's clock.
            parts: where that goes which sessions share.
        """
        saved, fds = describe(
            self.peer,
            self.groups,
            self._idle(now),
            self._context,
            self.send_buffer,
            self._processor.streamed_reply,
            parts,
        )
        return saved, [self.stream.socket.fileno(), *(fd.fileno() for fd in fds)]

    def restore(self, saved: SavedSession, fds: Iterator[Fd]) -> None:
        """Go on where the session of another daemon was.

        Args:
            saved: its state.
            fds: its descriptors but for the connection; as many as there are are taken.
        """
        restore(saved, fds, self._context, self.send_buffer)
        self._since -= saved.idle
        self._connected_at = self._since
        self._fd_accounting.update_undelivered()

    def restore_reply(self, saved: SavedSession, texts: list[str]) -> None:
        """Go on with the reply in progress, once the store is there.

        Args:
            saved: the state.
            texts: what listings are in the middle of.
        """
        if saved.reply is not None:
            self._processor.streamed_reply = restore_reply(saved.reply, self._context, texts)

    def release(self) -> None:
        """Another daemon goes on: let go of all that is the client's, without a word to it."""
        self.send_buffer.discard()
        self._context.close()
        self._connection.close()
        fds_to_close = self._connection.fds_to_close
        self._services.shared.closer.close_duplicates(fds_to_close)
        fds_to_close.clear()

    # -- requests ------------------------------------------------------------------------------

    async def _serve(self) -> SessionEnd:
        """One bounded piece of work after the other; between two of them the loop goes round.

        The reader does them.  A client of which a piece leaves something over, or two in a row take
        long, does the next one in the gate: it lets in one client in each pass of the loop, in the
        order in which they come.  One piece alone may have taken long because the machine did
        something else.
        """
        services, stream, context = self._services, self.stream, self._context
        if self._processor.unfinished:  # from a predecessor: what it has read, and not done
            await self._processor.process()
        piece = _Piece()
        while True:  # noqa: ASYNC913 - each way round has a checkpoint
            if piece.arrival is not Arrival.SOME and services.lifecycle.stopping:
                return await self._serve_rest()
            if not piece.heavy:
                self._move(_Event.WAIT)
                piece = await services.reader.serve(stream.socket.fileno(), self._serve_chunk)
            else:
                if piece.arrival is not Arrival.SOME:
                    self._move(_Event.WAIT)
                    await stream.wait_readable()
                    self._move(_Event.INPUT)
                if services.lifecycle.paused:
                    await self._park()
                async with services.gate, services.locked():
                    if not services.lifecycle.paused:
                        piece = self._serve_chunks(services.turn_ends())
                        services.durability.push()
            if not piece.done:
                await self._processor.process()
            if context.takes_over:
                return SessionEnd.TAKEOVER
            if context.quitting or piece.arrival is Arrival.END:
                return SessionEnd.CLOSED

    def _serve_chunk(self, now: float) -> _Piece | None:
        """Carry out a little of what the client has sent; None if that is all there is to do."""
        ends = now + LIGHT_SECONDS
        max_fds = self._services.shared.quotas.fds_at_once
        arrival = self.stream.receive_nowait(self._connection, FEW_BYTES, max_fds)
        done = self._processor.process_nowait(ends)
        was_slow, self._slow = self._slow, monotonic() > ends
        slow = self._slow and was_slow
        if done and not slow and (arrival is _ALL or arrival is Arrival.NOTHING):
            return None
        self._move(_Event.INPUT)
        heavy = slow or arrival is Arrival.SOME or self._processor.unfinished
        return _Piece(arrival, done, heavy)

    def _serve_chunks(self, ends: float) -> _Piece:
        """Carry out what the client has sent, as much as there is time for in its turn."""
        arrival, done = Arrival.SOME, True
        while arrival is Arrival.SOME and done and monotonic() < ends:
            arrival = self.stream.receive_nowait(
                self._connection, READ_BYTES, self._services.shared.quotas.fds_at_once
            )
            done = self._processor.process_nowait(ends)
        was_slow, self._slow = self._slow, monotonic() > ends
        slow = self._slow and was_slow
        heavy = slow or arrival is Arrival.SOME or self._processor.unfinished
        return _Piece(arrival, done, heavy)

    async def _serve_rest(self) -> SessionEnd:
        """Carry out what has come so far."""
        arrival = Arrival.SOME
        while arrival not in (Arrival.NOTHING, Arrival.END) and not self._context.quitting:
            arrival = self.stream.receive_nowait(self._connection)
            async with self._services.locked():
                done = self._processor.process_nowait(self._services.turn_ends())
            if not done:
                await self._processor.process()
            if self._context.takes_over:
                return SessionEnd.TAKEOVER  # which is refused
        return SessionEnd.CLOSED

    # -- replies and events --------------------------------------------------------------------

    def _send_events(self) -> bool:
        """Send some of the events that wait; whether more of them can be sent at once."""
        events, send_buffer = self._context.events, self.send_buffer
        if events is None or self._services.lifecycle.paused:
            return False
        if send_buffer.size or self._processor.streamed_reply is not None:
            return False  # until the client has taken that
        if not (data := events.next_batch()):
            return False
        if not self._services.durability.is_synced:
            send_buffer.begin_uncommitted()
        send_buffer.enqueue(data)
        try:
            send_buffer.flush_nowait()
        except OSError:
            _log.exception("events could not be sent")
            send_buffer.abort()
        if not (send_buffer.unsent or send_buffer.uncommitted_queue):
            return True
        self._start_drain()
        return False

    def _on_drained(self) -> None:
        """The client has taken what it was sent."""
        if self._fd_accounting.undelivered:
            self._fd_accounting.update_undelivered()
        if self._context.events is not None and self._context.events.is_behind:
            self._services.shared.on_event()

    def _start_drain(self) -> None:
        if self._drain_scope is None:
            self._drain_scope = trio.CancelScope()
            self._services.spawn(self._drain, self._drain_scope)

    async def _drain(self, scope: trio.CancelScope) -> None:
        """Send what is unsent, then end: a connection that is told nothing has no task."""
        try:
            with scope:
                await self.send_buffer.drain()
        except Exception:  # noqa: BLE001 - one client's trouble must not become everybody's
            _log.exception("events could not be sent")
            self.send_buffer.abort()
        finally:
            self._drain_scope = None

    async def _sync(self) -> None:
        """Wait until the fd store has acknowledged all changes so far, close what was removed, and
        let the replies go that waited for it; those that came meanwhile wait for the next time.
        Nothing of that while the daemon is paused.
        """
        async with self._syncing:
            changes, count = self.send_buffer.changes, len(self._connection.fds_to_close)
            if self._services.lifecycle.paused:
                return
            with trio.CancelScope() as self._sync_scope:
                await self._services.durability.sync()
            if self._sync_scope.cancelled_caught:
                return
            await self._fd_accounting.close_all(count)
            if changes == self.send_buffer.changes:
                self.send_buffer.commit()

    def _on_synced(self, changes: int) -> None:
        """The fd store has acknowledged so many changes.  If that is all of them, close what was
        removed, and let the replies go; what takes longer than that is done by a task.
        """
        fd_accounting, send_buffer = self._fd_accounting, self.send_buffer
        if self._services.lifecycle.paused or changes != send_buffer.changes:
            return
        try:
            if self._connection.fds_to_close:
                fd_accounting.close_some()
            waits = self._connection.fds_to_close or fd_accounting.closings
            if not waits:
                send_buffer.commit()
                send_buffer.flush_nowait()
            if waits or send_buffer.size:
                self._start_drain()
        except Exception:  # noqa: BLE001 - one client's trouble must not become everybody's
            _log.exception("replies could not be sent")
            send_buffer.abort()
