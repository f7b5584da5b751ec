"""Send buffer of a connection: replies, events, and the descriptors that go with them."""

from __future__ import annotations

import logging
import socket
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from typing import NamedTuple, TypeAlias

import trio

from ...commands import Context
from ...errors import GenericError, QMPError
from ...fdsets import Peer, StoredFd
from ...kernel.close_pool import Closing
from ...kernel.fd import Fd
from ...limits import CLOSE_TIMEOUT, MAX_UNSENT_BYTES
from ...transport import FdStream
from ..closing import closed
from ..durability import Unproven
from ..services import Services

_log = logging.getLogger("qmpfd")

#: Makes the error reply that replaces a reply whose command has failed after all.
Refusal: TypeAlias = "Callable[[QMPError], bytes]"

#: Bytes of the end of a reply, "}\r\n": without them, no client takes the reply for complete.
_END_BYTES = 3


class Unsent(NamedTuple):
    """One queued reply, or several joined ones.

    Args:
        data: the bytes.
        fds: descriptors to attach to the first byte; owned here.
        refusal: makes the error reply to send instead, if the kernel does not pass *fds*, or
            *unproven* is refused.
        taken: the store's entry of the descriptor, if the command took it out of the store.  It is
            stored again if it cannot be sent; else our copy is closed before the end of the reply
            is sent.
        unproven: what the command has stored, if the fd store may yet have no room for it.
    """

    data: bytes | memoryview
    fds: Sequence[Fd] = ()
    refusal: Refusal | None = None
    taken: StoredFd | None = None
    unproven: Unproven | None = None

    @property
    def first_size(self) -> int:
        """Number of bytes to send before our copies of the descriptors are closed."""
        return len(self.data) - (0 if self.taken is None else _END_BYTES)


