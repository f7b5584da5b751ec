"""Closing descriptors without waiting for anybody.

``close`` can block: on a TCP socket with SO_LINGER and unsent data for all of the linger time, on
a file of a FUSE or network file system for as long as its server does not answer, on a serial
line until it has drained.  Descriptors for which that cannot happen are closed at once; all
others by threads, which nobody waits for.
"""

from __future__ import annotations

import fcntl
import os
import re
import select
import socket
import stat
import threading
from collections import deque
from collections.abc import Iterable

from .fd import Fd
from .fdinfo import status

#: Threads that may hang in a close at a time.  More wait in line, with their descriptors open.
_MAX_THREADS = 32

#: Open files of the 64-bit kernel have it; sockets, pipes and anonymous inodes do not.
_O_LARGEFILE = 0o100000

#: A file without a name gives its blocks back when it is closed, which takes time.
_SLOW_BYTES = 64 << 20

# File systems on which close is over at once: local ones, and those in memory.
_LOCAL = frozenset(
    (
        *("bpf", "btrfs", "cgroup", "cgroup2", "configfs", "debugfs", "devpts", "devtmpfs"),
        *("efivarfs", "erofs", "exfat", "ext2", "ext3", "ext4", "f2fs", "hugetlbfs", "iso9660"),
        *("jfs", "mqueue", "overlay", "proc", "pstore", "ramfs", "reiserfs", "securityfs"),
        *("squashfs", "sysfs", "tmpfs", "tracefs", "udf", "vfat", "xfs", "zfs"),
    )
)
# Character devices: memory (null, zero, random), and pseudo-terminals.
_QUICK_MAJORS = frozenset([1, *range(136, 144)])
_PTMX = os.makedev(5, 2)
_QUICK_ANONYMOUS = re.compile(
    r"anon_inode:\[?(eventfd|eventpoll|timerfd|signalfd|inotify|pidfd|fanotify)\]?"
    r"|pipe:\[\d+\]"
)
_QUICK_FAMILIES = (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6)


def _socket_may_block(number: int) -> bool:
    sock = socket.socket(fileno=number)
    try:
        if sock.family not in _QUICK_FAMILIES:
            return True  # a packet socket waits for all other CPUs, and so on
        onoff = sock.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8)[:4]
        return any(onoff)
    except OSError:
        return True
    finally:
        sock.detach()


class _FileSystems:
    """The types of the mounted file systems, by device (/proc/PID/mountinfo, proc(5))."""

    def __init__(self) -> None:
        self._file = Fd(os.open("/proc/self/mountinfo", os.O_RDONLY | os.O_CLOEXEC))
        self._changed = select.poll()
        self._changed.register(self._file, select.POLLPRI)
        self._types: dict[int, str] = {}
        self._read()

    def _read(self) -> None:
        os.lseek(self._file.fileno(), 0, os.SEEK_SET)
        parts = []
        while part := os.read(self._file.fileno(), 1 << 16):
            parts.append(part)
        self._types.clear()
        for line in b"".join(parts).decode("utf-8", "replace").splitlines():
            fields, _, rest = line.partition(" - ")
            major, minor = fields.split()[2].split(":")
            self._types[os.makedev(int(major), int(minor))] = rest.split()[0]

    def type(self, device: int) -> str | None:
        """The type of the one on *device*, such as ``ext4``; None if none is mounted."""
        # A number can come to mean another file system: the kernel tells when mounts change.
        if self._changed.poll(0):
            self._read()
        return self._types.get(device)

    def close(self) -> None:
        """Look no more."""
        self._file.close()


class Closer:
    """Closes descriptors: at once those that cannot block, the others in threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: deque[Fd] = deque()
        self._threads = 0
        # Open from the start: later there may be no descriptor left for it.
        self._file_systems = _FileSystems()

    def shut_down(self) -> None:
        """The daemon is ending: what is being closed goes on, nothing else will come."""
        self._file_systems.close()

    @property
    def pending(self) -> int:
        """How many closes are under way, or wait for a thread."""
        return self._threads + len(self._waiting)

    def close(self, fds: Iterable[Fd]) -> None:
        """Close each of *fds*; returns at once."""
        for fd in fds:
            if fd.closed:
                continue
            if self.may_block(fd.fileno()):
                self._hand_over(fd)
            else:
                fd.close()

    def may_block(self, number: int) -> bool:
        """Whether closing the descriptor may wait for somebody.  Finding out does not."""
        flags = fcntl.fcntl(number, fcntl.F_GETFL)
        if flags & os.O_PATH:  # refers to a place, not to an open file: nothing to flush or release
            return False
        if flags & _O_LARGEFILE:
            return self._file_may_block(number)
        if flags & os.O_ACCMODE != os.O_RDWR:  # an end of a pipe
            return False
        link = os.readlink(f"/proc/self/fd/{number}")
        if link.startswith("socket:"):
            return _socket_may_block(number)
        return _QUICK_ANONYMOUS.fullmatch(link) is None

    def _file_may_block(self, number: int) -> bool:
        """Tell by the file system, found without asking it."""
        found = status(number)
        if found is None:
            return True
        kind = stat.S_IFMT(found.mode)
        if kind == stat.S_IFCHR:
            return os.major(found.rdev) not in _QUICK_MAJORS and found.rdev != _PTMX
        if kind not in (stat.S_IFREG, stat.S_IFDIR, stat.S_IFIFO):
            return True  # a block device writes back what it holds
        if found.nlink == 0 and found.size > _SLOW_BYTES:
            return True
        name = self._file_systems.type(found.dev)
        if name is None:  # not mounted: the kernel's own tmpfs, if it is a memfd's
            return not os.readlink(f"/proc/self/fd/{number}").startswith("/memfd:")
        return name not in _LOCAL

    def _hand_over(self, fd: Fd) -> None:
        with self._lock:
            self._waiting.append(fd)
            if self._threads == _MAX_THREADS:
                return
            self._threads += 1
        # A daemon thread: the process may end while a close hangs.
        thread = threading.Thread(target=self._work, name="qmpfd-close", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # no more threads: those there are, or the next one, will do it
            with self._lock:
                self._threads -= 1

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._threads -= 1
                    return
                fd = self._waiting.popleft()
            fd.close()
