"""What one client is sent, and what of it waits because the client does not take it."""

from __future__ import annotations

import logging
import socket
from collections import deque
from collections.abc import Callable, Iterable
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
from ..closing import closed_by_threads
from ..durability import Unproven
from ..services import Services

_log = logging.getLogger("qmpfd")

#: Makes what to send instead of a reply, where its command has failed after all.
Refusal: TypeAlias = "Callable[[QMPError], bytes]"

#: The end of a reply, without which no client takes it for complete: the object's, and the line's.
_END_BYTES = 3


class Unsent(NamedTuple):
    """What waits to be sent.

    Args:
        data: the bytes.
        fds: the descriptors that go with the first of them; owned here.
        refusal: makes what to send instead, where the kernel does not pass *fds*, or *unproven* is
            refused.
        taken: what the descriptor was stored as, if it was taken out of the store for this client:
            it is stored again if the client does not get it, and else closed here before the
            client has the whole reply.
        unproven: what its command has stored, if it may yet turn out that there is no room for it.
    """

    data: bytes | memoryview
    fds: list[Fd]
    refusal: Refusal | None = None
    taken: StoredFd | None = None
    unproven: Unproven | None = None

    @property
    def first_size(self) -> int:
        """How many bytes are sent before the descriptors are closed here."""
        return len(self.data) - (0 if self.taken is None else _END_BYTES)


