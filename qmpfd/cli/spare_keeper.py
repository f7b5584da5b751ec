"""Keeps a spare worker running while a worker serves."""

from __future__ import annotations

import errno
import logging
import os
import signal
from collections.abc import AsyncIterator
from contextlib import suppress

import trio

from ..kernel.systemd import Notifier
from . import spare
from .spare import Spare

_log = logging.getLogger("qmpfd")

#: Seconds from the start of a worker to that of a spare one: clients are served first.  Doubled
#: whenever a spare worker dies.
FIRST_DELAY, LAST_DELAY = 1.0, 60.0

#: Seconds that a spare worker has for its imports.
_IMPORT_TIMEOUT = 60.0

#: Seconds to wait for the end of a spare worker after SIGKILL.
_END_TIMEOUT = 1.0

#: Seconds until a message is retried for which the parent had no room.
_RETRY = 0.1


class SpareKeeper:
    """Starts a spare worker whenever none runs, and passes its socket to the parent.

    Args:
        parent: connection to the parent.
        store_size: number of descriptors that the parent keeps at most.
        successor: the spare worker that this process has forked; owned from here on.
    """

    def __init__(self, parent: Notifier, store_size: int, successor: Spare | None) -> None:
        self._parent = parent
        self._store_size = store_size
        self._spare = successor

    async def run(self) -> None:
        """Keep a spare worker running until cancelled, or until the parent dies; then end it."""
        delay = FIRST_DELAY
        with trio.open_signal_receiver(signal.SIGCHLD) as deaths:
            try:
                while True:
                    if self._spare is None:
                        await trio.sleep(delay)
                        delay = min(2 * delay, LAST_DELAY)
                        if not await self._started():
                            _log.warning("no spare worker has started: trying again in %g s", delay)
                            await self._end_spare(deaths)
                    elif not self._offer(self._spare):
                        await trio.sleep(_RETRY)
                    else:
                        await _end_of(self._spare.pid, deaths)
                        self._spare = None
                        _log.warning("the spare worker has ended: starting another in %g s", delay)
            except ConnectionError:  # the parent has died
                _log.info("there is no spare worker any more: nobody could start it")
            finally:
                with trio.move_on_after(_END_TIMEOUT, shield=True):
                    await self._end_spare(deaths)

    async def _started(self) -> bool:
        """Start a spare worker; return whether it has imported its modules in time."""
        try:
            started = self._spare = spare.spawn(self._store_size)
        except OSError:  # out of processes, memory or descriptors
            return False
        with trio.move_on_after(_IMPORT_TIMEOUT):
            await trio.lowlevel.wait_readable(started.sock.fileno())
            with suppress(ConnectionError):
                return os.read(started.sock.fileno(), len(spare.READY)) == spare.READY
        return False

    def _offer(self, started: Spare) -> bool:
        """Send the parent the socket to the spare worker; return whether there was room for it.

        Raises:
            ConnectionError: the parent has died.
        """
        try:
            self._parent.send(f"QMPFD_SPARE={started.pid}", [started.sock])
        except OSError as exc:
            # The parent's queue is full, or this user has too many descriptors in flight (unix(7)).
            if exc.errno in (errno.EAGAIN, errno.ETOOMANYREFS, errno.ENOBUFS, errno.ENOMEM):
                return False
            raise
        # From here on only the parent has this socket: the spare worker ends when the parent does.
        started.sock.close()
        return True

    async def _end_spare(self, deaths: AsyncIterator[int]) -> None:
        """Kill the spare worker and wait for its end.  The end may hang, if the process has a file
        of a FUSE mount that does not answer: no other spare worker is started until then.
        """
        ended, self._spare = self._spare, None
        if ended is not None:
            ended.sock.close()
            os.kill(ended.pid, signal.SIGKILL)  # the pid is not reused before waitpid(2)
            await _end_of(ended.pid, deaths)


async def _end_of(pid: int, deaths: AsyncIterator[int]) -> None:
    """Wait for the end of a child process; *deaths* iterates over SIGCHLD signals."""
    while os.waitpid(pid, os.WNOHANG) == (0, 0):  # noqa: ASYNC222 - with WNOHANG it does not wait
        await anext(deaths)
