"""How what one client is sent leaves its send buffer: in a task beside the session's where the
client does not take it at once, and behind the acknowledgement of the changes that it tells of.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import trio

from ...commands import Context
from ...fdsets import Peer
from ...transport import FdStream
from ..services import Services
from .fd_accounting import FdAccounting
from .send_buffer import SendBuffer

_log = logging.getLogger("qmpfd")


class Delivery:
    """Sends what is in one client's send buffer.

    Args:
        services: what the daemon gives.
        stream: the connection.
        peer: who is at its other end.
        context: whose connection's ``fds_to_close`` are closed before the replies are sent.
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
        connection = self._connection = context.connection
        #: What waits to be sent.
        self.send_buffer = SendBuffer(services, stream, peer, context, on_drained, self.sync)
        #: What is closed before that is sent.
        self.fd_accounting = FdAccounting(services, connection, self.send_buffer, peer.uid)
        self._syncing = trio.Lock()
        self._sync_scope = trio.CancelScope()
        self._drain_scope: trio.CancelScope | None = None  # while a task of its own sends

    def close(self) -> None:
        """Send nothing any more."""
        self.send_buffer.discard()
        if self._drain_scope is not None:
            self._drain_scope.cancel()

    def pause(self) -> None:
        """The daemon is paused: wait neither for the client, nor for a close, nor for the fd
        store, which may take for ever.
        """
        self.send_buffer.cancel_drain()
        self.fd_accounting.cancel_wait()
        self._sync_scope.cancel()

    def resume(self) -> None:
        """The daemon is no longer paused: see to it that what is unsent is sent."""
        if self.send_buffer.size:
            self.start_drain()

    def start_drain(self) -> None:
        """Have a task send what is unsent."""
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

    async def sync(self) -> None:
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
            await self.fd_accounting.close_all(count)
            if changes == self.send_buffer.changes:
                self.send_buffer.commit()

    def on_synced(self, changes: int) -> None:
        """The fd store has acknowledged so many changes.  If that is all of them, close what was
        removed, and let the replies go; what takes longer than that is done by a task.
        """
        fd_accounting, send_buffer = self.fd_accounting, self.send_buffer
        if self._services.lifecycle.paused or changes != send_buffer.changes:
            return
        try:
            closed = fd_accounting.close_some()
            if closed:
                send_buffer.commit()
                send_buffer.flush_nowait()
            if send_buffer.size or not closed:
                self.start_drain()
        except Exception:  # noqa: BLE001 - one client's trouble must not become everybody's
            _log.exception("replies could not be sent")
            send_buffer.abort()
