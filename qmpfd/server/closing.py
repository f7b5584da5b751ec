"""Waiting for the threads that close descriptors."""

from __future__ import annotations

from contextlib import suppress

import trio

from ..kernel.close_pool import ClosePool, Closing
from ..limits import CLOSE_TIMEOUT


async def closed(closing: Closing) -> None:
    """Wait until these close(2) calls have returned; without a checkpoint if they have.  The caller
    bounds the wait.
    """
    if closing.is_done:
        return
    event, token = trio.Event(), trio.lowlevel.current_trio_token()

    def wake() -> None:
        with suppress(trio.RunFinishedError):  # trio.run() has returned before close(2) did
            token.run_sync_soon(event.set)

    closing.when_done(wake)
    await event.wait()


async def await_closes(pool: ClosePool) -> None:
    """Wait up to CLOSE_TIMEOUT for the close(2) calls under way: a program that has run the daemon
    as one of its tasks is left without any of the daemon's descriptors.
    """
    with trio.move_on_after(CLOSE_TIMEOUT, shield=True):
        await closed(pool.all_closes)
