"""Tells those who watch of what has happened, a few of them at a time."""

from __future__ import annotations

from time import monotonic
from typing import TYPE_CHECKING

import trio

from ..limits import HERALD_SECONDS

if TYPE_CHECKING:
    from .server import Server


async def tell_watchers(server: Server) -> None:
    """Whenever there is something new, have each watcher sent it; however many watch, everybody
    else is served in between.
    """
    while True:
        await server.news.wait()
        server.news = trio.Event()
        until = monotonic() + HERALD_SECONDS
        for watcher in list(server.daemon.watchers):
            while watcher.send():
                if monotonic() > until:
                    await trio.lowlevel.checkpoint()
                    until = monotonic() + HERALD_SECONDS
            if monotonic() > until:
                await trio.lowlevel.checkpoint()
                until = monotonic() + HERALD_SECONDS
