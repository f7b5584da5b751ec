"""The parent's log: on standard error, in the worker's format."""

from __future__ import annotations

import os
import select
import stat
import time

LEVELS = ("debug", "info", "warning", "error")
_PRIORITIES = (7, 6, 4, 3)  # sd-daemon(3)


class Log:
    """Writes lines without blocking: a line for which the pipe or the disk has no room is dropped.

    Args:
        form: ``text`` or ``json``.
        level: the lowest level to log: ``debug``, ``info``, ``warning`` or ``error``.
    """

    def __init__(self, form: str, level: str) -> None:
        self._json = form == "json"
        self._least = LEVELS.index(level)
        found = os.fstat(2)
        self._journal = os.environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"
        self._timed = stat.S_ISREG(found.st_mode) or os.isatty(2)  # else the reader adds the time
        self._rest = b""  # the unwritten end of the last line

    def log(self, level: str, message: str) -> None:
        """Write one line."""
        rank = LEVELS.index(level)
        if rank < self._least:
            return
        message = message.encode("ascii", "backslashreplace").decode()
        now = time.time()
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now))
        stamp += f".{int(now * 1000) % 1000:03}Z"
        if self._json:
            message = message.replace("\\", "\\\\").replace('"', '\\"')
            line = f'{{"time": "{stamp}", "level": "{level}", "message": "{message}"}}\n'
        else:
            line = f"qmpfd: {message}\n"
            if self._timed:
                line = f"{stamp} {line}"
            if self._journal:
                line = f"<{_PRIORITIES[rank]}>{line}"
        data = self._rest + line.encode()
        try:
            poll = select.poll()
            poll.register(2, select.POLLOUT)
            if poll.poll(0):
                self._rest = data[os.write(2, data) :]
        except OSError:
            pass
