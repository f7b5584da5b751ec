"""Writes the audit trail: the disk, or whoever reads the pipe, may be slow, full or gone."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import sys
from pathlib import Path
from threading import Condition, Thread

from ..kernel.fd import Fd, FileDescriptorLike, fileno
from ..limits import MAX_AUDIT_BYTES

_log = logging.getLogger("qmpfd")

#: Seconds that the daemon's end waits for lines to be written.
_CLOSE_TIMEOUT = 1.0


def open_audit(path: Path) -> Fd:
    """Open the file at *path* to append to it; a new one is its owner's only.  ``-`` is standard
    output.

    Raises:
        OSError: it cannot be opened.
    """
    if str(path) == "-":
        return Fd(fcntl.fcntl(sys.__stdout__ or 1, fcntl.F_DUPFD_CLOEXEC, 3))
    # A FIFO that nobody reads would hold up the start.
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK
    fd = Fd(os.open(path, flags, 0o600))
    fcntl.fcntl(fd, fcntl.F_SETFL, flags & ~os.O_NONBLOCK)
    return fd


class AuditWriter:
    """Writes lines in a thread of its own.  What cannot be written is left out, counted and said in
    the log: a full disk costs lines of the audit trail, and nothing else.

    Args:
        fd: where to; it stays the caller's.

    Raises:
        OSError: this process may not have another descriptor, or thread.
    """

    def __init__(self, fd: FileDescriptorLike) -> None:
        self._fd = Fd(os.dup(fileno(fd)))
        self._lines: list[bytes] = []
        self._size = 0  # of these, and of what is being written
        self._changed = Condition()
        self._closing = False
        self._lost = 0  # since the last line that was written
        self._torn = False  # the last line was written in part
        self._thread = Thread(target=self._run, name="audit", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as exc:
            self._fd.close()
            raise OSError(errno.EAGAIN, f"no thread for the audit trail: {exc}") from None

    def write(self, line: bytes) -> None:
        """Queue *line* for the thread."""
        with self._changed:
            if self._size + len(line) > MAX_AUDIT_BYTES:
                self._lose(1, "its reader is too slow")
                return
            self._lines.append(line)
            self._size += len(line)
            self._changed.notify()

    def close(self) -> None:
        """Write the lines that wait, for :data:`_CLOSE_TIMEOUT` at most."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(_CLOSE_TIMEOUT)

    def _run(self) -> None:
        with self._fd:  # it may be written to when nobody waits for the thread any more
            while data := self._next():
                left_out, reason = self._write_all(data)
                with self._changed:
                    self._size -= len(data)
                    if left_out:
                        self._lose(left_out, reason)
                    elif self._lost:
                        _log.warning("audit trail: %d lines were left out", self._lost)
                        self._lost = 0

    def _next(self) -> bytes:
        """What waits, once there is something; empty at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._lines or self._closing)
            data = b"".join(self._lines)
            self._lines.clear()
            return data

    def _write_all(self, data: bytes) -> tuple[int, str]:
        """Write lines; how many of them were not written, and why."""
        # What is torn is ended: the file may be another's by now too, and is never cut.
        rest = memoryview(b"\n" + data if self._torn else data)
        size = len(rest)
        try:
            while rest:
                rest = rest[os.write(self._fd.fileno(), rest) :]
        except OSError as exc:
            self._torn = self._torn or len(rest) < size
            return bytes(rest).count(b"\n"), exc.strerror or str(exc)
        self._torn = False
        return 0, ""

    def _lose(self, count: int, reason: str) -> None:
        if not self._lost:
            _log.error("audit trail: lines are left out: %s", reason)
        self._lost += count
