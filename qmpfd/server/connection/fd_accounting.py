"""A connection's descriptors that nobody takes, or has taken yet: closed in steps, and counted."""

from __future__ import annotations

import trio

from ...errors import QMPError
from ...kernel.close_pool import Closing
from ...kernel.fd import Fd
from ...limits import CLOSE_TIMEOUT
from ...protocol import ServerConnection
from ..closing import closed_by_threads
from ..services import Services
from .send_buffer import SendBuffer
from .turns import Share

#: Descriptors that are closed in a row, at up to 5 us each.
CLOSES_A_STEP = 256


class FdAccounting:
    """What one connection leaves to be closed.

    Args:
        services: what the daemon gives.
        connection: whose ``fds_to_close`` are closed.
        send_buffer: what its client has to take.
        share: the client's share of time.
        uid: the client's.
    """

    def __init__(
        self,
        services: Services,
        connection: ServerConnection,
        send_buffer: SendBuffer,
        share: Share,
        uid: int,
    ) -> None:
        self._services = services
        self._connection = connection
        self._outbox = send_buffer
        self._share = share
        self._uid = uid
        #: The descriptors that wait for a command or for the client, as counted so far.
        self.waiting = 0
        #: What threads close for this client, and what its replies wait for.
        self.closings: list[Closing] = []
        self._scope: trio.CancelScope | None = None  # of the last wait for that

    def close_some(self) -> None:
        """Close as many as can be closed in a row."""
        fds_to_close = self._connection.fds_to_close
        if len(fds_to_close) > CLOSES_A_STEP:
            fds_to_close = self._take(CLOSES_A_STEP)
        self._close(fds_to_close)
        fds_to_close.clear()

    async def close_all(self, count: int) -> None:
        """Close so many, and wait until they are closed, if that does not take too long."""
        for closed in range(0, count, CLOSES_A_STEP):
            if self._share.over:
                self.count_waiting()
                await self._share.next_turn()
            self._close(self._take(min(count - closed, CLOSES_A_STEP)))
        closings, self.closings = self.closings, []
        if closings and not self._services.lifecycle.paused:
            self._share.pause()
            with trio.move_on_after(CLOSE_TIMEOUT) as self._scope:
                for closing in closings:
                    await closed_by_threads(closing)
            self._share.resume()

    def freeze(self) -> None:
        """Wait for no close any longer."""
        if self._scope is not None:
            self._scope.cancel()

    def _close(self, fds: list[Fd]) -> None:
        closing = self._services.shared.closer.close(fds, self._uid)
        if closing is not None:
            self.closings.append(closing)

    def dispose(self, most: int | None = None) -> None:
        """Close them as soon as all that was removed is gone from the keeper."""
        if self._connection.fds_to_close:
            self._services.durability.close_after_sync(self._take(most), self._uid)

    def _take(self, most: int | None) -> list[Fd]:
        fds_to_close = self._connection.fds_to_close
        taken, fds_to_close[:most] = fds_to_close[:most], []
        return taken

    @property
    def some_wait(self) -> bool:
        """Whether there is something to count."""
        send_buffer = self._outbox
        here = self.waiting or send_buffer.waiting_fds or send_buffer.in_flight
        return bool(here or self._connection.waiting_fds)

    def count_waiting(self) -> None:
        """Count the descriptors that have come and that no command has, and those that wait to be
        taken with their replies.  If they are too many, those that have come last go.
        """
        daemon, send_buffer = self._services.shared, self._outbox
        send_buffer.look()
        more = self._connection.waiting_fds + send_buffer.carried_fds - self.waiting
        if more > 0:
            try:
                daemon.quotas.check_waiting(self._uid, more)
            except QMPError as exc:
                self._connection.refuse_fds(exc.desc)
                self.dispose()
                more = send_buffer.carried_fds - self.waiting
        if more:
            daemon.quotas.charge_waiting(self._uid, more)
            self.waiting += more

    def look(self) -> None:
        """Count no more what the client has received meanwhile."""
        taken = min(self._outbox.look(), self.waiting)
        if taken:
            self._services.shared.quotas.charge_waiting(self._uid, -taken)
            self.waiting -= taken
