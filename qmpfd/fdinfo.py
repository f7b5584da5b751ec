"""What a descriptor is, found out without waiting for any file system.

``fstat`` asks the file system, and one that hangs would hang us (a FUSE server that does not
answer).  These do not: fcntl F_GETFL, the link in /proc/self/fd, and statx(2) with
AT_STATX_DONT_SYNC, which answers from what the kernel has at hand.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import re
import stat
from collections.abc import Callable
from functools import cache
from typing import Literal, NamedTuple, TypeAlias

Access: TypeAlias = Literal["rdonly", "wronly", "rdwr", "path"]

_ACCESS: dict[int, Access] = {os.O_RDONLY: "rdonly", os.O_WRONLY: "wronly", os.O_RDWR: "rdwr"}


def access_mode(fd: int) -> Access:
    """How *fd* was opened (open(2), access modes); ``"path"`` with O_PATH."""
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    return "path" if flags & os.O_PATH else _ACCESS[flags & os.O_ACCMODE]


def target(fd: int) -> str:
    """What *fd* refers to, as /proc/PID/fd shows it (proc(5)): a path, or ``socket:[INODE]``.

    A path may be anything: bytes in it that are no UTF-8 are written as ``\\xff``, and one that is
    too long for the kernel to show (PATH_MAX) is empty.
    """
    try:
        link = os.readlink(b"/proc/self/fd/%d" % fd)
    except OSError:
        return ""
    return link.decode("utf-8", "backslashreplace")


def is_in_memory(fd: int) -> bool:
    """Whether *fd* is of a file that is kept in memory, a memfd for one.  A name tells nothing:
    a file of another mount namespace can be called ``/memfd:x`` as well.
    """
    try:
        fcntl.fcntl(fd, fcntl.F_GET_SEALS)  # EINVAL on everything else (fcntl(2))
    except OSError:
        return False
    return True


_ANONYMOUS = re.compile(r"anon_inode:\[?([^\]]*)\]?")
_NAMES = {"eventpoll": "epoll"}
_MODES = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "dir",
    stat.S_IFCHR: "chr",
    stat.S_IFBLK: "blk",
    stat.S_IFIFO: "pipe",
    stat.S_IFSOCK: "socket",
    stat.S_IFLNK: "link",
}


def kind(fd: int, link: str) -> str:
    """What sort of thing *fd* is.

    Args:
        fd: the descriptor.
        link: its :func:`target`.

    Returns:
        ``file``, ``dir``, ``chr``, ``blk``, ``pipe``, ``socket``, ``link``, ``memfd``,
        ``eventfd``, ``epoll``, or the kernel's own word for an anonymous inode (``timerfd``,
        ``signalfd``, ``inotify``, ``pidfd``); ``unknown`` where nothing tells.
    """
    if link.startswith("socket:["):
        return "socket"
    if link.startswith("pipe:["):
        return "pipe"
    if link.startswith("/memfd:") and is_in_memory(fd):
        return "memfd"
    anonymous = _ANONYMOUS.fullmatch(link)
    if anonymous is not None:
        return _NAMES.get(anonymous[1], anonymous[1])
    found = status(fd)
    return "unknown" if found is None else _MODES.get(stat.S_IFMT(found.mode), "unknown")


class Status(NamedTuple):
    """What the kernel has at hand of a descriptor's file; compare stat(2).

    Args:
        mode: its type and permissions.
        nlink: how many names it has.
        size: its length in bytes.
        allocated: the bytes that it takes on disk or in memory.
        rdev: the device that it is, if it is one.
        dev: the device of its file system.
    """

    mode: int
    nlink: int
    size: int
    allocated: int
    rdev: int
    dev: int


class _Statx(ctypes.Structure):
    """``struct statx`` (statx(2))."""

    _fields_ = (
        ("mask", ctypes.c_uint32),
        ("blksize", ctypes.c_uint32),
        ("attributes", ctypes.c_uint64),
        ("nlink", ctypes.c_uint32),
        ("uid", ctypes.c_uint32),
        ("gid", ctypes.c_uint32),
        ("mode", ctypes.c_uint16),
        ("ino", ctypes.c_uint64),
        ("size", ctypes.c_uint64),
        ("blocks", ctypes.c_uint64),
        ("attributes_mask", ctypes.c_uint64),
        ("times", ctypes.c_uint64 * 8),
        ("rdev_major", ctypes.c_uint32),
        ("rdev_minor", ctypes.c_uint32),
        ("dev_major", ctypes.c_uint32),
        ("dev_minor", ctypes.c_uint32),
        ("rest", ctypes.c_uint64 * 14),
    )


_AT_EMPTY_PATH, _AT_STATX_DONT_SYNC = 0x1000, 0x4000
_STATX_TYPE, _STATX_MODE, _STATX_NLINK, _STATX_SIZE, _STATX_BLOCKS = 0x1, 0x2, 0x4, 0x200, 0x400
_WANTED = _STATX_TYPE | _STATX_MODE | _STATX_NLINK | _STATX_SIZE | _STATX_BLOCKS


@cache
def _statx_function() -> Callable[..., int] | None:
    """The C library's statx, which Python has from 3.15 on; glibc has it since 2.28."""
    return getattr(ctypes.CDLL(None), "statx", None)


def status(fd: int) -> Status | None:
    """What the kernel has at hand of *fd*'s file; None where it does not tell."""
    statx = _statx_function()
    found = _Statx()
    flags = _AT_EMPTY_PATH | _AT_STATX_DONT_SYNC
    if statx is None or statx(fd, b"", flags, _WANTED, ctypes.byref(found)):
        return None
    return Status(
        found.mode,
        found.nlink,
        found.size,
        found.blocks * 512,
        os.makedev(found.rdev_major, found.rdev_minor),
        os.makedev(found.dev_major, found.dev_minor),
    )
