"""The daemon's process: its main task and its signals.  The one module here that imports Trio."""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import trio

from ..commands import Dialect
from ..kernel.fd import Fd
from ..kernel.systemd import (
    InheritedFd,
    announce_ready,
    forwarded_signals,
    notify,
    notify_reloading,
    repeat_notifications,
    watchdog_interval,
)
from ..limits import NOTIFY_RETRY, STATUS_INTERVAL, Limits
from ..policy import BadPolicy, Policy, load_policy
from ..server import Server, serve
from ..server.fdstore.mirror import FdStoreConfig
from ..server.fdstore.recover import Recovered
from ..server.takeover.receiver import ReceivedState
from .options import default_socket

_log = logging.getLogger("qmpfd")

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


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
    listen_fds: Sequence[InheritedFd],
    inheritance: ReceivedState | None,
    recovered: Recovered,
    keeping: FdStoreConfig | None,
    ready_fd: Fd | None,
) -> None:
    """Serve until told to end.

    Args:
        ready_fd: told once clients can connect, and closed.

    Raises:
        OSError: one of *paths* cannot be used.
    """
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
        listen_fds=[inherited.fd for inherited in listen_fds],
        inheritance=inheritance,
        recovered=recovered,
        keeping=keeping,
    )
    names = [str(path) for path in paths]
    names += [f"the inherited socket '{inherited.name}'" for inherited in listen_fds]
    trio.run(_main, start, names, inheritance, recovered.state.listeners, policy_path, ready_fd)


async def _main(
    start: partial[Coroutine[Any, Any, None]],
    names: Sequence[str],
    inheritance: ReceivedState | None,
    back_again: Sequence[str | None],
    policy_path: Path | None,
    ready_fd: Fd | None,
) -> None:
    before = back_again if inheritance is None else inheritance.state.listeners
    again = [path or "an inherited socket" for path in before]
    async with trio.open_nursery() as serving:
        with ExitStack() as stack:
            if inheritance is None:
                signals = stack.enter_context(trio.open_signal_receiver(*_SIGNALS))
                server: Server = await serving.start(start)
            else:
                # Until then a signal ends us at once, and the old daemon goes on with everything.
                inheritance.before_confirming = partial(
                    signal.pthread_sigmask, signal.SIG_BLOCK, _SIGNALS
                )
                server = await serving.start(start)
                signals = stack.enter_context(trio.open_signal_receiver(*_SIGNALS))
                signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
            # What is there by now stays: the collector need not look through it again, for 20 ms.
            gc.collect()
            gc.freeze()
            if again:
                how = "back again" if inheritance is None else "took over"
                _log.info("%s: listening on %s", how, ", ".join(again))
            for name in names:
                _log.info("listening on %s", name)
            if sys.stderr.isatty():
                default = default_socket() in (*names, *again)
                where = "" if default else " --socket PATH"
                _log.info("Ctrl-C ends it; qmpfd status%s shows what it does", where)
            if ready_fd is not None:
                announce_ready(ready_fd)
            await _look_after(server, policy_path, signals, serving)


async def _look_after(
    server: Server, policy_path: Path | None, signals: AsyncIterator[int], serving: trio.Nursery
) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_obey, server, policy_path, signals, serving)
        nursery.start_soon(_report, server)
        limit = watchdog_interval()
        if limit is not None:
            nursery.start_soon(_feed_watchdog, limit)
        await server.ended.wait()
        nursery.cancel_scope.cancel()
    serving.cancel_scope.cancel()


async def _obey(
    server: Server, policy_path: Path | None, signals: AsyncIterator[int], serving: trio.Nursery
) -> None:
    stops = 0
    async for number in signals:
        name = signal.Signals(number).name
        if number == signal.SIGHUP:
            await _reload(server, policy_path)
            continue
        stops += 1
        forwarded = forwarded_signals()
        # One that was sent to the parent and to us is not a second one.
        if max(forwarded, stops - forwarded) > 1:
            _log.warning("%s again: ending at once", name)
            serving.cancel_scope.cancel()
        elif stops == 1:
            _log.info("%s: ending once all is answered", name)
            notify("STOPPING=1")
            server.stop()


async def _report(server: Server) -> None:
    """Tell the service manager that we serve, and now and then how full we are."""
    # After a takeover, the process that it started is no longer the one that serves.
    if not notify("READY=1", f"MAINPID={os.getpid()}"):
        return
    told = ""
    while True:
        stats = server.daemon.stats
        status = (
            f"STATUS={server.store.fd_count} descriptors in {len(server.store)} fd sets, "
            f"{stats.connections} connections"
        )
        if status != told:
            notify(status)
        told = status
        await trio.sleep(STATUS_INTERVAL if repeat_notifications() else NOTIFY_RETRY)


async def _feed_watchdog(limit: float) -> None:
    """Tell the service manager that the loop still turns."""
    while True:
        notify("WATCHDOG=1")
        await trio.sleep(limit / 2)


async def _reload(server: Server, policy_path: Path | None) -> None:
    if policy_path is None:
        _log.warning("SIGHUP: there is no policy file to read again")
        return
    notify_reloading()
    try:
        # In a thread: the names in it may be looked up over the network.
        server.change_policy(await trio.to_thread.run_sync(load_policy, policy_path))
    except BadPolicy as exc:
        _log.error("SIGHUP: the policy stays as it was: %s", exc)
    else:
        _log.info("SIGHUP: the policy is read again from %s", policy_path)
    notify("READY=1")
