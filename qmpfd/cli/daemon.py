"""The daemon's process: its main task and its signals.  The one module here that imports Trio."""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

import trio

from ..kernel.fd import Fd
from ..kernel.systemd import InheritedFd, Notifier, announce_ready, watchdog_interval
from ..limits import STATUS_INTERVAL
from ..policy import load_policy
from ..server.fdstore.mirror import FdStoreConfig
from ..server.fdstore.recover import Recovered
from ..server.maintenance import supervise
from ..server.saved_state import SavedListener
from ..server.server import DaemonServer
from ..server.startup import run_daemon
from ..server.takeover.receiver import Takeover
from .notifications import Notifications
from .options import default_socket
from .spare import Spare
from .spare_keeper import SpareKeeper

_log = logging.getLogger("qmpfd")

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def run(
    paths: Sequence[Path],
    *,
    policy_path: Path | None,
    listen_fds: Sequence[InheritedFd],
    takeover: Takeover | None,
    recovered: Recovered,
    ready_fd: Fd | None,
    keeping: FdStoreConfig | None,
    parent: Notifier | None,
    successor: Spare | None,
    **options: Any,
) -> None:
    """Serve until told to end.

    Args:
        ready_fd: told once clients can connect, and closed.
        parent: the parent of ``serve --supervise``, if there is one.
        successor: the spare worker that this process has left behind; owned from here on.
        options: further arguments of :func:`run_daemon`.

    Raises:
        OSError: one of *paths* cannot be used.
    """
    start = partial(
        run_daemon,
        paths,
        listen_fds=[inherited.fd for inherited in listen_fds],
        takeover=takeover,
        recovered=recovered,
        keeping=keeping,
        **options,
    )
    names = [str(path) for path in paths]
    names += [f"the inherited socket '{inherited.name}'" for inherited in listen_fds]
    spares = None
    if parent is not None and keeping is not None:
        spares = SpareKeeper(parent, keeping.size, successor)
    before = (takeover or recovered).state.listeners
    trio.run(_main, start, names, takeover, before, policy_path, ready_fd, parent, spares)


def _exempt_from_collection() -> None:
    """Have the garbage collector skip all present objects (gc.freeze): a pass takes it 20 ms."""
    gc.collect()
    gc.freeze()


async def _main(
    start: partial[Coroutine[Any, Any, None]],
    names: Sequence[str],
    takeover: Takeover | None,
    before: Sequence[SavedListener],
    policy_path: Path | None,
    ready_fd: Fd | None,
    parent: Notifier | None,
    spares: SpareKeeper | None,
) -> None:
    again = [listener.name for listener in before]
    async with trio.open_nursery() as serving:
        with ExitStack() as stack:
            if takeover is None:
                signals = stack.enter_context(trio.open_signal_receiver(*_SIGNALS))
                server: DaemonServer = await serving.start(start)
            else:
                takeover.before_pausing = _exempt_from_collection
                # Until then a signal ends us at once, and the old daemon goes on with everything.
                takeover.before_confirming = partial(
                    signal.pthread_sigmask, signal.SIG_BLOCK, _SIGNALS
                )
                server = await serving.start(start)
                signals = stack.enter_context(trio.open_signal_receiver(*_SIGNALS))
                signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
            if takeover is None:
                gc.freeze()  # as _exempt_from_collection, without the time that it takes
                gc.enable()
            if again:
                how = "restarted" if takeover is None else "took over"
                _log.info("%s: listening on %s", how, ", ".join(again))
            for name in names:
                _log.info("listening on %s", name)
            if sys.stderr.isatty():
                default = default_socket() in (*names, *again)
                where = "" if default else " --socket PATH"
                _log.info("Ctrl-C stops the daemon; qmpfd status%s shows its state", where)
            if ready_fd is not None:
                announce_ready(ready_fd)
            notifications = Notifications(parent)
            stack.callback(notifications.close)
            notifications.tell(*_ready())
            await _look_after(server, notifications, parent, policy_path, signals, serving, spares)


async def _look_after(
    server: DaemonServer,
    notifications: Notifications,
    parent: Notifier | None,
    policy_path: Path | None,
    signals: AsyncIterator[int],
    serving: trio.Nursery,
    spares: SpareKeeper | None,
) -> None:
    reloader = _Reloader(server, policy_path, notifications)
    handler = _SignalHandler(server, parent, notifications, reloader, serving)
    tasks: list[tuple[str, Callable[[], Awaitable[None]]]] = [
        ("handling signals", partial(handler.run, signals)),
        ("reloading", reloader.run),
    ]
    if spares is not None:
        tasks.append(("keeping a spare worker", spares.run))
    if notifications.wanted:
        tasks.append(("notifying the service manager", notifications.resend))
        tasks.append(("reporting the status", partial(_report_status, server, notifications)))
        if limit := watchdog_interval():
            tasks.append(("feeding the watchdog", partial(_feed_watchdog, notifications, limit)))
    async with trio.open_nursery() as nursery:
        for name, task in tasks:
            nursery.start_soon(supervise, name, task)
        await server.ended.wait()
        nursery.cancel_scope.cancel()
    serving.cancel_scope.cancel()