class SendBuffer:
    """Sends to one client.

    Args:
        services: what the daemon gives.
        stream: the connection.
        peer: who is at its other end.
        context: what is never sent is put back into its store, or among the ``fds_to_close`` of its
            connection.
        on_drained: called when the client has taken what had to wait for it.
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
        self._closing: Closing | None = None  # of what was sent, before the rest of its reply
        #: To be called when the client has taken all there is.
        self.on_drained = on_drained
        #: Whether the client is sent nothing any more; what it asks is still carried out.
        self.discarding = False
        #: What waits for the client.
        self.unsent: deque[Unsent] = deque()
        #: Its bytes, and its descriptors.
        self.size = self.unsent_fds = 0
        #: Descriptors that were sent, and not found to be received by :meth:`update_in_flight`.
        self.in_flight = 0
        self._draining = trio.Lock()
        self._scope: trio.CancelScope | None = None  # while waiting for the client

    def enqueue(
        self,
        data: bytes | memoryview,
        fds: list[Fd] | None = None,
        refusal: Refusal | None = None,
        taken: StoredFd | None = None,
        unproven: Unproven | None = None,
    ) -> None:
        """Have *data* sent with the next :meth:`drain`, and duplicates of *fds* with its first
        byte; see :class:`Unsent`.
        """
        unsent = Unsent(data, [] if fds is None else fds, refusal, taken, unproven)
        if unproven is not None and unproven.is_refused:
            reason = "The file descriptor cannot be kept safe: the service manager has no room"
            unsent = Unsent(self._instead(unsent, GenericError(reason)), [])
        if self.discarding:
            self._close(self._fds_to_close(unsent))
        elif unsent.data:
            self.unsent.append(unsent)
            self.size += len(unsent.data)
            self.unsent_fds += len(unsent.fds)

    def write(self, data: bytes | memoryview) -> None:
        """As :meth:`enqueue` and :meth:`flush_nowait`; without the detour where nothing waits."""
        if self.unsent or self.discarding or self._services.lifecycle.paused or not data:
            self.enqueue(data)
            if self.unsent:
                self.flush_nowait()
            return
        try:
            sent = self._stream.send_nowait(data)
        except trio.BrokenResourceError:
            self.discard()
            return
        if sent < len(data):
            self.enqueue(data[sent:])

    @property
    def undelivered_fds(self) -> int:
        """Descriptors in replies that the client has not received: here, or on their way."""
        return self.unsent_fds + self.in_flight

    def update_in_flight(self) -> int:
        """Find out what the client has received; how many descriptors that was."""
        before = self.in_flight
        if before:  # each was sent with a message of its own
            self.in_flight = min(before, self._stream.max_unreceived_messages())
        return before - self.in_flight

    async def drain(self) -> None:
        """Send all that was enqueued; a client that does not take it in time, or is gone, is sent
        nothing any more.  Nothing is sent while the daemon is paused.
        """
        if self.unsent and not self._services.lifecycle.paused:
            if not self._draining.locked():  # else another task waits for the client already
                self.flush_nowait()
            if self.unsent:
                await self._wait_drained()

    def flush_nowait(self) -> None:
        """Send what the client takes at once."""
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
        """What to send next: the first of what waits, and what can go with it."""
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
        """The kernel does not pass the descriptors of the first of what waits: its receiver refuses
        them (SO_PASSRIGHTS), or they cannot be passed (io_uring).  So the command has failed.

        Raises:
            OSError: there is nothing to send instead.
        """
        refused = self.unsent[0]
        if refused.refusal is None:
            raise exc
        del self.unsent[0]
        reason = f"The file descriptors cannot be sent: {exc.strerror}"
        data = self._instead(refused, GenericError(reason))
        self.size += len(data) - len(refused.data)
        self.unsent_fds -= len(refused.fds)
        if data:
            self.unsent.appendleft(Unsent(data, []))

    def _instead(self, refused: Unsent, error: QMPError) -> bytes:
        """What to send instead of a reply whose command has failed; empty if nothing yet."""
        assert refused.refusal is not None
        data = refused.refusal(error)
        self._close(self._fds_to_close(refused))
        return data

    def _sent(self, first: Unsent, count: int) -> None:
        """So many bytes of the first of what waits are gone."""
        unsent, data, fds = self.unsent, first.data, first.fds
        if count and unsent:  # not discarded meanwhile
            self.size -= count
            if count < len(data):
                unsent[0] = Unsent(memoryview(data)[count:], [])
            else:
                unsent.popleft()
            if fds:
                self.unsent_fds -= len(fds)
                self.in_flight += len(fds)
                closing = self._close(fds)
                if first.taken is not None:
                    self._closing = closing

    async def _wait_drained(self) -> None:
        """Wait until the client has taken what waits; not if the daemon is paused meanwhile."""
        services = self._services
        charge = partial(services.unsent_budget.charge, self.abort, self._peer.uid)
        charge(self.size)
        try:
            async with self._draining:
                charge(self.size)  # another task may have sent some, and charged nothing since
                while self.unsent and not services.lifecycle.paused:
                    with trio.move_on_after(services.shared.limits.write_timeout) as scope:
                        self._scope = scope
                        await self._send_all()
                    # Else the daemon was paused meanwhile; it may go on by now.
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
                    await closed_by_threads(self._closing)
                self._closing = None
            first = self._next()
            try:
                sent = await self._stream.send_some(first.data[: first.first_size], first.fds)
            except OSError as exc:
                self._refuse(exc)
            else:
                self._sent(first, sent)

    def cancel_drain(self) -> None:
        """Wait for the client no longer: what is unsent stays here."""
        if self._scope is not None:
            self._scope.cancel()

    def discard(self) -> None:
        """Send nothing any more."""
        self.discarding = True
        self.size = self.unsent_fds = self.in_flight = 0
        self.drop(self.unsent)
        self.unsent.clear()

    def drop(self, unsent: Iterable[Unsent]) -> None:
        """Never send that; many clients may be disconnected at once, and the descriptors wait for
        their turns to be closed.
        """
        for each in unsent:
            self._context.connection.fds_to_close += self._fds_to_close(each)

    def _fds_to_close(self, unsent: Unsent) -> list[Fd]:
        """The descriptors of what is never sent; none if what was taken out of the store is there
        again.
        """
        if unsent.taken is None or self._services.lifecycle.handed_over:
            return unsent.fds
        if not self._context.put_back(unsent.taken):
            return unsent.fds
        self._services.durability.push()
        return []

    def _close(self, fds: list[Fd]) -> Closing | None:
        # A file system can be asked for each close, not just the last.
        return self._services.shared.closer.close(fds, self._peer.uid) if fds else None

    def abort(self) -> None:
        """The client does not take its replies: disconnect it."""
        if not self.discarding:
            self.discard()
            _log.warning("pid %d, uid %d does not read its replies: disconnected", *self._peer[:2])
            with suppress(OSError):
                self._stream.socket.shutdown(socket.SHUT_RDWR)
