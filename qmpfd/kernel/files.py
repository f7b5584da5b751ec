"""Opens files: /dev/null, FIFOs without waiting for their other end, and files in memory."""

from __future__ import annotations

import fcntl
import os

from .fd import Fd


def open_null() -> Fd:
    """Open /dev/null for reading: a placeholder for a descriptor number, or to send.

    Raises:
        OSError: this process is out of descriptors.
    """
    return Fd(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))


def open_without_waiting(path: str | os.PathLike[str], flags: int, mode: int = 0o666) -> Fd:
    """Open *path* with O_NONBLOCK, which is cleared afterwards: open(2) of a FIFO must not wait for
    the FIFO's other end.

    Raises:
        OSError: open(2) failed.
        ValueError: *path* has a null byte.
    """
    fd = Fd(os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC, mode))
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_NONBLOCK)
    except BaseException:
        fd.close()
        raise
    return fd


def memory_file(name: str, data: bytes | bytearray) -> Fd:
    """Create a file in memory (memfd_create(2)) with the contents *data*.

    Raises:
        OSError: this process is out of descriptors, or the system out of memory.
    """
    memory = Fd(os.memfd_create(name, os.MFD_CLOEXEC))
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(memory.fileno(), view) :]
    except BaseException:
        memory.close()
        raise
    return memory


def contents(memory: Fd) -> bytes:
    """Return the contents of a file in memory."""
    size = os.lseek(memory.fileno(), 0, os.SEEK_END)
    return os.pread(memory.fileno(), size, 0)