class SendBuffer:
    """Sends to one client, and queues what its socket does not take at once.

    Args:
        services: the daemon's services.
        stream: the connection.
        peer: the client.
        context: the command context; descriptors that are never sent go back into its store, or
            into the ``fds_to_close`` of its connection.
        on_drained: called when the queue has become empty.
    """

    def __init__(
        self,
        services: Services,
        stream: FdStream,
        peer: Peer,
        context: Context,
        on_drained: Callable[[], None],
    ) -> None:
        self._services = services
        self._stream = stream
        self._peer = peer
        self._context = context
        self._closing: Closing | None = None  # to be done before the end of a reply is sent
        #: Called when the queue has become empty.
        self.on_drained = on_drained
        #: Whether replies are discarded: the client does not read them.  Its requests are still
        #: executed.
        self.discarding = False
        #: The queue.
        self.unsent: deque[Unsent] = deque()
        #: Bytes and descriptors in the queue.
        self.size = self.unsent_fds = 0
        #: Descriptors that were sent and, as of :meth:`update_in_flight`, not received.
        self.in_flight = 0
        self._draining = trio.Lock()
        self._scope: trio.CancelScope | None = None  # of the wait for the client

    def enqueue(self, unsent: Unsent) -> None:
        """Queue a reply for the next :meth:`drain`."""
        if unsent.unproven is not None and unsent.unproven.is_refused:
            reason = "The file descriptor cannot be kept safe: the service manager has no room"
            unsent = self._instead(unsent, reason)
        if self.discarding:
            self._close(self._fds_to_close(unsent))
        elif unsent.data:
            self.unsent.append(unsent)
            self.size += len(unsent.data)
            self.unsent_fds += len(unsent.fds)

    def write(self, data: bytes | memoryview) -> None:
        """Send *data*, and queue what the socket does not take.  Never waits."""
        if self.unsent or self.discarding or self._services.lifecycle.paused or not data:
            self.enqueue(Unsent(data))
            if self.unsent:
                self.flush_nowait()
            return
        try:
            sent = self._stream.send_nowait(data)
        except trio.BrokenResourceError:
            self.discard()
            return
        if sent < len(data):
            self.enqueue(Unsent(data[sent:]))

    @property
    def undelivered_fds(self) -> int:
        """Number of descriptors, queued or in flight, that the client has not received."""
        return self.unsent_fds + self.in_flight

    def update_in_flight(self) -> int:
        """Ask the kernel how much is in flight; return the number of descriptors received."""
        before = self.in_flight
        if before:  # each was sent with a sendmsg(2) of its own
            self.in_flight = min(before, self._stream.max_unreceived_messages())
        return before - self.in_flight

    async def drain(self) -> None:
        """Send the whole queue, waiting for the client up to the write timeout; after that its
        replies are discarded.  Nothing is sent while the daemon is paused.
        """
        if self.unsent and not self._services.lifecycle.paused:
            if not self._draining.locked():  # else another task sends already
                self.flush_nowait()
            if self.unsent:
                await self._wait_drained()

    def flush_nowait(self) -> None:
        """Send what the socket takes without waiting."""
        if self._services.lifecycle.paused or self._draining.locked():
            return
        unsent = self.unsent
        try:
            while unsent and (self._closing is None or self._closing.is_done):
                first = self._next()
                size = first.first_size
                try:
                    sent = self._stream.send_nowait(first.data[:size], first.fds)
                except OSError as exc:
                    self._refuse(exc)
                    continue
                self._sent(first, sent)
                if sent < size:
                    break
        except trio.BrokenResourceError:
            self.discard()
        if not unsent:
            self.on_drained()
        elif self.size > MAX_UNSENT_BYTES:
            self.abort()

    def _next(self) -> Unsent:
        """The head of the queue, joined with the following entries that carry no descriptors."""
        unsent = self.unsent
        if len(unsent) > 1:
            data, fds, refusal, taken, _ = unsent.popleft()
            others = []
            while taken is None and unsent and not unsent[0].fds:
                others.append(unsent.popleft().data)
            rest = b"".join(others)
            if refusal is not None:
                error = refusal

                def refusal(reason: QMPError) -> bytes:
                    return error(reason) + rest

            unsent.appendleft(Unsent(b"".join((data, rest)), fds, refusal, taken))
        return unsent[0]

    def _refuse(self, exc: OSError) -> None:
        """Replace the head of the queue by an error reply.  The kernel has not passed its
        descriptors: the receiver refuses them (SO_PASSRIGHTS, socket(7)), or their kind cannot be
        passed (io_uring).

        Raises:
            OSError: the head of the queue has no error reply; *exc*.
        """
        refused = self.unsent[0]
        if refused.refusal is None:
            raise exc
        del self.unsent[0]
        instead = self._instead(refused, f"The file descriptors cannot be sent: {exc.strerror}")
        self.size += len(instead.data) - len(refused.data)
        self.unsent_fds -= len(refused.fds)
        if instead.data:
            self.unsent.appendleft(instead)

    def _instead(self, refused: Unsent, reason: str) -> Unsent:
        """Close or store again the descriptors of *refused*; return the error reply to send."""
        assert refused.refusal is not None
        instead = Unsent(refused.refusal(GenericError(reason)))
        self._close(self._fds_to_close(refused))
        return instead

    def _sent(self, first: Unsent, count: int) -> None:
        """Take *count* bytes, which were sent, and the descriptors off the head of the queue."""
        unsent, data, fds = self.unsent, first.data, first.fds
        if count and unsent:  # the queue was not discarded during the send
            self.size -= count
            if count < len(data):
                unsent[0] = Unsent(memoryview(data)[count:])
            else:
                unsent.popleft()
            if fds:
                self.unsent_fds -= len(fds)
                self.in_flight += len(fds)
                closing = self._close(fds)
                if first.taken is not None:
                    self._closing = closing

    async def _wait_drained(self) -> None:
        """Send the queue as the client reads it, until it is empty or the daemon is paused."""
        services = self._services
        charge = partial(services.unsent_budget.charge, self.abort, self._peer.uid)
        charge(self.size)
        try:
            async with self._draining:
                charge(self.size)  # another task may have sent a part of it before
                while self.unsent and not services.lifecycle.paused:
                    with trio.move_on_after(services.shared.limits.write_timeout) as scope:
                        self._scope = scope
                        await self._send_all()
                    # Without a timeout, the scope was cancelled by a pause, which may be over.
                    if self.unsent and trio.current_time() >= scope.deadline:
                        self.abort()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            self.discard()
        finally:
            self._scope = None
            charge(0)
            if not self.unsent:
                self.on_drained()

    async def _send_all(self) -> None:
        while self.unsent:
            if self._closing is not None:
                with trio.move_on_after(CLOSE_TIMEOUT):
                    await closed(self._closing)
                self._closing = None
            first = self._next()
            try:
                sent = await self._stream.send_some(first.data[: first.first_size], first.fds)
            except OSError as exc:
                self._refuse(exc)
            else:
                self._sent(first, sent)

    def cancel_drain(self) -> None:
        """Stop waiting for the client; the queue stays as it is."""
        if self._scope is not None:
            self._scope.cancel()

    def discard(self) -> None:
        """Drop the queue, and all replies from now on."""
        self.discarding = True
        self.size = self.unsent_fds = self.in_flight = 0
        self.drop(self.unsent)
        self.unsent.clear()

    def drop(self, unsent: Iterable[Unsent]) -> None:
        """Hand the descriptors of replies that are never sent to ``fds_to_close``, where they are
        closed in steps: many clients may be disconnected at once.
        """
        for each in unsent:
            self._context.connection.fds_to_close += self._fds_to_close(each)

    def _fds_to_close(self, unsent: Unsent) -> Sequence[Fd]:
        """The descriptors to close of a reply that is never sent; none if they are stored again."""
        if unsent.taken is None or self._services.lifecycle.handed_over:
            return unsent.fds
        if not self._context.put_back(unsent.taken):
            return unsent.fds
        self._services.durability.push()
        return ()

    def _close(self, fds: Sequence[Fd]) -> Closing | None:
        # In the close pool: a file system can block each close (flush), not just the last.
        return self._services.shared.closer.close(fds, self._peer.uid) if fds else None

    def abort(self) -> None:
        """Disconnect a client that does not read its replies."""
        if not self.discarding:
            self.discard()
            _log.warning("pid %d, uid %d does not read its replies: disconnected", *self._peer[:2])
            with suppress(OSError):
                self._stream.socket.shutdown(socket.SHUT_RDWR)
