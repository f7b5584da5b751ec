"""The daemon's process: its main task and its signals.  The one module here that imports Trio."""

from __future__ import annotations

import logging
import signal
from collections.abc import AsyncIterator, Coroutine, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import trio

from ..commands import Dialect
from ..fd import Fd
from ..limits import Limits
from ..server import Server, serve

_log = logging.getLogger("qmpfd")


def run(
    paths: Sequence[Path],
    *,
    dialect: Dialect,
    limits: Limits,
    socket_mode: int,
    initial_fds: Sequence[tuple[Fd, int, str | None]],
) -> None:
    """Serve until told to end.

    Raises:
        OSError: one of *paths* cannot be used.
    """
    start = partial(
        serve,
        paths,
        dialect=dialect,
        limits=limits,
        socket_mode=socket_mode,
        initial_fds=initial_fds,
    )
    trio.run(_main, start, paths)


async def _main(start: partial[Coroutine[Any, Any, None]], paths: Sequence[Path]) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with trio.open_nursery() as nursery:
            server: Server = await nursery.start(start)
            for path in paths:
                _log.info("listening on %s", path)
            nursery.start_soon(_obey, server, signals, nursery)
            await server.ended.wait()
            nursery.cancel_scope.cancel()


async def _obey(server: Server, signals: AsyncIterator[int], nursery: trio.Nursery) -> None:
    told = False
    async for number in signals:
        name = signal.Signals(number).name
        if told:
            _log.warning("%s again: ending at once", name)
            nursery.cancel_scope.cancel()
        else:
            _log.info("%s: ending once all is answered", name)
            told = True
            server.stop()
