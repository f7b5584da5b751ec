"""Executes one client's requests, and hands the replies to its send buffer."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from enum import Enum, auto
from functools import partial
from time import monotonic
from typing import Any

import trio
from msgspec import UNSET
from outcome import Error, Outcome

from ...commands import Context, Ending, execute
from ...errors import QMPError
from ...limits import MAX_FDS_A_TURN, REPLY_BYTES_A_TURN
from ...protocol.request_decoder import Request
from ...protocol.server import ServerConnection
from ...protocol.streamed_reply import StreamedReply
from ..durability import Unproven
from ..services import Services, held
from .command_log import note
from .fd_accounting import FdAccounting
from .send_buffer import SendBuffer, Unsent

_log = logging.getLogger("qmpfd")
# A local name: an Enum member takes 0.16 us before Python 3.12, and a command 20 us.
_TAKEOVER = Ending.TAKEOVER


class BatchState(Enum):
    """State of the last batch's replies."""

    SENT = auto()  #: they are in the send buffer
    COMMITTING = auto()  #: they wait for the fd store: a crash would take their changes back
    CLOSING = auto()  #: they wait until the removed descriptors are closed

    # Hash by identity: Enum.__hash__ is a Python function, and slow as a dict key.
    __hash__ = object.__hash__


_SENT, _COMMITTING, _CLOSING = BatchState

#: The transitions, a table for each event; the first by whether the fd store has to acknowledge
#: changes of the batch.
_ON_EXECUTED = {(_SENT, False): _CLOSING, (_SENT, True): _COMMITTING}
_ON_ACKNOWLEDGED = {_COMMITTING: _CLOSING}
_ON_CLOSED = {_CLOSING: _SENT}
_ON_END = dict.fromkeys(BatchState, _SENT)


