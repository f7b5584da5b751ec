"""Carries out what one client asks for: requests in, replies to its send_buffer."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterator
from time import monotonic
from typing import Any, TypeAlias

from msgspec import UNSET
from outcome import Error, Outcome

from ...commands import Context, execute
from ...kernel.fd import Fd
from ...limits import MAX_FDS_A_TURN, REPLY_BYTES_A_TURN
from ...protocol import ServerConnection
from ...protocol.streamed_reply import StreamedReply
from ..services import Services
from .command_log import note
from .fd_accounting import FdAccounting
from .send_buffer import SendBuffer
from .turns import Share

_log = logging.getLogger("qmpfd")
_VERBOSE = logging.DEBUG

#: Bytes to send in one go, and the descriptors that go with the first of them.
_Batch: TypeAlias = "tuple[bytes, list[Fd]]"


class RequestProcessor:
    """One client's requests, and what they come to.

    Each chunk of them is carried out in one critical section, without an await, then what it has
    removed is closed, and only then the replies go to the send_buffer.

    Args:
        services: what the daemon gives.
        connection: where the requests are.
        context: the connection as its commands see it.
        send_buffer: where the replies go.
        fd_accounting: what closes what was removed.
        share: the client's share of time.
        settle: waits until all that was changed is safe.
        park: waits until the daemon is not paused any more.
    """

    def __init__(
        self,
        services: Services,
        connection: ServerConnection,
        context: Context,
        send_buffer: SendBuffer,
        fd_accounting: FdAccounting,
        share: Share,
        settle: Callable[[], Awaitable[None]],
        park: Callable[[], Awaitable[None]],
    ) -> None:
        self._services = services
        self._connection = connection
        self._context = context
        self._outbox = send_buffer
        self._leftovers = fd_accounting
        self._share = share
        self._settle = settle
        self._park = park
        self._lock = services.lock
        #: Something was asked, since somebody last looked.
        self.asked = False
        #: Of the request that asked for a takeover.
        self.takeover_id: Any = UNSET
        #: A reply that is sent bit by bit, until all of it is.
        self.long_reply: StreamedReply | None = None
        # Replies that go to the send_buffer once what was removed is closed.  One that carries
        # descriptors begins a batch: they arrive with its first byte, and so with that reply and no
        # other.
        self._batches: list[_Batch] = []

    @property
    def unfinished(self) -> bool:
        """Whether there is a reply in progress, or a request that has come and is not carried out:
        where the daemon is paused, or was when a predecessor handed over.
        """
        return self.long_reply is not None or self._connection.has_pending_input

    def give_nowait(self, at_once: bool) -> bool:
        """Carry out the requests that are complete; the replies are to be sent.

        Args:
            at_once: or are sent, as far as the client takes them.

        Returns:
            Whether that was all; else :meth:`give` has to go on.
        """
        if self._lock.locked():  # by somebody who waits for something meanwhile
            return False
        # And nobody gets a turn before this is over: there is no await in it.
        self._carry_out()
        if not self._tell_nowait(at_once):
            return False
        return self.long_reply is None and not self._connection.has_pending_input

    async def give(self) -> None:
        """Go on with what is under way, and carry out all that is complete, however long it takes;
        between two chunks, others have their turn.
        """
        context, send_buffer, share = self._context, self._outbox, self._share
        while True:
            await self._tell()
            if context.quitting or context.takes_over or not self._connection.has_pending_input:
                return
            await send_buffer.send(share)
            if share.over or send_buffer.deaf:  # perhaps with a thousand others
                await share.next_turn()
            if self._services.lifecycle.paused:
                await self._park()
            if self._lock.locked():
                async with self._lock:
                    self._carry_out()
            else:
                self._carry_out()

    def _carry_out(self) -> None:
        """Carry out requests: all there are, or until it is time to send the replies."""
        connection, context, ends = self._connection, self._context, self._share.ends
        deaf, verbose = self._outbox.deaf, _log.isEnabledFor(_VERBOSE)
        batches = self._batches
        replies: list[bytes] = []
        size = passed = 0
        asked = False
        result: Outcome[object]
        for request, request_id, fds in connection.requests():
            if type(request) is Error:
                result = request
            else:
                result = execute(context, request, fds)
                asked = True
            if verbose or type(result) is Error:
                note(context.shared.stats, context.peer, request, result)
            if context.takes_over:
                self.takeover_id = request_id
                break
            # Nobody reads what a deaf client is told.
            reply = b"" if deaf else connection.answer(result, request_id)
            if not isinstance(reply, bytes):
                self.long_reply = reply
                break
            size += len(reply)
            if context.reply_fds:
                batches += (b"".join(replies), []), (reply, context.reply_fds)
                passed += len(context.reply_fds)
                replies, context.reply_fds = [], []
                if passed > MAX_FDS_A_TURN:
                    break
            else:
                replies.append(reply)
            if monotonic() > ends or context.quitting or size > REPLY_BYTES_A_TURN:
                break
        batches.append((b"".join(replies), []))
        if asked:
            self.asked = True

    def _tell_nowait(self, at_once: bool = False) -> bool:
        """Close what was removed, and put the replies into the send buffer; whether that was
        possible without waiting.

        Args:
            at_once: send them, as far as the client takes them.
        """
        send_buffer, fds_to_close = self._outbox, self._connection.fds_to_close
        if self._context.touched_store:
            self._context.touched_store = False
            if not self._services.durability.is_synced:
                send_buffer.hold()
        if send_buffer.unsafe:
            if send_buffer.deaf:
                return False
        elif fds_to_close or self._leftovers.closings:
            # Before the replies: what is removed is closed once its client has read so.
            self._leftovers.close_some()
            if fds_to_close or self._leftovers.closings:  # a whole set; what threads close
                return False
        batches = self._batches
        if at_once and len(batches) == 1:  # nothing goes with it
            send_buffer.tell(batches[0][0])
        else:
            for data, fds in batches:
                send_buffer.put(data, fds)
        batches.clear()
        if self._leftovers.some_wait:
            self._leftovers.count_waiting()
        return True

    async def _tell(self) -> None:
        """The same, however long it takes; and a reply that is sent bit by bit."""
        send_buffer = self._outbox
        while not self._tell_nowait():
            if not send_buffer.unsafe:
                await self._leftovers.close_all(len(self._connection.fds_to_close))
            elif self._services.lifecycle.paused:  # the client is sent nothing any more
                await self._park()
            else:
                await self._settle()
        if self.long_reply is not None:
            await send_buffer.send(self._share)
            await self._send_bit_by_bit(iter(self.long_reply))
            self.long_reply = None
            send_buffer.emptied()

    async def _send_bit_by_bit(self, bits: Iterator[bytes]) -> None:
        """Make a reply bit by bit and send it, while others are served and the store changes.  No
        event comes in between.
        """
        services, send_buffer, share, context = (
            self._services,
            self._outbox,
            self._share,
            self._context,
        )
        more = True
        while more and not send_buffer.deaf:
            made: list[bytes] = []
            size = 0
            await share.next_turn(much=True)
            if services.lifecycle.paused:  # a successor goes on from here
                await self._park()
                continue
            async with services.locked():
                more = False
                for bit in bits:
                    made.append(bit)
                    size += len(bit)
                    if size > REPLY_BYTES_A_TURN or share.over:
                        more = True
                        break
            if size:
                passed, context.reply_fds = context.reply_fds, []
                if not services.durability.is_synced:
                    send_buffer.hold()
                send_buffer.put(b"".join(made), passed)
            await send_buffer.send(share)

    def close(self) -> None:
        """The connection is over: what was still to be sent is closed."""
        for _, fds in self._batches:
            self._connection.fds_to_close += fds
        self._batches.clear()
