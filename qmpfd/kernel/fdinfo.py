"""Descriptions of a descriptor, made without waiting for any file system.

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
import struct
from collections.abc import Callable
from typing import Literal, TypeAlias

from .fd import is_in_memory

Access: TypeAlias = Literal["rdonly", "wronly", "rdwr", "path"]

_ACCESS: dict[int, Access] = {os.O_RDONLY: "rdonly", os.O_WRONLY: "wronly", os.O_RDWR: "rdwr"}


def access_mode(fd: int) -> Access:
    """How *fd* was opened (open(2), access modes).

    ``"path"`` stands for what can be neither read nor written: a descriptor with O_PATH, and one
    of Linux's access mode 3, which serves ioctl(2) alone.
    """
    status = fcntl.fcntl(fd, fcntl.F_GETFL)
    return "path" if status & os.O_PATH else _ACCESS.get(status & os.O_ACCMODE, "path")


#: What F_GETFL may return beside the access mode (fcntl(2), open(2)), in the order of O_ names.
#: O_SYNC is O_DSYNC and a bit of its own; O_TMPFILE is O_DIRECTORY and one; the kernel sets
#: O_LARGEFILE by itself, and so it says nothing.
_FLAGS: dict[str, int] = {
    "append": os.O_APPEND,
    "async": os.O_ASYNC,
    "direct": os.O_DIRECT,
    "directory": os.O_DIRECTORY,
    "dsync": os.O_DSYNC,
    "noatime": os.O_NOATIME,
    "nofollow": os.O_NOFOLLOW,
    "nonblock": os.O_NONBLOCK,
    "path": os.O_PATH,
    "sync": os.O_SYNC,
    "tmpfile": os.O_TMPFILE,
}


def flags(fd: int) -> list[str]:
    """The file status flags of *fd* by name, in alphabetical order."""
    status = fcntl.fcntl(fd, fcntl.F_GETFL)
    found = {name for name, flag in _FLAGS.items() if status & flag == flag}
    if "sync" in found:
        found.discard("dsync")
    if "tmpfile" in found:
        found.discard("directory")
    return sorted(found)


def size(fd: int) -> int | None:
    """How many bytes the file of *fd* has, as far as the kernel has it at hand; None where it does
    not tell.
    """
    found = make_statx()(fd)
    return None if found is None else found[2]


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
    """The kind of file that *fd* refers to.

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
    found = make_statx()(fd)
    return "unknown" if found is None else _MODES.get(stat.S_IFMT(found[1]), "unknown")


#: The result of statx(2) with AT_STATX_DONT_SYNC (compare stat(2)): how many names it has, its
#: type and permissions, its bytes, its blocks of 512 bytes; of the device that it is, if it is one,
#: and of its file system, each the major and the minor number.
Status: TypeAlias = tuple[int, int, int, int, int, int, int, int]

#: The members of ``struct statx`` that are looked at (statx(2)); it is 256 bytes long.
_STATX = struct.Struct("=16xI8xH10xQQ72xIIII112x")
_AT_EMPTY_PATH, _AT_STATX_DONT_SYNC = 0x1000, 0x4000
_STATX_TYPE, _STATX_MODE, _STATX_NLINK, _STATX_SIZE, _STATX_BLOCKS = 0x1, 0x2, 0x4, 0x200, 0x400
_WANTED = _STATX_TYPE | _STATX_MODE | _STATX_NLINK | _STATX_SIZE | _STATX_BLOCKS
_STATX_FLAGS = _AT_EMPTY_PATH | _AT_STATX_DONT_SYNC


#: The C library's, which Python has from 3.15 on and glibc since 2.28.
_statx: Callable[..., int] | None = getattr(ctypes.CDLL(None), "statx", None)


def make_statx() -> Callable[[int], Status | None]:
    """Make a function that calls statx(2) on a descriptor without asking the file system; None
    where the call fails.  Each thread needs its own function, because each function has one result
    buffer: allocating one takes longer than the call.
    """
    statx, unpack, flags, wanted = _statx, _STATX.unpack_from, _STATX_FLAGS, _WANTED
    path, room = ctypes.create_string_buffer(b""), ctypes.create_string_buffer(_STATX.size)
    the_path, the_room = ctypes.byref(path), ctypes.byref(room)

    def status(fd: int) -> Status | None:
        if statx is None or statx(fd, the_path, flags, wanted, the_room):
            return None
        found: Status = unpack(room)
        return found

    return status
