"""Waiting for the threads that close descriptors."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import trio

from ..kernel.close_pool import ClosePool, Closing
from ..limits import CLOSE_TIMEOUT


async def closed_by_threads(closing: Closing) -> None:
    """Wait until all descriptors of *closing* are closed; without a checkpoint if they are.  The
    caller bounds the wait.
    """
    if not closing.is_done:
        await _called_back(closing.when_done)


async def all_closed(pool: ClosePool) -> None:
    """Wait until no close is under way; without a checkpoint if none is.  The caller bounds the
    wait.
    """
    if pool.pending:
        await _called_back(pool.when_idle)


async def await_closes(pool: ClosePool) -> None:
    """Wait for the closes that are under way, if that does not take too long: a program that the
    daemon was a part of has no descriptor of it left.
    """
    with trio.move_on_after(CLOSE_TIMEOUT, shield=True):
        await all_closed(pool)


async def _called_back(tell: Callable[[Callable[[], object]], None]) -> None:
    event, token = trio.Event(), trio.lowlevel.current_trio_token()

    def wake() -> None:
        with suppress(trio.RunFinishedError):  # the program has ended before the close has
            token.run_sync_soon(event.set)

    tell(wake)
    await event.wait()
