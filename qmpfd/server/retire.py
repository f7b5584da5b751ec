"""Takes descriptors out of the store when their time is over, or their other end is gone."""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import TYPE_CHECKING

import trio

from ..fdsets import StoredFd
from ..limits import HANGUP_RECHECK

if TYPE_CHECKING:
    from .server import Server


#: Descriptors that are taken out in a row, or looked at, before everybody else is served.
_A_STEP = 128


async def _retire(server: Server, take_out: Callable[[], list[StoredFd]]) -> bool:
    """Take out some, and close them; whether there were any."""
    async with server.entered():
        removed = take_out()
    server.dispose([stored.fd for stored in removed])
    await trio.lowlevel.checkpoint()
    return bool(removed)


async def retire_expired(server: Server) -> None:
    """Remove each descriptor whose time is over."""
    expiries = server.store.expiries
    while True:
        with trio.CancelScope() as scope:

            def reschedule(scope: trio.CancelScope = scope) -> None:
                due = expiries.next()
                scope.deadline = inf if due is None else due

            reschedule()
            expiries.changed = reschedule
            await trio.sleep_forever()
        while await _retire(
            server, lambda: server.store.remove_expired(trio.current_time(), _A_STEP)
        ):
            pass


async def retire_hung_up(server: Server) -> None:
    """Remove each watched socket and pipe whose other end is gone and that is read to the end."""
    hangups, store = server.daemon.hangups, server.store

    def take_out() -> list[StoredFd]:
        over = hangups.take(_A_STEP)
        for stored in over:
            store.pop(stored, "hangup")
        return over

    while True:
        with trio.move_on_after(HANGUP_RECHECK if hangups.draining else inf):
            await trio.lowlevel.wait_readable(hangups.fileno())
        hangups.look()
        while hangups.due:
            await _retire(server, take_out)