class _SignalHandler:
    """Carries out what signals ask for: the first SIGTERM or SIGINT ends the daemon gracefully, a
    second one at once, SIGHUP reloads.

    Args:
        server: the daemon.
        parent: the parent of ``serve --supervise``, which forwards signals too.
        notifications: tells the service manager.
        reloader: carries out SIGHUP.
        serving: cancelled, it ends the daemon at once.
    """

    def __init__(
        self,
        server: DaemonServer,
        parent: Notifier | None,
        notifications: Notifications,
        reloader: _Reloader,
        serving: trio.Nursery,
    ) -> None:
        self._server = server
        self._parent = parent
        self._notifications = notifications
        self._reloader = reloader
        self._serving = serving
        self._stops = 0

    async def run(self, signals: AsyncIterator[int]) -> None:
        """Handle signals as they come."""
        async for number in signals:
            if number == signal.SIGHUP:
                self._reloader.request()
            else:
                self._stop(signal.Signals(number).name)

    def _stop(self, name: str) -> None:
        self._stops += 1
        forwarded = 0
        if self._parent is not None:
            with suppress(EOFError):
                while self._parent.receive():
                    pass
            forwarded = self._parent.signals
        # One that was sent to the parent and to us is not a second one.
        if max(forwarded, self._stops - forwarded) > 1:
            _log.warning("%s again: stopping at once", name)
            self._serving.cancel_scope.cancel()
        elif self._stops == 1:
            _log.info("%s: stopping after the received requests", name)
            self._notifications.tell("STOPPING=1")
            self._server.stop()


class _Reloader:
    """Carries out SIGHUP: reads the policy again, and makes lost socket files anew.

    The newest request counts: one that hangs, on a FIFO in the file's place or a name service that
    does not answer, is abandoned for the next one and at the daemon's end.

    Args:
        server: the daemon.
        policy_path: the policy file, if there is one.
        notifications: tells the service manager.
    """

    def __init__(
        self, server: DaemonServer, policy_path: Path | None, notifications: Notifications
    ) -> None:
        self._server = server
        self._policy_path = policy_path
        self._notifications = notifications
        self._requested = trio.Event()
        self._scope = trio.CancelScope()

    def request(self) -> None:
        """Reload, and abandon a reload that is under way."""
        self._requested.set()
        self._scope.cancel()

    async def run(self) -> None:
        """Carry out requests as they come."""
        while True:
            await self._requested.wait()
            self._requested = trio.Event()
            with trio.CancelScope() as self._scope:
                self._notifications.tell(
                    "RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}"
                )
                async with trio.open_nursery() as nursery:  # either may have to wait
                    nursery.start_soon(self._server.bind_lost_sockets)
                    nursery.start_soon(self._reload_policy)
                self._notifications.tell(*_ready())

    async def _reload_policy(self) -> None:
        path = self._policy_path
        if path is None:
            _log.warning("SIGHUP: there is no policy file to read again")
            return
        try:
            # In a thread of its own, as the names in it may be looked up over the network.
            policy = await trio.to_thread.run_sync(
                load_policy, path, abandon_on_cancel=True, limiter=trio.CapacityLimiter(1)
            )
            self._server.change_policy(policy)
        except Exception as exc:  # noqa: BLE001 - TOML, the file system and NSS raise what they like
            _log.error(
                "SIGHUP: the policy stays as it was, because the file cannot be used: %s",
                str(exc) or repr(exc),
            )
        else:
            _log.info("SIGHUP: the policy is read again from %s", path)


def _ready() -> tuple[str, str]:
    # After a takeover, the process that the service manager started no longer serves.
    return "READY=1", f"MAINPID={os.getpid()}"


async def _report_status(server: DaemonServer, notifications: Notifications) -> None:
    """Tell the service manager now and then how full we are."""
    reported = ""
    while True:
        stats = server.daemon.stats
        status = (
            f"STATUS={server.store.fd_count} descriptors in {len(server.store)} fd sets, "
            f"{stats.connections} connections"
        )
        if status != reported:
            notifications.tell(status)
        reported = status
        await trio.sleep(STATUS_INTERVAL)


async def _feed_watchdog(notifications: Notifications, limit: float) -> None:
    """Tell the service manager that the loop still turns."""
    while True:
        notifications.tell("WATCHDOG=1")
        await trio.sleep(limit / 2)
