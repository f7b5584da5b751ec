"""The daemon's process: its main task and its signals."""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import trio

from ..kernel.fd import Fd
from ..kernel.systemd import Notifier, announce_ready, watchdog_interval
from ..limits import STATUS_INTERVAL
from ..policy import load_policy
from ..server.maintenance import supervise
from ..server.server import DaemonServer
from ..server.takeover.receiver import Takeover
from ..supervisor.signals import FORWARDED, QUIT_IGNORED, set_up_signals
from .notifications import Notifications
from .options import default_socket

_log = logging.getLogger("qmpfd")

_SIGNALS = (*FORWARDED, signal.SIGQUIT)


def run(
    serve: Callable[..., Awaitable[None]],
    takeover: Takeover | None,
    listening: Sequence[str],
    before: Sequence[str],
    *,
    policy_path: Path | None,
    ready_fd: Fd | None,
    parent: Notifier | None,
) -> None:
    """Serve until a signal or ``quit`` ends the daemon.

    Args:
        serve: :func:`run_daemon` with its arguments.
        takeover: the takeover among these arguments, or None.
        listening: names of the new sockets, for the log.
        before: names of the sockets of the predecessor, or of this daemon before a restart.
        policy_path: the policy file, or None.
        ready_fd: gets a newline once clients can connect, and is closed.
        parent: connection to the parent of ``serve --supervise``, or None.

    Raises:
        OSError: one of the sockets cannot be bound.
    """

    async def main() -> None:
        async with trio.open_nursery() as serving:
            with ExitStack() as stack:
                server, signals = await _started(serving, serve, takeover, stack)
                _log_sockets(listening, before, "restarted" if takeover is None else "took over")
                if ready_fd is not None:
                    announce_ready(ready_fd)
                notifications = Notifications(parent)
                stack.callback(notifications.close)
                process = _Process(server, serving, notifications, parent, policy_path)
                await process.run(signals)

    trio.run(main)
    set_up_signals(())  # the daemon has ended: another SIGTERM must not change the exit status


async def _started(
    serving: trio.Nursery,
    start: Callable[..., Awaitable[None]],
    takeover: Takeover | None,
    stack: ExitStack,
) -> tuple[DaemonServer, AsyncIterator[int]]:
    """Start the daemon; return the server, and an iterator over the signals received since."""
    if takeover is None:
        signals = stack.enter_context(trio.open_signal_receiver(*_SIGNALS))
        server: DaemonServer = await serving.start(start)
        gc.freeze()  # exempt all present objects, without the time of a collection
        gc.enable()
        return server, signals
    # Before that, a signal ends this process at once, and the predecessor goes on serving.
    takeover.before_confirming = partial(signal.pthread_sigmask, signal.SIG_BLOCK, _SIGNALS)
    server = await serving.start(start)
    signals = stack.enter_context(trio.open_signal_receiver(*_SIGNALS))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    return server, signals


def _log_sockets(names: Sequence[str], before: Sequence[str], how: str) -> None:
    if before:
        _log.info("%s: listening on %s", how, ", ".join(before))
    for name in names:
        _log.info("listening on %s", name)
    if sys.stderr.isatty():
        where = "" if default_socket() in (*names, *before) else " --socket PATH"
        _log.info("Ctrl-C stops the daemon; qmpfd status%s shows its state", where)


