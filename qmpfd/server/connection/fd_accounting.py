"""A connection's descriptors that no command or client has taken: counted, and closed in steps."""

from __future__ import annotations

import trio

from ...errors import QMPError
from ...kernel.close_pool import Closing
from ...kernel.fd import Fd
from ...limits import CLOSE_TIMEOUT
from ...protocol.server import ServerConnection
from ..closing import closed_by_threads
from ..services import Services
from .send_buffer import SendBuffer

#: Descriptors that are closed in a row, at up to 5 us each.
CLOSES_A_STEP = 256


class FdAccounting:
    """What one connection leaves to be closed.

    Args:
        services: what the daemon gives.
        connection: whose ``fds_to_close`` are closed.
        send_buffer: what its client has to receive.
        uid: the client's.
    """

    def __init__(
        self, services: Services, connection: ServerConnection, send_buffer: SendBuffer, uid: int
    ) -> None:
        self._services = services
        self._connection = connection
        self._fds_to_close = connection.fds_to_close
        self._closer = services.shared.closer
        self._send_buffer = send_buffer
        self._uid = uid
        #: The descriptors that wait for a command or for the client, as counted so far.
        self.undelivered = 0
        #: What threads close for this client, and what its replies wait for.
        self.closings: list[Closing] = []
        self._scope: trio.CancelScope | None = None  # of the last wait for that

    def close_some(self) -> bool:
        """Close as many as can be closed in a row; whether that was all, and is done."""
        self._close(CLOSES_A_STEP)
        return not (self._fds_to_close or self.closings)

    async def close_all(self, count: int) -> None:
        """Close so many, and wait until they are closed, if that does not take too long; between
        two steps, others have their turns.
        """
        while count > CLOSES_A_STEP:
            self.close_some()
            count -= CLOSES_A_STEP
            self.update_undelivered()
            async with self._services.gate:
                pass
        if count:
            self._close(count)
        closings, self.closings = self.closings, []
        if closings and not self._services.lifecycle.paused:
            with trio.move_on_after(CLOSE_TIMEOUT) as self._scope:  # noqa: ASYNC912 - there is at least one
                for closing in closings:
                    await closed_by_threads(closing)

    def cancel_wait(self) -> None:
        """Wait for no close any longer."""
        if self._scope is not None:
            self._scope.cancel()

    def _close(self, most: int) -> None:
        closing = self._closer.close(self._take(most), self._uid)
        if closing is not None:
            self.closings.append(closing)

    def close_after_sync(self, most: int | None = None) -> None:
        """Close them as soon as the fd store has let go of all that was removed."""
        if self._fds_to_close:
            self._services.durability.close_after_sync(self._take(most), self._uid)

    def _take(self, most: int | None) -> list[Fd]:
        taken = self._fds_to_close[:most]
        del self._fds_to_close[:most]
        return taken

    def update_undelivered(self) -> None:
        """Count the descriptors that have come and that no command has, and those that wait to be
        received with their replies.  If they are too many, those that have come last are closed.
        """
        quotas, send_buffer = self._services.shared.quotas, self._send_buffer
        send_buffer.update_in_flight()
        more = self._connection.waiting_fds + send_buffer.undelivered_fds - self.undelivered
        if more > 0:
            try:
                quotas.check_waiting(self._uid, more)
                self._services.shared.check_no_client_end(self._connection.pending_fds.fds)
            except QMPError as exc:
                self._connection.refuse_fds(exc.desc)
                self.close_after_sync()
                more = send_buffer.undelivered_fds - self.undelivered
        if more:
            quotas.charge_waiting(self._uid, more)
            self.undelivered += more

    def refresh_in_flight(self) -> None:
        """Count no more what the client has received meanwhile."""
        received = min(self._send_buffer.update_in_flight(), self.undelivered)
        if received:
            self._services.shared.quotas.charge_waiting(self._uid, -received)
            self.undelivered -= received
