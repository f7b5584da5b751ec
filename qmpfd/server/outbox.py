"""What one client is sent, and what of it waits because the client does not take it."""

from __future__ import annotations

import logging
import socket
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

import trio

from ..fd import Fd
from ..fdsets import Peer
from ..limits import MAX_UNSENT_BYTES
from ..transport import FdStream
from .turns import Share

if TYPE_CHECKING:
    from .server import Server

_log = logging.getLogger("qmpfd")


class Outbox:
    """Sends to one client.

    Args:
        server: the daemon.
        stream: the connection.
        peer: who is at its other end.
        garbage: where descriptors go that are never sent; its owner closes them.
        emptied: called when the client has taken what had to wait for it.
    """

    def __init__(
        self,
        server: Server,
        stream: FdStream,
        peer: Peer,
        garbage: list[Fd],
        emptied: Callable[[], None],
    ) -> None:
        self._garbage = garbage
        self._server = server
        self._emptied = emptied
        self._stream = stream
        self._peer = peer
        #: The client is sent nothing any more; what it asks is still carried out.
        self.deaf = False
        #: What waits: bytes, and the descriptors that go with the first of them, owned here.
        self.unsent: deque[tuple[bytes | memoryview, list[Fd]]] = deque()
        self._flushing = trio.Lock()
        self._scope: trio.CancelScope | None = None  # while waiting for the client

    @property
    def waiting_fds(self) -> int:
        """How many descriptors wait to be taken."""
        return sum(len(fds) for _, fds in self.unsent) if self.unsent else 0

    async def send(
        self, data: bytes, fds: list[Fd] | None = None, *, share: Share | None = None
    ) -> None:
        """Send *data*, and duplicates of *fds* with its first byte; a client that does not take it
        in time, or is gone, is sent nothing any more.

        Args:
            data: what to send.
            fds: the descriptors; owned from here on.
            share: the client's share of time, if that is being used.
        """
        self.put(data, fds)
        if self.unsent and not self._server.is_frozen:
            await self.flush(share)

    def put(self, data: bytes, fds: list[Fd] | None = None) -> None:
        """As :meth:`send`, but what cannot be sent at once waits for :meth:`flush`."""
        fds = fds or []
        if self.deaf:
            self._discard(fds)
            return
        sent = 0
        if not self.unsent and not self._server.is_frozen:
            try:
                sent = self._stream.send_nowait(data, fds)
            except trio.BrokenResourceError:
                self.mute()
                self._discard(fds)
                return
        if sent:
            self._discard(fds)
            fds = []
        if sent < len(data):
            self.unsent.append((memoryview(data)[sent:], fds))
            if sum(len(waits) for waits, _ in self.unsent) > MAX_UNSENT_BYTES:
                self.cut_off()

    async def flush(self, share: Share | None = None) -> None:
        """Wait until the client has taken what waits; not if the daemon is frozen meanwhile."""
        if share is not None:
            share.pause()
        size = sum(len(data) for data, _ in self.unsent)
        token = self._server.backlog.begin(size, self.cut_off)
        try:
            async with self._flushing:
                if self._server.is_frozen:
                    return
                with trio.move_on_after(self._server.daemon.limits.write_timeout) as scope:
                    self._scope = scope
                    await self._flush()
                if self.unsent and not self._server.is_frozen:
                    self.cut_off()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            self.mute()
        finally:
            self._scope = None
            self._server.backlog.end(token)
            if not self.unsent:
                self._emptied()
            if share is not None:
                share.resume()

    async def _flush(self) -> None:
        while self.unsent:
            data, fds = self.unsent[0]
            went = await self._stream.send_some(data, fds)
            if went and fds:
                self._discard(fds)
            if self.unsent:  # not muted meanwhile
                if went < len(data):
                    self.unsent[0] = (data[went:], [])
                else:
                    self.unsent.popleft()

    def freeze(self) -> None:
        """Wait for the client no longer: what is unsent stays here."""
        if self._scope is not None:
            self._scope.cancel()

    def mute(self) -> None:
        """Send nothing any more."""
        self.deaf = True
        for _, fds in self.unsent:  # many may be cut off at once: they are closed in their turns
            self._garbage += fds
        self.unsent.clear()

    def cut_off(self) -> None:
        """The client does not take its replies: send it nothing any more, hear nothing new."""
        if not self.deaf:
            self.mute()
            _log.warning("pid %d, uid %d does not take its replies: disconnected", *self._peer[:2])
            with suppress(OSError):
                self._stream.socket.shutdown(socket.SHUT_RDWR)

    def _discard(self, fds: list[Fd]) -> None:
        if fds:  # a file system can be asked for each close, not just the last
            self._server.daemon.closer.close(fds)
