"""Sees to it that there is a spare worker while a worker serves."""

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

#: Seconds from when a worker serves to the start of a spare one: it has better things to do then.
#: Doubled whenever a spare worker dies.
FIRST_DELAY, LAST_DELAY = 1.0, 60.0

#: Seconds that a spare worker has for its imports.
_IMPORT_TIMEOUT = 60.0

#: Seconds that it is waited for when it was killed.
_END_TIMEOUT = 1.0

#: Seconds until a message to the parent is sent again that it had no room for.
_RETRY = 0.1


class SpareKeeper:
    """Starts a spare worker whenever there is none, and has the parent know of it.

    Args:
        parent: the connection to the parent.
        store_size: how many descriptors it keeps.
        successor: the spare worker that this one has left behind; owned from here on.
    """

    def __init__(self, parent: Notifier, store_size: int, successor: Spare | None) -> None:
        self._parent = parent
        self._store_size = store_size
        self._spare = successor

    async def run(self) -> None:
        """Do so until cancelled, or until the parent is gone; then there is none any more."""
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
            except ConnectionError:  # the parent is gone
                _log.info("there is no spare worker any more: nobody could start it")
            finally:
                with trio.move_on_after(_END_TIMEOUT, shield=True):
                    await self._end_spare(deaths)

    async def _started(self) -> bool:
        """Start a spare worker; whether it is one by now."""
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
        """Give the parent the socket to it; whether it has been taken.

        Raises:
            ConnectionError: there is no parent any more.
        """
        try:
            self._parent.send(f"QMPFD_SPARE={started.pid}", [started.sock])
        except OSError as exc:
            # It has no room now, or other processes of this user have too much on its way.
            if exc.errno in (errno.EAGAIN, errno.ETOOMANYREFS, errno.ENOBUFS, errno.ENOMEM):
                return False
            raise
        # From here on the parent's is the only one: with it, the spare worker ends.
        started.sock.close()
        return True

    async def _end_spare(self, deaths: AsyncIterator[int]) -> None:
        """End it and wait for it.  Its end may hang, as that of a process does that has inherited a
        file of a FUSE mount that does not answer: there is no other one until then.
        """
        ended, self._spare = self._spare, None
        if ended is not None:
            ended.sock.close()
            os.kill(ended.pid, signal.SIGKILL)  # no other process has its pid: nobody waited for it
            await _end_of(ended.pid, deaths)


async def _end_of(pid: int, deaths: AsyncIterator[int]) -> None:
    """Wait for the end of a child: *deaths* are the signals of such."""
    while os.waitpid(pid, os.WNOHANG) == (0, 0):  # noqa: ASYNC222 - with WNOHANG it does not wait
        await anext(deaths)
