"""One client: chunks in, commands under the lock, replies and events out."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import suppress
from enum import Enum, auto
from time import monotonic

import trio
from outcome import Error, Value

from ...commands import DECODER, NOTHING, VERSION, Client, Context
from ...errors import GenericError, QMPError
from ...fdsets import Peer
from ...kernel.fd import Fd
from ...limits import (
    FEW_BYTES,
    HELD_REPLY_BYTES,
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
from .turns import Share

_log = logging.getLogger("qmpfd")


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
        self._context = Context(services.shared, self._connection, peer, access, self._tell)
        self._share = Share(services.turns)
        self._since = trio.current_time()  # when it connected, or was last seen to have asked
        self._connected_at = self._since
        self._farewell: QMPError | None = None  # why it is evicted
        self._scope = trio.CancelScope()
        self._waiting = False  # for the client; nothing of it is unanswered
        self._parked = False  # the daemon is frozen; nothing of the client is under way
        self._events_wait = False  # until the client has taken what it is being sent
        self.send_buffer = SendBuffer(
            services, stream, peer, self._connection.fds_to_close, self._emptied, self._settle
        )
        self._leftovers = FdAccounting(
            services, self._connection, self.send_buffer, self._share, peer.uid
        )
        self._settling = trio.Lock()
        self._sync_scope = trio.CancelScope()
        self._answers = RequestProcessor(
            services,
            self._connection,
            self._context,
            self.send_buffer,
            self._leftovers,
            self._share,
            self._settle,
            self._park,
        )
        self._pump_scope: trio.CancelScope | None = None  # while events are being sent

    async def serve(self) -> SessionEnd:
        """Serve the client until it is gone, asks for a takeover, or the daemon ends;
        :meth:`aclose` comes next.
        """
        with self._scope:
            if self._connection.state is State.CONNECTED:
                self.send_buffer.put(self._connection.greeting(VERSION))
            await self.send_buffer.send()
            return await self._serve()
        if self._farewell is None:
            # Told to finish: carry out what the client has sent so far.
            return await self._serve_rest()
        with suppress(trio.BrokenResourceError):
            self.stream.send_nowait(rejection_reply(self._farewell))
        return SessionEnd.CLOSED

    async def aclose(self) -> None:
        """Close the connection and all that is kept for its time only."""
        self.send_buffer.mute()
        if self._pump_scope is not None:
            self._pump_scope.cancel()
        self._services.close_stream(self.stream, self.peer.uid)
        self._answers.close()
        self._connection.close()
        self._leftovers.count_waiting()
        with trio.move_on_after(LOCK_TIMEOUT, shield=True):
            await self._leave_nothing()
        self._leftovers.dispose()

    async def _leave_nothing(self) -> None:
        """Take out what was kept for the time of the connection; all of it may be a lot."""
        more = True
        while more:
            async with self._services.locked():
                more = self._context.close(CLOSES_A_STEP)
            while self._connection.fds_to_close:
                self._leftovers.dispose(CLOSES_A_STEP)
                if more or self._connection.fds_to_close:
                    await trio.lowlevel.checkpoint()

    def finish(self) -> None:
        """End as soon as all that the client has sent is answered."""
        if self._waiting:
            self._scope.cancel()

    def change_access(self, access: Access) -> None:
        """The policy has changed: what the client may do from now on."""
        self._context.change_access(access)

    def look(self) -> None:
        """Count no more what the client has received meanwhile."""
        self._leftovers.look()

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
        return 0.0 if self._answers.asked else now - self._since

    def evict_if_idle(self, now: float) -> None:
        """End if the client has not negotiated in time, or has asked nothing for too long."""
        if self._farewell is not None:
            return
        if self._answers.asked:
            self._since, self._answers.asked = now, False
        if self._connection.state is not State.COMMANDS:
            limit: float | None = NEGOTIATION_TIMEOUT
            desc = f"No 'qmp_capabilities' within {NEGOTIATION_TIMEOUT:g} s"
        else:
            if not self._waiting or self._context.events is not None:
                return
            limit = self._services.shared.limits.idle_timeout
            desc = f"Idle for more than {limit} s"
        if limit is not None and now - self._since > limit:
            _log.info("evicted pid %d, uid %d: %s", self.peer.pid, self.peer.uid, desc)
            self._farewell = GenericError(desc)
            self._scope.cancel()

    # -- takeover ------------------------------------------------------------------------------

    @property
    def context(self) -> Context:
        """The connection as its commands see it."""
        return self._context

    @property
    def at_rest(self) -> bool:
        """Whether nothing of it is under way, while the daemon is frozen."""
        return self._waiting or self._parked

    async def _park(self) -> None:
        """Wait until the daemon is no longer frozen."""
        self._parked = True
        self._share.pause()
        await self._services.lifecycle.wait_running()
        self._share.resume()
        self._parked = False
        await self.send_buffer.send(self._share)

    def pause(self) -> None:
        """The daemon is paused: wait neither for the client, nor for a close, nor for the second
        copy of the store, which may take for ever.
        """
        self.send_buffer.freeze()
        self._leftovers.freeze()
        self._sync_scope.cancel()

    def thaw(self) -> None:
        """The daemon is no longer frozen: see to it that what is unsent is sent."""
        if self.send_buffer.size:
            self._start_pump()

    def refuse_takeover(self, reason: QMPError) -> None:
        """Answer the request for a takeover with an error, without waiting: another takeover may be
        under way.  Who asks for one takes its replies.
        """
        reply = self._connection.reply(Error(reason), self._answers.takeover_id)
        if not self.send_buffer.size:
            with suppress(trio.BrokenResourceError):
                self.stream.send_nowait(reply)

    async def reply_to_takeover(self, memory: Fd) -> None:
        """Answer the request for a takeover, with the daemon's state."""
        reply = self._connection.reply(Value(NOTHING), self._answers.takeover_id)
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
            self._answers.long_reply,
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
        self._leftovers.count_waiting()

    def restore_reply(self, saved: SavedSession, texts: list[str]) -> None:
        """Go on with the reply in progress, once the store is there.

        Args:
            saved: the state.
            texts: what listings are in the middle of.
        """
        if saved.reply is not None:
            self._answers.long_reply = restore_reply(saved.reply, self._context, texts)

    def leave(self) -> None:
        """Another daemon goes on: let go of all that is the client's, without a word to it."""
        self.send_buffer.mute()
        self._context.close()
        self._connection.close()
        fds_to_close = self._connection.fds_to_close
        self._services.shared.closer.close_duplicates(fds_to_close)
        fds_to_close.clear()

    def abandon(self) -> None:
        """It never began: another daemon has kept it all."""
        self.leave()
        self.stream.close()

    # -- requests ------------------------------------------------------------------------------

    async def _serve(self) -> SessionEnd:
        stream, send_buffer, connection = self.stream, self.send_buffer, self._connection
        answers, context, share = self._answers, self._context, self._share
        daemon, lifecycle = self._services.shared, self._services.lifecycle
        share.resume()  # it was made before, perhaps long before, and with thousands of others
        inherited = answers.unfinished
        while True:
            if monotonic() > share.ends:
                await send_buffer.send(share)
                await share.next_turn()
            if lifecycle.paused:
                await self._park()
            if inherited:  # from a predecessor: what it has read, and not done
                arrival = Arrival.ALL
            else:
                max_bytes = READ_BYTES if share.in_turn else FEW_BYTES
                arrival = stream.receive_nowait(connection, max_bytes, daemon.quotas.fds_at_once)
            more = arrival is Arrival.SOME
            if more and not (connection.has_pending_input or connection.fds_to_close):
                await send_buffer.send(share)
                await share.next_turn(much=True)
                continue
            if arrival not in (Arrival.NOTHING, Arrival.END):
                # While more is there, replies wait: one write for all of them.
                if inherited or not answers.give_nowait(not more):
                    await answers.give()
                inherited = False
                if context.takes_over:
                    await send_buffer.send(share)
                    return SessionEnd.TAKEOVER
                if send_buffer.size and (
                    context.quitting or send_buffer.size > HELD_REPLY_BYTES or not more
                ):
                    send_buffer.push()
                    if send_buffer.size:
                        await send_buffer.send(share)
                if not context.quitting:
                    continue
            if send_buffer.size:
                await send_buffer.send(share)
            if arrival is not Arrival.NOTHING or lifecycle.stopping:
                return SessionEnd.CLOSED
            self._waiting = True
            share.pause()
            await stream.wait_readable()
            share.resume()
            self._waiting = False

    async def _serve_rest(self) -> SessionEnd:
        while not self._context.quitting and self.stream.receive_nowait(self._connection) in (
            Arrival.ALL,
            Arrival.SOME,
        ):
            await self._answers.give()
            if self._context.takes_over:
                return SessionEnd.TAKEOVER  # which is refused
        await self.send_buffer.send()
        return SessionEnd.CLOSED

    # -- replies and events --------------------------------------------------------------------

    def _tell(self) -> bool:
        """Send some of the events that wait; whether more of them can be sent at once."""
        events = self._context.events
        if events is None or self._services.lifecycle.paused:
            return False
        if self.send_buffer.size or self._answers.long_reply is not None:
            self._events_wait = True
            return False
        if not (data := events.next_batch()):
            return False
        if not self._services.durability.is_synced:
            self.send_buffer.hold()
        self.send_buffer.put(data)
        try:
            self.send_buffer.push()
        except OSError:
            _log.exception("events could not be sent")
            self.send_buffer.cut_off()
        if not (self.send_buffer.unsent or self.send_buffer.held):
            return True
        self._events_wait = True
        self._start_pump()
        return False

    def _emptied(self) -> None:
        """The client has taken what it was sent."""
        if self._leftovers.waiting:
            self._leftovers.count_waiting()
        if self._events_wait:
            self._events_wait = False
            self._services.shared.on_event()

    def _start_pump(self) -> None:
        if self._pump_scope is None:
            self._pump_scope = trio.CancelScope()
            self._services.spawn(self._pump, self._pump_scope)

    async def _pump(self, scope: trio.CancelScope) -> None:
        """Send what is unsent, then end: a connection that is told nothing has no task."""
        try:
            with scope:
                await self.send_buffer.send()
        except Exception:  # noqa: BLE001 - as in run
            _log.exception("events could not be sent")
            self.send_buffer.cut_off()
        finally:
            self._pump_scope = None

    async def _settle(self) -> None:
        """Wait until all that is held may be told, and close what was removed; what is held
        meanwhile is for whoever holds it.  Nothing of that while the daemon is paused.
        """
        async with self._settling:
            holds, count = self.send_buffer.holds, len(self._connection.fds_to_close)
            if self._services.lifecycle.paused:
                return
            with trio.CancelScope() as self._sync_scope:
                await self._services.durability.sync()
            if self._sync_scope.cancelled_caught:
                return
            await self._leftovers.close_all(count)
            if holds == self.send_buffer.holds:
                self.send_buffer.release()
