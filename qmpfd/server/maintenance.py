"""Background tasks of the daemon: expiry, hang-ups, events, eviction.

No exception of theirs may end the daemon, which holds other people's descriptors: each task runs
under :func:`supervise`.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterable
from math import inf
from time import monotonic

import trio

from ..fdsets import StoredFd
from ..kernel.fd import Fd
from ..limits import (
    BROADCAST_SECONDS,
    EVICTION_INTERVAL,
    HANGUP_RECHECK,
    MAX_RESTART_DELAY,
    MIN_RESTART_DELAY,
)
from .connection.session import Session
from .services import Services

_log = logging.getLogger("qmpfd")

#: Descriptors that are removed, or checked, before other tasks get to run.
_BATCH = 128


async def supervise(name: str, task: Callable[[], Awaitable[None]]) -> None:
    """Run a background task, and restart it after every exception.  The delay doubles with each
    failure, and is reset once the task has run for longer than MAX_RESTART_DELAY.

    Args:
        name: what the task does, for the log: "the expiry of descriptors".
        task: the task; supervision ends when it returns.
    """
    delay = MIN_RESTART_DELAY
    while True:
        started = trio.current_time()
        try:
            await task()
        except Exception:  # noqa: BLE001 - no exception of a task may end the daemon
            if trio.current_time() - started > MAX_RESTART_DELAY:
                delay = MIN_RESTART_DELAY
            _log.exception("%s failed; the next try is in %g s", name, delay)
        else:
            return
        await trio.sleep(delay)
        delay = min(2 * delay, MAX_RESTART_DELAY)


async def _remove_due(services: Services, due: Callable[[], list[StoredFd]], reason: str) -> bool:
    """Remove and close the descriptors that *due* returns; return whether there were any."""
    fds: list[Fd] = []
    try:
        async with services.locked():
            services.shared.remove(due(), reason, fds)
    finally:
        services.durability.close_after_sync(fds)
    await trio.lowlevel.checkpoint()
    return bool(fds)


async def remove_expired(services: Services) -> None:
    """Remove each descriptor when its lifetime ends."""
    store = services.shared.store
    while True:
        with trio.CancelScope() as scope:

            def reschedule(scope: trio.CancelScope = scope) -> None:
                due = store.expiries.next()
                scope.deadline = inf if due is None else due

            reschedule()
            services.shared.on_expiry = reschedule
            await trio.sleep_forever()
        while await _remove_due(
            services, lambda: store.expired(trio.current_time(), _BATCH), "expired"
        ):
            pass


async def remove_hung_up(services: Services) -> None:
    """Remove each watched socket and pipe whose peer has closed it and that has no unread data."""
    hangups = services.shared.hangups
    while True:
        with trio.move_on_after(HANGUP_RECHECK if hangups.draining else inf):
            await trio.lowlevel.wait_readable(hangups.fileno())
        hangups.poll()
        while hangups.due:
            await _remove_due(services, lambda: hangups.examine(_BATCH), "hangup")


async def broadcast_events(services: Services) -> None:
    """Send events as they come, to one watcher after the other; other tasks run after every
    BROADCAST_SECONDS, however many clients watch.
    """
    while True:
        pending = trio.Event()
        services.shared.on_event = pending.set
        until = monotonic() + BROADCAST_SECONDS
        for watcher in list(services.shared.watchers):
            more = True
            while more:
                more = watcher.send()
                if monotonic() > until:
                    await trio.lowlevel.checkpoint()
                    until = monotonic() + BROADCAST_SECONDS
        await pending.wait()


async def evict_idle(services: Services, sessions: Iterable[Session]) -> None:
    """Disconnect each client that does not negotiate in time, or is idle for too long.

    *sessions* is the server's own set, which changes meanwhile.
    """
    while True:
        await trio.sleep(EVICTION_INTERVAL)
        await services.lifecycle.wait_running()
        now = trio.current_time()
        for session in list(sessions):
            session.evict_if_idle(now)
