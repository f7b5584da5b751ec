"""Non-blocking writes to standard streams, which other processes share and may not read."""

from __future__ import annotations

import os
import select
import socket
import stat

from .fd import BorrowedSocket, Fd


def write_nowait(number: int, data: bytes) -> int:
    """Write as much of *data* as possible without blocking; return the number of bytes written.

    Up to PIPE_BUF bytes are written whole or not at all (pipe(7)).  O_NONBLOCK is a flag of the
    open file description, which other programs share: therefore a pipe or terminal is opened a
    second time with O_NONBLOCK, and a socket is written to with MSG_DONTWAIT.

    Args:
        number: the stream's descriptor.
        data: the bytes.

    Raises:
        OSError: the reader has closed its end (EPIPE, EIO), or the disk is full.
    """
    mode = os.fstat(number).st_mode
    try:
        if stat.S_ISSOCK(mode):
            with BorrowedSocket(number) as sock:
                return sock.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        if stat.S_ISREG(mode):
            return os.write(number, data)
        return _write_anew(number, data)
    except BlockingIOError:
        return 0


def _write_anew(number: int, data: bytes) -> int:
    flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    try:
        opened = Fd(os.open(f"/proc/self/fd/{number}", flags))
    except OSError:  # no /proc, no permission, or out of descriptors
        # A pipe is writable if it has room for PIPE_BUF bytes.  select(2), because poll(2) fails if
        # RLIMIT_NOFILE is 0.
        if not select.select([], [number], [], 0)[1]:
            return 0
        return os.write(number, data[: select.PIPE_BUF])
    with opened:
        return os.write(opened.fileno(), data)
