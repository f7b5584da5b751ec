"""Charges a client for undelivered descriptors, and closes removed ones in steps."""

from __future__ import annotations

import trio

from ...errors import QMPError
from ...kernel.close_pool import Closing
from ...kernel.fd import Fd
from ...limits import CLOSE_TIMEOUT
from ...protocol.server import ServerConnection
from ..closing import closed
from ..services import Services
from .send_buffer import SendBuffer

#: Descriptors closed in one step, at up to 5 us each.
CLOSES_A_STEP = 256


class FdAccounting:
    """Descriptors of one connection that are to be closed, or that nobody has received yet.

    Args:
        services: the daemon's services.
        connection: the connection; its ``fds_to_close`` are closed here.
        send_buffer: the client's send buffer.
        uid: the client's user, which the descriptors count for.
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
        #: Descriptors charged to the user: those that wait for a command or for the client.
        self.undelivered = 0
        #: Closes under way in threads; the client's replies wait for them.
        self.closings: list[Closing] = []
        self._scope: trio.CancelScope | None = None  # of the wait for *closings*

    def close_some(self) -> bool:
        """Close one step's worth; return whether nothing is left, and no close is under way."""
        self._close(CLOSES_A_STEP)
        return not (self._fds_to_close or self.closings)

    async def close_all(self, count: int) -> None:
        """Close *count* descriptors and wait for the threads that close them, CLOSE_TIMEOUT at
        most.  Other clients are served between two steps.
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
                    await closed(closing)

    def cancel_wait(self) -> None:
        """Stop waiting for closes: the daemon is being paused."""
        if self._scope is not None:
            self._scope.cancel()

    def _close(self, most: int) -> None:
        closing = self._closer.close(self._take(most), self._uid)
        if closing is not None:
            self.closings.append(closing)

    def close_after_sync(self, most: int | None = None) -> None:
        """Close *most* descriptors, all by default, once the fd store has closed its copies."""
        if self._fds_to_close:
            self._services.durability.close_after_sync(self._take(most), self._uid)

    def _take(self, most: int | None) -> list[Fd]:
        taken = self._fds_to_close[:most]
        del self._fds_to_close[:most]
        return taken

    def update_undelivered(self) -> None:
        """Charge the user for descriptors that no command has taken yet, and for those of replies
        that the client has not received.  Over quota, the unclaimed ones are refused and closed.
        """
        quotas, send_buffer = self._services.shared.quotas, self._send_buffer
        send_buffer.update_in_flight()
        more = self._connection.waiting_fds + send_buffer.undelivered_fds - self.undelivered
        if more > 0:
            try:
                quotas.check_waiting(self._uid, more)
                pending = self._connection.pending_fds.fds
                if pending:
                    quotas.check_table(self._uid, pending[-1].number)
                self._services.shared.check_no_client_end(pending)
            except QMPError as exc:
                self._connection.refuse_fds(exc.desc)
                self.close_after_sync()
                more = send_buffer.undelivered_fds - self.undelivered
        if more:
            quotas.charge_waiting(self._uid, more)
            self.undelivered += more

    def refresh_in_flight(self) -> None:
        """Refund the descriptors that the client has received since the last call."""
        received = min(self._send_buffer.update_in_flight(), self.undelivered)
        if received:
            self._services.shared.quotas.charge_waiting(self._uid, -received)
            self.undelivered -= received
