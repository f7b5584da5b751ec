"""What one client is sent, and what of it waits because the client does not take it."""

from __future__ import annotations

import logging
import socket
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from enum import Enum, auto
from typing import TypeAlias

import trio

from ...fdsets import Peer
from ...kernel.fd import Fd
from ...limits import MAX_UNSENT_BYTES
from ...transport import FdStream
from ..services import Services

_log = logging.getLogger("qmpfd")

#: Makes the text to send instead of a reply whose descriptors the kernel does not pass.
Refusal: TypeAlias = "Callable[[OSError], bytes]"

#: Bytes that wait, the descriptors that go with the first of them, owned here, and what to send
#: where those cannot be passed.
Unsent: TypeAlias = "tuple[bytes | memoryview, list[Fd], Refusal | None]"


class SendState(Enum):
    """What becomes of what is enqueued."""

    OPEN = auto()  #: it is sent
    UNCOMMITTED = auto()  #: it is kept back: it tells of changes that a crash would take back
    DISCARDING = auto()  #: it is dropped: the client is sent nothing any more
    DISCARDING_UNCOMMITTED = auto()  #: likewise, with such changes

    # As of any object: that of Enum is a Python function.
    __hash__ = object.__hash__


class _Event(Enum):
    CHANGE = auto()  # the store has changes that the fd store has not acknowledged
    COMMIT = auto()  # it has acknowledged them
    DISCARD = auto()  # the client is gone, or does not read

    __hash__ = object.__hash__


#: What is not here leaves the state as it is.
_TRANSITIONS = {
    (SendState.OPEN, _Event.CHANGE): SendState.UNCOMMITTED,
    (SendState.OPEN, _Event.DISCARD): SendState.DISCARDING,
    (SendState.UNCOMMITTED, _Event.COMMIT): SendState.OPEN,
    (SendState.UNCOMMITTED, _Event.DISCARD): SendState.DISCARDING_UNCOMMITTED,
    (SendState.DISCARDING, _Event.CHANGE): SendState.DISCARDING_UNCOMMITTED,
    (SendState.DISCARDING_UNCOMMITTED, _Event.COMMIT): SendState.DISCARDING,
}
OPEN = SendState.OPEN  # found faster than a member of an enumeration
DISCARDING = (SendState.DISCARDING, SendState.DISCARDING_UNCOMMITTED)
_UNCOMMITTED = (SendState.UNCOMMITTED, SendState.DISCARDING_UNCOMMITTED)


