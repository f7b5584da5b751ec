"""What one client is sent, and what of it waits because the client does not take it."""

from __future__ import annotations

import logging
import socket
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress

import trio

from ...fdsets import Peer
from ...kernel.fd import Fd
from ...limits import MAX_UNSENT_BYTES
from ...transport import FdStream
from ..services import Services
from .turns import Share

_log = logging.getLogger("qmpfd")


class SendBuffer:
    """Sends to one client.

    Args:
        services: what the daemon gives.
        stream: the connection.
        peer: who is at its other end.
        fds_to_close: where descriptors go that are never sent; its owner closes them.
        emptied: called when the client has taken what had to wait for it.
        settle: waits until what is held may be told, and calls :meth:`release`.
    """

    def __init__(
        self,
        services: Services,
        stream: FdStream,
        peer: Peer,
        fds_to_close: list[Fd],
        emptied: Callable[[], None],
        settle: Callable[[], Awaitable[None]],
    ) -> None:
        self._fds_to_close = fds_to_close
        self._services = services
        #: To be called when the client has taken all there is.
        self.emptied = emptied
        self._settle = settle
        self._stream = stream
        self._peer = peer
        #: The client is sent nothing any more; what it asks is still carried out.
        self.deaf = False
        #: What waits: bytes, and the descriptors that go with the first of them, owned here.
        self.unsent: deque[tuple[bytes | memoryview, list[Fd]]] = deque()
        #: What is put here from now on tells of changes that a crash would take back.
        self.unsafe = False
        self.holds = 0  #: how often that was so
        #: That: behind what is unsent, and not sent before :meth:`release`.
        self.held: deque[tuple[bytes | memoryview, list[Fd]]] = deque()
        #: Bytes of both, and descriptors.
        self.size = self.waiting_fds = 0
        #: Descriptors that were sent, and not seen to be taken by :meth:`look`.
        self.in_flight = 0
        self._flushing = trio.Lock()
        self._scope: trio.CancelScope | None = None  # while waiting for the client

    def put(self, data: bytes, fds: list[Fd] | None = None) -> None:
        """Have *data* sent with the next :meth:`send`, and duplicates of *fds* with its first byte.

        Args:
            data: what to send.
            fds: the descriptors; owned from here on.
        """
        if fds is None:
            fds = []
        if self.deaf:
            self._discard(fds)
        elif data:
            (self.held if self.unsafe else self.unsent).append((data, fds))
            self.size += len(data)
            self.waiting_fds += len(fds)

    def tell(self, data: bytes) -> None:
        """As :meth:`put` and :meth:`push`; as nothing waits nearly always, without the detour."""
        waits = self.unsent or self.unsafe or self.deaf or self._services.lifecycle.paused
        if waits or self._flushing.locked() or not data:
            self.put(data)
            self.push()
            return
        try:
            sent = self._stream.send_nowait(data)
        except trio.BrokenResourceError:
            self.mute()
            sent = len(data)
        if sent < len(data):
            self.put(data[sent:])
        else:
            self.emptied()

    @property
    def carried_fds(self) -> int:
        """Descriptors in replies that the client has not taken: here, or on their way."""
        return self.waiting_fds + self.in_flight

    def look(self) -> int:
        """See what the client has received; how many descriptors that was."""
        before = self.in_flight
        if before:  # each was sent with a message of its own
            self.in_flight = min(before, self._stream.max_unreceived_messages())
        return before - self.in_flight

    def hold(self) -> None:
        """What is put here next tells of changes that are not safe yet."""
        self.unsafe = True
        self.holds += 1

    def release(self) -> None:
        """All that was put here may be sent."""
        self.unsafe = False
        self.unsent += self.held
        self.held.clear()

    async def send(self, share: Share | None = None) -> None:
        """Send all that was put here; a client that does not take it in time, or is gone, is sent
        nothing any more.  Nothing goes out while the daemon is frozen.

        Args:
            share: the client's share of time, if that is being used.
        """
        while self.unsafe and not self._services.lifecycle.paused:
            await self._settle()
        if self.unsent and not self._services.lifecycle.paused:
            if self._flushing.locked():  # somebody waits for the client already
                await self._flush(share)
            else:
                self.push()
                if self.unsent:
                    await self._flush(share)

    def push(self) -> None:
        """Send what the client takes at once."""
        if self._services.lifecycle.paused or self._flushing.locked():
            return
        unsent = self.unsent
        try:
            while unsent:
                data, fds = self._next() if len(unsent) > 1 else unsent[0]
                sent = self._stream.send_nowait(data, fds)
                if sent < len(data):
                    self._sent(data, fds, sent)
                    break
                unsent.popleft()
                self.size -= sent
                if fds:
                    self._passed(fds)
        except trio.BrokenResourceError:
            self.mute()
        if not unsent:
            self.emptied()
        elif self.size > MAX_UNSENT_BYTES:
            self.cut_off()

    def _next(self) -> tuple[bytes | memoryview, list[Fd]]:
        """What to send next: the first of what waits, and what can go with it."""
        unsent = self.unsent
        if len(unsent) > 1:
            first, fds = unsent.popleft()
            together = [first]
            while unsent and not unsent[0][1]:
                together.append(unsent.popleft()[0])
            unsent.appendleft((b"".join(together), fds))
        return unsent[0]

    def _sent(self, data: bytes | memoryview, fds: list[Fd], count: int) -> None:
        """So many bytes of the first of what waits are gone."""
        unsent = self.unsent
        if count and unsent:  # not muted meanwhile
            self.size -= count
            if count < len(data):
                unsent[0] = memoryview(data)[count:], []
            else:
                unsent.popleft()
            if fds:
                self._passed(fds)

    def _passed(self, fds: list[Fd]) -> None:
        """Duplicates of *fds* are on their way."""
        self.waiting_fds -= len(fds)
        self.in_flight += len(fds)
        self._discard(fds)

    async def _flush(self, share: Share | None) -> None:
        """Wait until the client has taken what waits; not if the daemon is frozen meanwhile."""
        if share is not None:
            share.pause()
        token = self._services.unsent_budget.begin(self.size, self.cut_off)
        try:
            async with self._flushing:
                while self.unsent and not self._services.lifecycle.paused:
                    with trio.move_on_after(self._services.shared.limits.write_timeout) as scope:
                        self._scope = scope
                        await self._wait_for_client()
                    # Else the daemon was frozen meanwhile; it may go on by now.
                    if self.unsent and trio.current_time() >= scope.deadline:
                        self.cut_off()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            self.mute()
        finally:
            self._scope = None
            self._services.unsent_budget.end(token)
            if not self.unsent:
                self.emptied()
            if share is not None:
                share.resume()

    async def _wait_for_client(self) -> None:
        while self.unsent:
            data, fds = self._next()
            self._sent(data, fds, await self._stream.send_some(data, fds))

    def freeze(self) -> None:
        """Wait for the client no longer: what is unsent stays here."""
        if self._scope is not None:
            self._scope.cancel()

    def mute(self) -> None:
        """Send nothing any more."""
        self.deaf = True
        self.size = self.waiting_fds = self.in_flight = 0
        for waiting in (self.unsent, self.held):
            for _, fds in waiting:  # many may be cut off at once: they are closed in their turns
                self._fds_to_close += fds
            waiting.clear()

    def cut_off(self) -> None:
        """The client does not take its replies: send it nothing any more, hear nothing new."""
        if not self.deaf:
            self.mute()
            _log.warning("pid %d, uid %d does not take its replies: disconnected", *self._peer[:2])
            with suppress(OSError):
                self._stream.socket.shutdown(socket.SHUT_RDWR)

    def _discard(self, fds: list[Fd]) -> None:
        if fds:  # a file system can be asked for each close, not just the last
            self._services.shared.closer.close(fds, self._peer.uid)
