"""Carries out what one client asks for: requests in, replies to its send buffer."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from functools import partial
from time import monotonic
from typing import Any

from msgspec import UNSET
from outcome import Error, Outcome

from ...commands import Context, Ending, execute
from ...errors import QMPError
from ...limits import MAX_FDS_A_TURN, REPLY_BYTES_A_TURN
from ...protocol.server import ServerConnection
from ...protocol.streamed_reply import StreamedReply
from ..durability import Unproven
from ..services import Services
from .command_log import note
from .delivery import Delivery
from .send_buffer import OPEN, SendState, Unsent

_log = logging.getLogger("qmpfd")
_TAKEOVER = Ending.TAKEOVER  # found faster than a member of an enumeration


class RequestProcessor:
    """One client's requests, and what they come to.

    Each batch of them is carried out in one critical section, without an await, then what it has
    removed is closed, and only then the replies go to the send buffer.

    Args:
        services: what the daemon gives.
        connection: where the requests are.
        context: the connection as its commands see it.
        delivery: closes what was removed, and sends the replies.
        park: waits while the daemon is paused.
    """

    def __init__(
        self,
        services: Services,
        connection: ServerConnection,
        context: Context,
        delivery: Delivery,
        park: Callable[[], Awaitable[None]],
    ) -> None:
        self._services = services
        self._durability = services.durability
        self._verbose = _log.isEnabledFor(logging.DEBUG)
        self._connection = connection
        self._context = context
        self._delivery = delivery
        self._send_buffer = delivery.send_buffer
        self._fd_accounting = delivery.fd_accounting
        self._park = park
        #: A request was carried out, since somebody last looked.
        self.active_since_check = False
        #: Of the request that asked for a takeover.
        self.takeover_id: Any = UNSET
        #: A reply that is sent while it is made, until all of it is.
        self.streamed_reply: StreamedReply | None = None
        # What goes to the send buffer once what was removed is closed: up to the last reply that
        # carries descriptors, each of these by itself, as they arrive with its first byte; and all
        # replies behind that.
        self._replies: list[Unsent] = []
        self._unproven: Unproven | None = None  # likewise of the reply in progress
        self._text = b""

    @property
    def unfinished(self) -> bool:
        """Whether there is a reply in progress, or a request that has come and is not carried out:
        where the daemon is paused, or was when a predecessor handed over.
        """
        return self.streamed_reply is not None or self._connection.has_pending_input

    def process_nowait(self, ends: float) -> bool:
        """Carry out the requests that are complete, and send the replies.  The caller holds the
        store's lock.

        Args:
            ends: when the others are to have their turn (time.monotonic()).

        Returns:
            Whether that was all; else :meth:`process` has to go on.
        """
        send_buffer = self._send_buffer
        if send_buffer.state is not OPEN and send_buffer.uncommitted:
            return False
        finished = self._execute_batch(ends)
        if not (self._flush_replies() and finished):
            return False
        if send_buffer.state is not SendState.UNCOMMITTED:
            return not send_buffer.size
        if send_buffer.unsent:
            return False
        # No task waits for that: it would cost passes of the loop with each command.
        on_synced = partial(self._delivery.on_synced, send_buffer.changes)
        self._durability.on_synced(on_synced)
        return True

    async def process(self) -> None:
        """Go on with what is under way, and carry out all that is complete, however long it takes;
        between two batches, others have their turns.
        """
        services, context = self._services, self._context
        while True:
            await self._finish_batch()
            if context.ending or not self._connection.ready:
                return
            if services.lifecycle.paused:
                await self._park()
            async with services.gate:
                if not services.lifecycle.paused:
                    async with services.locked():
                        self._execute_batch(services.turn_ends())

    def _execute_batch(self, ends: float) -> bool:
        """Carry out requests: all there are, or until it is time to send the replies.

        Returns:
            Whether that was all, and needs nothing but to be sent.
        """
        connection, context, durability = self._connection, self._context, self._durability
        durability.unproven = None
        ready = connection.ready
        discarding = self._send_buffer.state is not OPEN and self._send_buffer.discarding
        replies: list[bytes] = []
        size = 0
        while received := connection.next_request():
            request, request_id, fds = received
            result: Outcome[object]
            if type(request) is Error:
                result = request
            else:
                result = execute(context, request, fds)
                self.active_since_check = True
            if self._verbose or type(result) is Error:
                note(context.shared.stats, context.peer, request, result)
            ending = context.ending
            if ending is _TAKEOVER:
                self.takeover_id = request_id
                break
            # Nobody reads the reply to a client that is sent nothing any more.
            reply = b"" if discarding else connection.answer(result, request_id)
            if isinstance(reply, StreamedReply):
                self.streamed_reply = reply
                self._unproven, durability.unproven = durability.unproven, None
                break
            if context.reply_fds or durability.unproven is not None:
                reply_fds, taken, unproven = context.reply_fds, context.taken, durability.unproven
                refusal = partial(self._refusal, request_id)
                self._replies += (
                    Unsent(b"".join(replies), []),
                    Unsent(reply, reply_fds, refusal, taken, unproven),
                )
                size += REPLY_BYTES_A_TURN // MAX_FDS_A_TURN * len(reply_fds)
                replies, context.reply_fds = [], []
                context.taken = durability.unproven = None
            else:
                replies.append(reply)
            if not ready or ending is not None:
                break
            size += len(reply)
            if size > REPLY_BYTES_A_TURN or monotonic() > ends:
                break
        self._text = b"".join(replies)
        return not (ready or context.ending or self.streamed_reply)

    def _refusal(self, request_id: Any, error: QMPError) -> bytes:
        """The reply where the command has failed after all."""
        return self._connection.reply(Error(error), request_id)

    def _flush_replies(self) -> bool:
        """Close what was removed, then send the replies; whether that was possible without
        waiting.
        """
        send_buffer, connection, context = self._send_buffer, self._connection, self._context
        fd_accounting = self._fd_accounting
        if context.touched_store:
            context.touched_store = False
            if not (self._durability.is_synced or self._services.reader.sync_nowait()):
                send_buffer.begin_uncommitted()
        if send_buffer.state is not OPEN and send_buffer.uncommitted:
            if send_buffer.discarding:
                return False
        elif (connection.fds_to_close or fd_accounting.closings) and not fd_accounting.close_some():
            # What is removed is closed once its client has read so: a whole set is left, or what
            # threads close.
            return False
        if self._replies:
            for reply in self._replies:
                send_buffer.enqueue(*reply)
            self._replies.clear()
        send_buffer.write(self._text)
        self._text = b""
        if (
            fd_accounting.undelivered
            or send_buffer.unsent_fds
            or send_buffer.in_flight
            or connection.pending_fds.fds
            or connection.ready
        ):
            fd_accounting.update_undelivered()
        return True

    async def _finish_batch(self) -> None:
        """Have all replies of a batch sent, however long it takes."""
        send_buffer = self._send_buffer
        while not self._flush_replies():
            if not send_buffer.uncommitted:
                await self._fd_accounting.close_all(len(self._connection.fds_to_close))
            elif self._services.lifecycle.paused:  # the client is sent nothing any more
                await self._park()
            else:
                await self._delivery.sync()
        await send_buffer.drain()
        while self.streamed_reply is not None:
            await self._stream_reply(self.streamed_reply)
            send_buffer.on_drained()

    async def _stream_reply(self, reply: StreamedReply) -> None:
        """Send a reply while it is made; meanwhile others are served, and the store changes.  No
        event comes in between.
        """
        services, send_buffer, context = self._services, self._send_buffer, self._context
        chunks = iter(reply)
        while self.streamed_reply is reply:
            if services.lifecycle.paused:  # a successor goes on from here
                await self._park()
            made: list[bytes] = []
            size = 0
            async with services.gate:
                if services.lifecycle.paused:
                    continue
                ends = services.turn_ends()
                async with services.locked():
                    for chunk in chunks:
                        made.append(chunk)
                        size += len(chunk)
                        if size > REPLY_BYTES_A_TURN or monotonic() > ends:
                            break
                    else:
                        self.streamed_reply = None
            if size:
                fds, taken, unproven = context.reply_fds, context.taken, self._unproven
                context.reply_fds, context.taken, self._unproven = [], None, None
                if not services.durability.is_synced:
                    send_buffer.begin_uncommitted()
                may_fail = fds or unproven is not None
                refusal = partial(self._refuse_streamed, reply) if may_fail else None
                send_buffer.enqueue(b"".join(made), fds, refusal, taken, unproven)
            await send_buffer.drain()
            if send_buffer.discarding:
                self.streamed_reply = None

    def _refuse_streamed(self, reply: StreamedReply, error: QMPError) -> bytes:
        """Likewise for a reply that was being sent while it was made: nothing of it has gone, and
        its error is sent the same way.
        """
        request_id = reply.members.get("id", UNSET)
        self.streamed_reply = self._connection.streamed_reply(Error(error), request_id)
        return b""

    def close(self) -> None:
        """The connection is over: nothing is done about replies that were still to be sent, but
        about their descriptors.
        """
        context = self._context
        self._replies.append(Unsent(b"", context.reply_fds, None, context.taken))
        self._send_buffer.drop(self._replies)
        self._replies.clear()
        self.streamed_reply = None
        context.reply_fds, context.taken = [], None
