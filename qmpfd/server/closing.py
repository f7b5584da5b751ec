"""Waiting for the threads that close descriptors."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import trio

from ..kernel.close_pool import ClosePool, Closing
from ..limits import CLOSE_TIMEOUT


async def closed_by_threads(closing: Closing) -> None:
    """Wait until all descriptors of *closing* are closed; return without a checkpoint if they are
    closed already.  The caller bounds the wait.
    """
    if not closing.is_done:
        await _called_back(closing.when_done)


async def all_closed(pool: ClosePool) -> None:
    """Wait until no close(2) is under way; return without a checkpoint if none is.  The caller
    bounds the wait.
    """
    if pool.pending:
        await _called_back(pool.when_idle)


async def await_closes(pool: ClosePool) -> None:
    """Wait up to CLOSE_TIMEOUT for the close(2) calls under way: a program that has run the daemon
    as one of its tasks is left without any of the daemon's descriptors.
    """
    with trio.move_on_after(CLOSE_TIMEOUT, shield=True):
        await all_closed(pool)


async def _called_back(register: Callable[[Callable[[], object]], None]) -> None:
    event, token = trio.Event(), trio.lowlevel.current_trio_token()

    def wake() -> None:
        with suppress(trio.RunFinishedError):  # trio.run() has returned before close(2) did
            token.run_sync_soon(event.set)

    register(wake)
    await event.wait()
