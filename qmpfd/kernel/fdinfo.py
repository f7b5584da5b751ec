"""Properties of a descriptor, found without waiting for its file system.

fstat(2) asks the file system, and would block on a FUSE server that does not answer.  These calls
do not: F_GETFL (fcntl(2)), the link in /proc/self/fd, and statx(2) with AT_STATX_DONT_SYNC, which
returns the attributes that the kernel has cached.
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
    """Return the access mode of *fd* (open(2)).

    ``"path"`` means neither readable nor writable: opened with O_PATH, or with Linux's access mode
    3, which allows ioctl(2) only.
    """
    status = fcntl.fcntl(fd, fcntl.F_GETFL)
    return "path" if status & os.O_PATH else _ACCESS.get(status & os.O_ACCMODE, "path")


#: Flags that F_GETFL may return besides the access mode (fcntl(2), open(2)), in alphabetical order.
#: O_SYNC includes O_DSYNC, and O_TMPFILE includes O_DIRECTORY.  O_LARGEFILE is left out: the kernel
#: sets it by itself.
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
    """Return the names of the file status flags of *fd*, in alphabetical order."""
    status = fcntl.fcntl(fd, fcntl.F_GETFL)
    found = {name for name, flag in _FLAGS.items() if status & flag == flag}
    if "sync" in found:
        found.discard("dsync")
    if "tmpfile" in found:
        found.discard("directory")
    return sorted(found)


def size(fd: int) -> int | None:
    """Return the size of the file in bytes, as the kernel has it cached; None if unknown."""
    found = make_statx()(fd)
    return None if found is None else found[2]


def target(fd: int) -> str:
    """Return the link of *fd* in /proc/PID/fd (proc(5)): a path, or ``socket:[INODE]``.

    Bytes of a path that are not UTF-8 are written as ``\\xff``.  The result is empty for a path
    that is too long for the kernel to show (PATH_MAX).
    """
    try:
        link = os.readlink(b"/proc/self/fd/%d" % fd)
    except OSError:
        return ""
    return link.decode("utf-8", "backslashreplace")


#: The link of what has no path: ``socket:[INODE]``, ``pipe:[INODE]``, and ``net:[INODE]`` and the
#: like for a namespace (namespaces(7)); and of an anonymous inode.
_NUMBERED = re.compile(r"(\w+):\[\d+\]")
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
    """Return the kind of file that *fd* refers to.

    Args:
        fd: the descriptor.
        link: its :func:`target`.

    Returns:
        ``file``, ``dir``, ``chr``, ``blk``, ``pipe``, ``socket``, ``link``, ``memfd``,
        ``eventfd``, ``epoll``, or the kernel's name of an anonymous inode (``timerfd``,
        ``signalfd``, ``inotify``, ``pidfd``) or a namespace (``net``, ``mnt``, ``user``);
        ``unknown`` if statx(2) fails.
    """
    if link.startswith("/memfd:") and is_in_memory(fd):
        return "memfd"
    pathless = _NUMBERED.fullmatch(link) or _ANONYMOUS.fullmatch(link)
    if pathless is not None:
        return _NAMES.get(pathless[1], pathless[1])
    found = make_statx()(fd)
    return "unknown" if found is None else _MODES.get(stat.S_IFMT(found[1]), "unknown")


#: Result of statx(2) with AT_STATX_DONT_SYNC (compare stat(2)): number of links, mode, size, number
#: of 512-byte blocks; major and minor number of the device that a device file stands for, and of
#: the device of the file system.
Status: TypeAlias = tuple[int, int, int, int, int, int, int, int]

#: The members of ``struct statx`` (statx(2)) that are used; the struct has 256 bytes.
_STATX = struct.Struct("=16xI8xH10xQQ72xIIII112x")
_AT_EMPTY_PATH, _AT_STATX_DONT_SYNC = 0x1000, 0x4000
_STATX_TYPE, _STATX_MODE, _STATX_NLINK, _STATX_SIZE, _STATX_BLOCKS = 0x1, 0x2, 0x4, 0x200, 0x400
_STATX_MASK = _STATX_TYPE | _STATX_MODE | _STATX_NLINK | _STATX_SIZE | _STATX_BLOCKS
_STATX_FLAGS = _AT_EMPTY_PATH | _AT_STATX_DONT_SYNC


#: statx(2) of the C library (glibc 2.28 or newer); Python has a statx of its own from 3.15 on.
_statx: Callable[..., int] | None = getattr(ctypes.CDLL(None), "statx", None)


def make_statx() -> Callable[[int], Status | None]:
    """Return a function that calls statx(2) without asking the file system; its result is None if
    the call fails.  Each thread needs its own function, because each function has one result
    buffer: allocating one takes longer than the call.
    """
    statx, unpack, flags, mask = _statx, _STATX.unpack_from, _STATX_FLAGS, _STATX_MASK
    path, room = ctypes.create_string_buffer(b""), ctypes.create_string_buffer(_STATX.size)
    the_path, the_room = ctypes.byref(path), ctypes.byref(room)

    def status(fd: int) -> Status | None:
        if statx is None or statx(fd, the_path, flags, mask, the_room):
            return None
        found: Status = unpack(room)
        return found

    return status
