"""Takes descriptors out of the store when their time is over, or their other end is gone."""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import TYPE_CHECKING

import trio

from ..fdsets import StoredFd
from ..kernel.fd import Fd
from ..limits import HANGUP_RECHECK

if TYPE_CHECKING:
    from .server import Server


#: Descriptors that are taken out in a row, or looked at, before everybody else is served.
_A_STEP = 128


async def _remove(server: Server, due: Callable[[], list[StoredFd]], reason: str) -> bool:
    """Remove some of what is due, and close it; whether there was any."""
    fds: list[Fd] = []
    async with server.services.locked():
        server.daemon.remove(due(), reason, fds)
    server.durability.close_after_sync(fds)
    await trio.lowlevel.checkpoint()
    return bool(fds)


async def retire_expired(server: Server) -> None:
    """Remove each descriptor whose time is over."""
    expiries = server.store.expiries
    while True:
        with trio.CancelScope() as scope:

            def reschedule(scope: trio.CancelScope = scope) -> None:
                due = expiries.next()
                scope.deadline = inf if due is None else due

            reschedule()
            server.daemon.on_expiry = reschedule
            await trio.sleep_forever()
        while await _remove(
            server, lambda: server.store.expired(trio.current_time(), _A_STEP), "expired"
        ):
            pass


async def retire_hung_up(server: Server) -> None:
    """Remove each watched socket and pipe whose other end is gone and that is read to the end."""
    hangups = server.daemon.hangups
    while True:
        with trio.move_on_after(HANGUP_RECHECK if hangups.draining else inf):
            await trio.lowlevel.wait_readable(hangups.fileno())
        hangups.look()
        while hangups.due:
            await _remove(server, lambda: hangups.take(_A_STEP), "hangup")