class SendBuffer:
    """Sends to one client.

    Args:
        services: what the daemon gives.
        stream: the connection.
        peer: who is at its other end.
        fds_to_close: where descriptors go that are never sent; its owner closes them.
        on_drained: called when the client has taken what had to wait for it.
        sync: waits until the fd store has acknowledged all changes, and calls :meth:`commit`.
    """

    def __init__(
        self,
        services: Services,
        stream: FdStream,
        peer: Peer,
        fds_to_close: list[Fd],
        on_drained: Callable[[], None],
        sync: Callable[[], Awaitable[None]],
    ) -> None:
        self._services = services
        self._stream = stream
        self._peer = peer
        self._fds_to_close = fds_to_close
        #: To be called when the client has taken all there is.
        self.on_drained = on_drained
        self._sync = sync
        self.state = SendState.OPEN
        #: What waits for the client.
        self.unsent: deque[Unsent] = deque()
        #: What waits for :meth:`commit`, behind that.
        self.uncommitted_queue: deque[Unsent] = deque()
        self.changes = 0  #: how often there were changes to wait for
        #: Bytes of both queues, and descriptors.
        self.size = self.unsent_fds = 0
        #: Descriptors that were sent, and not found to be received by :meth:`update_in_flight`.
        self.in_flight = 0
        self._draining = trio.Lock()
        self._scope: trio.CancelScope | None = None  # while waiting for the client

    @property
    def discarding(self) -> bool:
        """Whether the client is sent nothing any more; what it asks is still carried out."""
        return self.state in DISCARDING

    @property
    def uncommitted(self) -> bool:
        """Whether there are changes that the fd store has not acknowledged."""
        return self.state in _UNCOMMITTED

    def _move(self, event: _Event) -> None:
        self.state = _TRANSITIONS.get((self.state, event), self.state)

    def enqueue(
        self, data: bytes | memoryview, fds: list[Fd] | None = None, refusal: Refusal | None = None
    ) -> None:
        """Have *data* sent with the next :meth:`drain`, and duplicates of *fds* with its first
        byte.

        Args:
            data: what to send.
            fds: the descriptors; owned from here on.
            refusal: makes what to send instead, where the kernel does not pass *fds*.
        """
        if fds is None:
            fds = []
        if self.discarding:
            self._close(fds)
        elif data:
            queue = self.uncommitted_queue if self.uncommitted else self.unsent
            queue.append((data, fds, refusal))
            self.size += len(data)
            self.unsent_fds += len(fds)

    def write(self, data: bytes | memoryview) -> None:
        """As :meth:`enqueue` and :meth:`flush_nowait`; without the detour where nothing waits."""
        if self.unsent or self.state is not OPEN or self._services.lifecycle.paused or not data:
            self.enqueue(data)
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

    def begin_uncommitted(self) -> None:
        """The store has changes that the fd store has not acknowledged: what is enqueued from now
        on is kept back until it has.
        """
        self._move(_Event.CHANGE)
        self.changes += 1

    def commit(self) -> None:
        """The fd store has acknowledged all changes: what was kept back may be sent."""
        self._move(_Event.COMMIT)
        self.unsent += self.uncommitted_queue
        self.uncommitted_queue.clear()

    async def drain(self) -> None:
        """Send all that was enqueued; a client that does not take it in time, or is gone, is sent
        nothing any more.  Nothing is sent while the daemon is paused.
        """
        lifecycle = self._services.lifecycle
        while self.uncommitted and not lifecycle.paused:
            await self._sync()
        if self.unsent and not lifecycle.paused:
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
            while unsent:
                data, fds, _ = self._next()
                try:
                    sent = self._stream.send_nowait(data, fds)
                except OSError as exc:
                    self._refuse(exc)
                    continue
                self._sent(data, fds, sent)
                if sent < len(data):
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
            first, fds, refusal = unsent.popleft()
            others = []
            while unsent and not unsent[0][1]:
                others.append(unsent.popleft()[0])
            rest = b"".join(others)
            if refusal is not None:
                error = refusal

                def refusal(exc: OSError) -> bytes:
                    return error(exc) + rest

            unsent.appendleft((b"".join((first, rest)), fds, refusal))
        return unsent[0]

    def _refuse(self, exc: OSError) -> None:
        """The kernel does not pass the descriptors of the first of what waits: its receiver refuses
        them (SO_PASSRIGHTS), or they cannot be passed (io_uring).  So the command has failed.

        Raises:
            OSError: there is nothing to send instead.
        """
        data, fds, refusal = self.unsent[0]
        if refusal is None:
            raise exc
        error = refusal(exc)
        self.unsent.popleft()
        if error:
            self.unsent.appendleft((error, [], None))
        self.size += len(error) - len(data)
        self.unsent_fds -= len(fds)
        self._close(fds)

    def _sent(self, data: bytes | memoryview, fds: list[Fd], count: int) -> None:
        """So many bytes of the first of what waits are gone."""
        unsent = self.unsent
        if count and unsent:  # not discarded meanwhile
            self.size -= count
            if count < len(data):
                unsent[0] = memoryview(data)[count:], [], None
            else:
                unsent.popleft()
            if fds:
                self.unsent_fds -= len(fds)
                self.in_flight += len(fds)
                self._close(fds)

    async def _wait_drained(self) -> None:
        """Wait until the client has taken what waits; not if the daemon is paused meanwhile."""
        services = self._services
        budget, uid = services.unsent_budget, self._peer.uid
        token = budget.begin(uid, self.size, self.abort)
        try:
            async with self._draining:
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
            budget.end(uid, token)
            if not self.unsent:
                self.on_drained()

    async def _send_all(self) -> None:
        while self.unsent:
            data, fds, _ = self._next()
            try:
                sent = await self._stream.send_some(data, fds)
            except OSError as exc:
                self._refuse(exc)
            else:
                self._sent(data, fds, sent)

    def cancel_drain(self) -> None:
        """Wait for the client no longer: what is unsent stays here."""
        if self._scope is not None:
            self._scope.cancel()

    def discard(self) -> None:
        """Send nothing any more."""
        self._move(_Event.DISCARD)
        self.size = self.unsent_fds = self.in_flight = 0
        for queue in (self.unsent, self.uncommitted_queue):
            for _, fds, _ in queue:  # many may be disconnected at once: these wait for their turns
                self._fds_to_close += fds
            queue.clear()

    def abort(self) -> None:
        """The client does not take its replies: disconnect it."""
        if not self.discarding:
            self.discard()
            _log.warning("pid %d, uid %d does not read its replies: disconnected", *self._peer[:2])
            with suppress(OSError):
                self._stream.socket.shutdown(socket.SHUT_RDWR)

    def _close(self, fds: list[Fd]) -> None:
        if fds:  # a file system can be asked for each close, not just the last
            self._services.shared.closer.close(fds, self._peer.uid)
