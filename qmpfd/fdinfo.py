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
from functools import cache
from typing import Literal, TypeAlias

Access: TypeAlias = Literal["rdonly", "wronly", "rdwr", "path"]

_ACCESS: dict[int, Access] = {os.O_RDONLY: "rdonly", os.O_WRONLY: "wronly", os.O_RDWR: "rdwr"}


def access_mode(fd: int) -> Access:
    """How *fd* was opened (open(2), access modes); ``"path"`` with O_PATH."""
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    return "path" if flags & os.O_PATH else _ACCESS[flags & os.O_ACCMODE]


def target(fd: int) -> str:
    """What *fd* refers to, as /proc/PID/fd shows it (proc(5)): a path, or ``socket:[INODE]``."""
    return os.readlink(f"/proc/self/fd/{fd}")


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
    if link.startswith("/memfd:"):
        return "memfd"
    anonymous = _ANONYMOUS.fullmatch(link)
    if anonymous is not None:
        return _NAMES.get(anonymous[1], anonymous[1])
    return _MODES.get(_file_type(fd), "unknown")


_AT_EMPTY_PATH, _AT_STATX_DONT_SYNC, _STATX_TYPE = 0x1000, 0x4000, 0x1
_STATX_BYTES, _STATX_MODE_AT = 256, 28  # struct statx: its size, and where stx_mode is


@cache
def _statx() -> ctypes._NamedFuncPointer | None:
    """The C library's statx, which Python has from 3.15 on; glibc has it since 2.28."""
    return getattr(ctypes.CDLL(None, use_errno=True), "statx", None)


def _file_type(fd: int) -> int:
    """The type bits of *fd*'s mode; 0 where the kernel does not tell without asking around."""
    statx = _statx()
    if statx is None:
        return 0
    buffer = ctypes.create_string_buffer(_STATX_BYTES)
    flags = _AT_EMPTY_PATH | _AT_STATX_DONT_SYNC
    if statx(fd, b"", flags, _STATX_TYPE, buffer):
        return 0
    mode = int.from_bytes(buffer.raw[_STATX_MODE_AT : _STATX_MODE_AT + 2], "little")
    return stat.S_IFMT(mode)