@dataclass
class _Process:
    """Tasks of a daemon's process beside serving: signals, and messages to the service manager.

    The first SIGTERM or SIGINT ends the daemon gracefully, a second one at once.  SIGHUP reads the
    policy again, and binds sockets whose files are missing.  The next SIGHUP, and the daemon's end,
    cancel a reload that hangs, on a FIFO in the file's place or a name service without an answer.

    Args:
        server: the daemon.
        serving: nursery of the daemon; cancelling it ends the daemon at once.
        notifications: messages to the service manager.
        parent: connection to the parent of ``serve --supervise``, which forwards signals; or None.
        policy_path: the policy file, or None.
    """

    server: DaemonServer
    serving: trio.Nursery
    notifications: Notifications
    parent: Notifier | None
    policy_path: Path | None
    _stops: int = 0
    _reload_requested: trio.Event = field(default_factory=trio.Event)
    _reloading: trio.CancelScope = field(default_factory=trio.CancelScope)

    async def run(self, signals: AsyncIterator[int]) -> None:
        """Run these tasks until the daemon has ended."""
        self._notify_ready()
        tasks: dict[str, Callable[[], Awaitable[None]]] = {
            "handling signals": partial(self._handle_signals, signals),
            "reloading": self._reload,
        }
        if self.notifications.wanted:
            tasks["notifying the service manager"] = self.notifications.resend
            tasks["reporting the status"] = self._report_status
            if limit := watchdog_interval():
                tasks["feeding the watchdog"] = partial(self._feed_watchdog, limit)
        async with trio.open_nursery() as nursery:
            for name, task in tasks.items():
                nursery.start_soon(supervise, name, task)
            await self.server.ended.wait()
            nursery.cancel_scope.cancel()
        self.serving.cancel_scope.cancel()

    async def _handle_signals(self, signals: AsyncIterator[int]) -> None:
        async for number in signals:
            if number == signal.SIGHUP:
                self._reload_requested.set()
                self._reloading.cancel()
            elif number == signal.SIGQUIT:
                _log.warning(QUIT_IGNORED)
            else:
                self._stop(signal.Signals(number).name)

    def _stop(self, name: str) -> None:
        self._stops += 1
        forwarded = 0
        if self.parent is not None:
            with suppress(EOFError):
                while self.parent.receive():
                    pass
            forwarded = self.parent.signals
        # A signal sent to both the parent and this process (Ctrl-C) counts once.
        if max(forwarded, self._stops - forwarded) > 1:
            _log.warning("%s again: stopping at once", name)
            self.serving.cancel_scope.cancel()
        elif self._stops == 1:
            _log.info("%s: stopping after the received requests", name)
            self.notifications.notify("STOPPING=1")
            self.server.stop()

    async def _reload(self) -> None:
        while True:
            await self._reload_requested.wait()
            self._reload_requested = trio.Event()
            with trio.CancelScope() as self._reloading:
                self.notifications.notify(
                    "RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}"
                )
                async with trio.open_nursery() as nursery:  # neither waits for the other
                    nursery.start_soon(self.server.bind_lost_sockets)
                    nursery.start_soon(self._reload_policy)
                self._notify_ready()

    async def _reload_policy(self) -> None:
        path = self.policy_path
        if path is None:
            _log.warning("SIGHUP: there is no policy file to read again")
            return
        try:
            # In a thread, with a limiter of its own: NSS may look up names over the network.
            policy = await trio.to_thread.run_sync(
                load_policy, path, abandon_on_cancel=True, limiter=trio.CapacityLimiter(1)
            )
            self.server.change_policy(policy)
        except Exception as exc:  # noqa: BLE001 - of TOML, the file system or NSS: of any class
            _log.error(
                "SIGHUP: the policy stays as it was, because the file cannot be used: %s",
                str(exc) or repr(exc),
            )
        else:
            _log.info("SIGHUP: the policy is read again from %s", path)

    def _notify_ready(self) -> None:
        # MAINPID: after a takeover this process is not the one that the service manager started.
        self.notifications.notify("READY=1", f"MAINPID={os.getpid()}")

    async def _report_status(self) -> None:
        """Send the numbers of descriptors and connections every STATUS_INTERVAL, if changed."""
        reported = ""
        while True:
            store, sessions = self.server.store, self.server.sessions
            status = (
                f"STATUS={store.fd_count} descriptors in {len(store)} fd sets, "
                f"{len(sessions)} connections"
            )
            if status != reported:
                self.notifications.notify(status)
            reported = status
            await trio.sleep(STATUS_INTERVAL)

    async def _feed_watchdog(self, limit: float) -> None:
        """Send WATCHDOG=1 twice per *limit* seconds, while the event loop runs."""
        while True:
            self.notifications.notify("WATCHDOG=1")
            await trio.sleep(limit / 2)
