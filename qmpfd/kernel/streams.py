"""Writing to standard streams, which others share and nobody may be reading."""

from __future__ import annotations

import os
import select
import socket
import stat

from .fd import Fd


def write_nowait(number: int, data: bytes) -> int:
    """Write what can be written to a stream without waiting for its reader; how many bytes of
    *data* that was.  Up to PIPE_BUF bytes go whole or not at all (pipe(7)).

    O_NONBLOCK is a flag of the open file description, which the shell and other programs share: so
    a pipe or terminal is opened anew with it, and a socket is written with MSG_DONTWAIT.

    Args:
        number: the stream's descriptor.
        data: what to write.

    Raises:
        OSError: nobody will ever read it (EPIPE, EIO), or the disk is full.
    """
    mode = os.fstat(number).st_mode
    try:
        if stat.S_ISSOCK(mode):
            sock = socket.socket(fileno=number)
            try:
                return sock.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            finally:
                sock.detach()
        if stat.S_ISREG(mode):
            return os.write(number, data)
        return _write_anew(number, data)
    except BlockingIOError:
        return 0


def _write_anew(number: int, data: bytes) -> int:
    flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    try:
        opened = Fd(os.open(f"/proc/self/fd/{number}", flags))
    except OSError:  # no /proc, no permission, no descriptors
        # With room for PIPE_BUF bytes, poll(2) says that the pipe is ready; select(2) works where
        # no descriptors are allowed any more, and poll(2) fails.
        if not select.select([], [number], [], 0)[1]:
            return 0
        return os.write(number, data[: select.PIPE_BUF])
    with opened:
        return os.write(opened.fileno(), data)