class RequestProcessor:
    """The requests of one client, executed in batches.

    A batch is executed in one critical section, without an await.  Then the fd store acknowledges
    its changes, the descriptors it has removed are closed, and only then its replies go to the send
    buffer.  The next batch starts after that.

    Args:
        services: the daemon's services.
        connection: the protocol core, which has the requests.
        context: the connection as the commands see it.
        send_buffer: sends the replies.
        fd_accounting: closes removed descriptors.
        park: waits while the daemon is paused.
    """

    def __init__(
        self,
        services: Services,
        connection: ServerConnection,
        context: Context,
        send_buffer: SendBuffer,
        fd_accounting: FdAccounting,
        park: Callable[[], Awaitable[None]],
    ) -> None:
        self._services = services
        self._durability = services.durability
        self._verbose = _log.isEnabledFor(logging.DEBUG)
        self._connection = connection
        self._context = context
        self._send_buffer = send_buffer
        self._fd_accounting = fd_accounting
        self._park = park
        #: State of the last batch.
        self.state = _SENT
        self._finishing = trio.Lock()
        self._sync_scope = trio.CancelScope()
        self._task_scope: trio.CancelScope | None = None  # of the task that finishes a batch
        #: Whether a request was executed since the session's last check for idleness.
        self.active_since_check = False
        #: The request, and its id, that asked for a takeover, or whose reply is in progress.
        self.unfinished_request: tuple[Request | Error | None, Any] = None, UNSET
        #: A long reply in progress, sent chunk by chunk as it is encoded.
        self.streamed_reply: StreamedReply | None = None
        # The replies that are not in the send buffer yet: up to the last one that carries
        # descriptors, each of these by itself, as they go with its first byte; then the text of all
        # others.
        self._replies: list[Unsent] = []
        self._text = b""
        self._unproven: Unproven | None = None  # of the reply in progress

    @property
    def unfinished(self) -> bool:
        """Whether a reply is in progress, or a received request is not executed: because the daemon
        is paused, or the predecessor was when it handed the session over.
        """
        return self.streamed_reply is not None or bool(self._connection.ready)

    @property
    def is_busy(self) -> bool:
        """Whether replies have to be sent before anything else."""
        return self.state is not _SENT or self.streamed_reply is not None

    def process_nowait(self, ends: float) -> bool:
        """Execute complete requests and send the replies.  The caller holds the store's lock.

        Args:
            ends: when to stop, for the other clients' sake (time.monotonic()).

        Returns:
            Whether nothing is left to do; else :meth:`process` has to go on.
        """
        if self.state is not _SENT:
            return False
        finished = self._execute_batch(ends)
        if self.state is _COMMITTING:
            if not finished or self._send_buffer.unsent:
                return False
            # A callback, no waiting task: a task would cost passes of the loop with each command.
            self._durability.on_synced(self._on_synced)
            return True
        return self._flush_replies() and finished and not self._send_buffer.size

    async def process(self) -> None:
        """Finish the batch or reply in progress, and execute all complete requests, however long
        that takes.  Other clients are served between two batches.
        """
        services, context = self._services, self._context
        while True:
            await self._finish_batch()
            reply = self.streamed_reply
            sent = self.state is _SENT and reply is None
            if sent and (context.ending or not self._connection.ready):
                return
            if services.lifecycle.paused:
                await self._park()
            elif reply is not None:
                await self._stream_reply(reply)
            else:
                async with services.gate, services.locked():
                    # Events, a batch as well, may have been queued while this waited.
                    if self.state is _SENT and not services.lifecycle.paused:
                        self._execute_batch(services.turn_ends())

    def send_events(self, data: bytes) -> bool:
        """Send events as a batch of their own, while no other is under way; return whether the
        client has taken them.
        """
        self._text = data
        waits = not self._durability.is_synced
        self.state = _ON_EXECUTED[self.state, waits]
        if waits:
            self._durability.on_synced(self._on_synced)
            self._durability.push()
            return False
        return self._go_on()

    def _execute_batch(self, ends: float) -> bool:
        """Execute complete requests until none is left, *ends* has passed, or the replies are long.

        Returns:
            Whether none is left, and the replies only have to be sent.
        """
        connection, context, durability = self._connection, self._context, self._durability
        durability.unproven = None
        ready, discarding = connection.ready, self._send_buffer.discarding
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
                note(context.shared, context.peer, request, result)
            ending = context.ending
            if ending is _TAKEOVER:
                self.unfinished_request = request, request_id
                break
            # A client that does not read gets no replies; its requests are executed all the same.
            reply = b"" if discarding else connection.answer(result, request_id)
            if isinstance(reply, StreamedReply):
                self.streamed_reply, self.unfinished_request = reply, (request, request_id)
                self._unproven, durability.unproven = durability.unproven, None
                break
            if context.reply_fds or durability.unproven is not None:
                reply_fds, taken, unproven = context.reply_fds, context.taken, durability.unproven
                refusal = partial(self.refuse, request, request_id)
                self._replies += (
                    Unsent(b"".join(replies)),
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
        waits = context.touched_store and not durability.is_synced
        context.touched_store = False
        self.state = _ON_EXECUTED[self.state, waits]
        return not (ready or context.ending or self.streamed_reply)

    def refuse(
        self,
        request: Request | Error | None,
        request_id: Any,
        error: QMPError,
        streamed: bool = False,
    ) -> bytes:
        """Return the error reply for a command that has failed after its execution.

        Args:
            request: the command; None if a predecessor has executed it.
            request_id: its id.
            error: why it has failed.
            streamed: whether its reply is in progress, and nothing of it was sent: the error, which
                may be long as well, replaces that reply, and nothing is returned.
        """
        result = Error(error)
        note(self._context.shared, self._context.peer, request, result)
        if not streamed:
            return self._connection.reply(result, request_id)
        self.streamed_reply = self._connection.streamed_reply(result, request_id)
        return b""

    def _flush_replies(self) -> bool:
        """Close removed descriptors, then send the replies; return False where a close has to be
        waited for first.
        """
        send_buffer, connection = self._send_buffer, self._connection
        fd_accounting = self._fd_accounting
        if (connection.fds_to_close or fd_accounting.closings) and not fd_accounting.close_some():
            # Removed descriptors are closed before the reply is sent: more are left than one step
            # closes, as of a whole fd set, or threads are closing some.
            return False
        self.state = _ON_CLOSED[self.state]
        if self._replies:
            for reply in self._replies:
                send_buffer.enqueue(reply)
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

    def _on_synced(self) -> None:
        """Callback of the fd store, which has acknowledged the changes of the last batch."""
        if self.state is not _COMMITTING or self._finishing.locked() or self._paused:
            return
        self.state = _ON_ACKNOWLEDGED[self.state]
        if self._go_on():
            self._send_buffer.on_drained()

    def _go_on(self) -> bool:
        """Flush the replies for a caller that serves other clients as well, and so must neither
        wait nor fail: a task does the rest.  Return whether the client has taken everything.
        """
        try:
            if self._flush_replies() and not self._send_buffer.size:
                return True
            self._start_task()
        except Exception:  # noqa: BLE001 - one client's trouble must not become everybody's
            _log.exception("replies could not be sent")
            self._send_buffer.abort()
        return False

    def _start_task(self) -> None:
        """Start a task that finishes the batch."""
        if self._task_scope is None:
            self._task_scope = trio.CancelScope()
            self._services.spawn(self._run_task, self._task_scope)

    async def _run_task(self, scope: trio.CancelScope) -> None:
        """Finish the batch, then end: an idle connection has no second task."""
        try:
            with scope:
                await self._finish_batch()
        except Exception:  # noqa: BLE001 - one client's trouble must not become everybody's
            _log.exception("replies could not be sent")
            self._send_buffer.abort()
        finally:
            self._task_scope = None

    async def _finish_batch(self) -> None:
        """Take the batch through its states until its replies are sent, or the daemon is paused."""
        async with held(self._finishing):
            while self.state is not _SENT and not self._paused:
                if self.state is _COMMITTING:
                    with trio.CancelScope() as self._sync_scope:
                        await self._durability.sync()
                        self.state = _ON_ACKNOWLEDGED.get(self.state, self.state)
                elif not self._flush_replies():
                    await self._fd_accounting.close_all(len(self._connection.fds_to_close))
            await self._send_buffer.drain()
        if self.state is _SENT and not self._send_buffer.size:
            self._send_buffer.on_drained()

    def pause(self) -> None:
        """Stop waiting for the client, for closes and for the fd store, each of which may take for
        ever: the daemon is paused.
        """
        self._send_buffer.cancel_drain()
        self._fd_accounting.cancel_wait()
        self._sync_scope.cancel()

    def resume(self) -> None:
        """Go on sending: the daemon is no longer paused."""
        if self.state is not _SENT or self._send_buffer.size:
            self._start_task()

    @property
    def _paused(self) -> bool:
        return self._services.lifecycle.paused

    @property
    def unsent(self) -> list[Unsent]:
        """Everything that the client has not been sent yet, in order."""
        held = [] if self.state is _SENT else [*self._replies, Unsent(self._text)]
        return [*self._send_buffer.unsent, *(each for each in held if each.data)]

    async def _stream_reply(self, reply: StreamedReply) -> None:
        """Encode and send a long reply in chunks, until its end or until the daemon is paused.
        Between two chunks other clients are served, and the store may change; no event is sent.
        """
        services, context = self._services, self._context
        chunks = iter(reply)
        while self.streamed_reply is reply and self.state is _SENT:
            made: list[bytes] = []
            size = 0
            async with services.gate:
                if self._paused:  # the successor continues the reply
                    return
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
                may_fail = fds or unproven is not None
                refuse = partial(self.refuse, *self.unfinished_request, streamed=True)
                refusal = refuse if may_fail else None
                self._replies.append(Unsent(b"".join(made), fds, refusal, taken, unproven))
                self.state = _ON_EXECUTED[self.state, not self._durability.is_synced]
            await self._finish_batch()
            if self._send_buffer.discarding:
                self.streamed_reply = None

    def close(self) -> None:
        """Drop all replies at the end of the connection; their descriptors are closed or stored
        again.
        """
        context = self._context
        if self._task_scope is not None:
            self._task_scope.cancel()
        self._send_buffer.discard()
        self._replies.append(Unsent(b"", context.reply_fds, None, context.taken))
        self._send_buffer.drop(self._replies)
        self._replies.clear()
        self.streamed_reply = None
        context.reply_fds, context.taken = [], None
        self._text, self.state = b"", _ON_END[self.state]
