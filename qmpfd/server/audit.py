"""Writer of the audit trail: write(2) to a file or a pipe may block or fail, the daemon goes on."""

from __future__ import annotations

import errno
import logging
import os
import stat
import sys
from contextlib import suppress
from pathlib import Path
from threading import Condition, Thread

from ..kernel.fd import Fd, FileDescriptorLike, duplicate
from ..kernel.files import open_without_waiting
from ..limits import MAX_AUDIT_BYTES

_log = logging.getLogger("qmpfd")

#: Seconds that the daemon waits at its end for queued lines to be written.
_CLOSE_TIMEOUT = 1.0


def open_audit(path: Path) -> Fd:
    """Open the file at *path* for appending; create it with mode 0600.  ``-`` is standard output.

    Raises:
        OSError: open(2) failed.
    """
    if str(path) == "-":
        return duplicate(sys.__stdout__ or 1, 3)
    return open_without_waiting(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)


class AuditWriter:
    """Writes lines in a thread of its own.  Lines that cannot be written are dropped, counted and
    reported in the log: a full disk costs lines of the audit trail, and nothing else.

    Args:
        fd: file or pipe to write to; the caller keeps it, this object writes to a duplicate.

    Raises:
        OSError: the process is out of descriptors or threads.
    """

    def __init__(self, fd: FileDescriptorLike) -> None:
        self._fd = duplicate(fd)
        self._lines: list[bytes] = []
        self._size = 0  # bytes queued and bytes in the write(2) under way
        self._changed = Condition()
        self._closing = False
        self._lost = 0  # lines dropped since the last successful write
        self._torn = False  # the last line was written in part only
        self._thread = Thread(target=self._run, name="audit", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as exc:
            self._fd.close()
            raise OSError(errno.EAGAIN, f"no thread for the audit trail: {exc}") from None

    def write(self, line: bytes) -> None:
        """Queue *line* for the thread, or drop it when :data:`MAX_AUDIT_BYTES` are queued."""
        with self._changed:
            if self._size + len(line) > MAX_AUDIT_BYTES:
                self._lose(1, "its reader is too slow")
                return
            self._lines.append(line)
            self._size += len(line)
            self._changed.notify()

    def close(self) -> None:
        """Wait up to :data:`_CLOSE_TIMEOUT` until the thread has written the queued lines."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(_CLOSE_TIMEOUT)

    def _run(self) -> None:
        with self._fd:  # closed by this thread: it may still write after close() has timed out
            self._torn = _ends_inside_line(self._fd.fileno())
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
        """Wait for queued lines and dequeue all of them; return b"" after :meth:`close`."""
        with self._changed:
            self._changed.wait_for(lambda: self._lines or self._closing)
            data = b"".join(self._lines)
            self._lines.clear()
            return data

    def _write_all(self, data: bytes) -> tuple[int, str]:
        """Write lines; return the number of lines not written, and the reason."""
        # A torn line is ended with a newline, not truncated: other processes may append as well.
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


def _ends_inside_line(number: int) -> bool:
    """Return whether a regular file ends inside a line: the daemon before this one has died
    after a short write, or the machine has.
    """
    if stat.S_ISREG(os.fstat(number).st_mode):
        # Opened again: the descriptor itself is for writing only.
        with suppress(OSError), open(f"/proc/self/fd/{number}", "rb", buffering=0) as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) != b"\n"
    return False
