"""The daemon's process: its main task and its signals.  The one module here that imports Trio."""

from __future__ import annotations

import logging
import resource
import signal
from collections.abc import AsyncIterator, Coroutine, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import trio

from ..commands import Dialect
from ..fd import Fd
from ..limits import Limits
from ..policy import BadPolicy, Policy, load_policy
from ..server import Server, serve

_log = logging.getLogger("qmpfd")


def run(
    paths: Sequence[Path],
    *,
    dialect: Dialect,
    limits: Limits,
    policy: Policy | None,
    policy_path: Path | None,
    metrics_path: Path | None,
    socket_mode: int,
    socket_group: int | None,
    initial_fds: Sequence[tuple[Fd, int, str | None]],
) -> None:
    """Serve until told to end.

    Raises:
        OSError: one of *paths* cannot be used.
    """
    _raise_open_files_limit()
    start = partial(
        serve,
        paths,
        dialect=dialect,
        limits=limits,
        policy=policy,
        metrics_path=metrics_path,
        socket_mode=socket_mode,
        socket_group=socket_group,
        initial_fds=initial_fds,
    )
    trio.run(_main, start, paths, policy_path)


def _raise_open_files_limit() -> None:
    """Allow ourselves as many descriptors as we may: they are what this process is for."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


async def _main(
    start: partial[Coroutine[Any, Any, None]], paths: Sequence[Path], policy_path: Path | None
) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
        async with trio.open_nursery() as nursery:
            server: Server = await nursery.start(start)
            for path in paths:
                _log.info("listening on %s", path)
            nursery.start_soon(_obey, server, policy_path, signals, nursery)
            await server.ended.wait()
            nursery.cancel_scope.cancel()


async def _obey(
    server: Server, policy_path: Path | None, signals: AsyncIterator[int], nursery: trio.Nursery
) -> None:
    told = False
    async for number in signals:
        name = signal.Signals(number).name
        if number == signal.SIGHUP:
            _reload(server, policy_path)
        elif told:
            _log.warning("%s again: ending at once", name)
            nursery.cancel_scope.cancel()
        else:
            _log.info("%s: ending once all is answered", name)
            told = True
            server.stop()


def _reload(server: Server, policy_path: Path | None) -> None:
    if policy_path is None:
        _log.warning("SIGHUP: there is no policy file to read again")
        return
    try:
        server.change_policy(load_policy(policy_path))
    except BadPolicy as exc:
        _log.error("SIGHUP: the policy stays as it was: %s", exc)
    else:
        _log.info("SIGHUP: the policy is read again from %s", policy_path)
