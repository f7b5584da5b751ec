"""Closing descriptors without waiting for anybody.

``close`` can block: on a TCP socket with SO_LINGER and unsent data for all of the linger time, on
a file of a FUSE or network file system for as long as its server does not answer, on a serial
line until it has drained; and on a Unix socket in whose queue such a descriptor was left behind.
Descriptors for which that cannot happen are closed at once; all others by threads.  Those that
most likely cannot are waited for, for a moment: sockets are quick unless somebody who shares them
makes them slow between our look and our close.
"""

from __future__ import annotations

import _thread
import fcntl
import os
import re
import select
import socket
import stat
import threading
from collections import deque
from collections.abc import Iterable
from enum import Enum, auto
from time import monotonic

from .fd import Fd, is_in_memory, unread_bytes
from .fdinfo import make_statx

#: Threads that may hang in a close at a time.  More wait in line, with their descriptors open.
_MAX_THREADS = 32

#: Seconds that is waited for a close that should be quick, and how long not again if it was not:
#: who makes them slow on purpose holds up the others for a hundredth of the time.
_GRACE = 0.005
_NO_GRACE = 0.5

#: Open files of the 64-bit kernel have it; sockets, pipes and anonymous inodes do not.
_O_LARGEFILE = 0o100000

# A module's own names are found faster.
_F_GETFL, _O_PATH = fcntl.F_GETFL, os.O_PATH

#: A file without a name gives its blocks back when it is closed, which takes time.
_SLOW_BYTES = 64 << 20

#: Seconds between two looks at whether mounts have changed: unmounting one file system and mounting
#: another takes longer.
_LOOK_SECONDS = 0.001

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
_PTMX = (5, 2)
_FORMAT = stat.S_IFMT(0o777777)
_PLAIN = (stat.S_IFREG, stat.S_IFDIR, stat.S_IFIFO)
# Not inotify: it waits until all CPUs have let go of its marks, 3 ms each time.
_QUICK_ANONYMOUS = re.compile(r"anon_inode:\[?(eventfd|timerfd|signalfd|pidfd)\]?|pipe:\[\d+\]")
_LARGE_ANONYMOUS = re.compile(r"anon_inode:\[?eventpoll\]?")  # as slow as it holds much


class Risk(Enum):
    """Whether a close may block."""

    NONE = auto()
    SLIGHT = auto()  #: only if somebody makes it so on purpose, right now
    HIGH = auto()


_NO_RISK = Risk.NONE  # finding a member of an enumeration takes as long as two calls


def _risk_of_socket(number: int) -> Risk:
    sock = socket.socket(fileno=number)
    try:
        if sock.family == socket.AF_UNIX:
            return _risk_of_unix_socket(sock)
        if sock.family not in (socket.AF_INET, socket.AF_INET6):
            return Risk.HIGH  # a packet socket waits for all other CPUs, and so on
        if sock.proto in (socket.IPPROTO_UDP, socket.IPPROTO_ICMP):
            return Risk.NONE  # never lingers
        onoff = sock.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8)[:4]
        return Risk.HIGH if any(onoff) else Risk.SLIGHT
    except OSError:
        return Risk.HIGH
    finally:
        sock.detach()


def _risk_of_unix_socket(sock: socket.socket) -> Risk:
    """What is queued in it is closed with it, descriptors of any kind included."""
    if sock.type == socket.SOCK_STREAM:
        poll = select.poll()
        poll.register(sock, select.POLLRDHUP)
        # The other end is shut: nothing can come any more, so that it stays empty.
        over = any(events & select.POLLRDHUP for _, events in poll.poll(0))
        if over and not unread_bytes(sock):
            return Risk.NONE
    return Risk.SLIGHT


class _FileSystems:
    """The types of the mounted file systems, by device (/proc/PID/mountinfo, proc(5))."""

    def __init__(self) -> None:
        self._file = Fd(os.open("/proc/self/mountinfo", os.O_RDONLY | os.O_CLOEXEC))
        self._changed = select.poll()
        self._changed.register(self._file, select.POLLPRI)
        self._looked_at = 0.0
        self._local: set[tuple[int, int]] = set()
        self._read()

    def _read(self) -> None:
        os.lseek(self._file.fileno(), 0, os.SEEK_SET)
        parts = []
        while part := os.read(self._file.fileno(), 1 << 16):
            parts.append(part)
        self._local.clear()
        for line in b"".join(parts).decode("utf-8", "replace").splitlines():
            fields, _, rest = line.partition(" - ")
            major, minor = fields.split()[2].split(":")
            if rest.split()[0] in _LOCAL:
                self._local.add((int(major), int(minor)))

    def local(self) -> set[tuple[int, int]]:
        """The devices, by their major and minor numbers, of those on which close is quick."""
        now = monotonic()
        if now - self._looked_at > _LOOK_SECONDS:
            self._looked_at = now
            # They can come to mean another file system (proc(5), /proc/PID/mounts).
            if self._changed.poll(0):
                self._read()
        return self._local

    def close(self) -> None:
        """Look no more."""
        self._file.close()


class _Batch:
    """Descriptors that are closed together.

    Args:
        left: how many of them are open still.
    """

    __slots__ = ("left",)

    def __init__(self, left: int) -> None:
        self.left = left


class _Lane:
    """Threads that close what waits in line for them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._progress = threading.Condition(self._lock)
        self._waiting: deque[tuple[Fd, _Batch]] = deque()
        self._threads = 0
        #: How many closes are under way, or wait for a thread.
        self.pending = 0

    def add(self, fds: list[Fd]) -> _Batch:
        """Close *fds*."""
        batch = _Batch(len(fds))
        with self._lock:
            self._waiting += [(fd, batch) for fd in fds]
            self.pending += len(fds)
        self.start_thread()
        return batch

    def start_thread(self) -> None:
        """Have one more, if there may be one and there is something for it to do."""
        with self._lock:
            if self._threads == _MAX_THREADS or not self._waiting:
                return
            self._threads += 1
        try:
            # Not threading.Thread: its start waits until the thread runs, which can take
            # milliseconds.  The process may end while a close hangs.
            _thread.start_new_thread(self._work, ())
        except RuntimeError:  # no more threads: those there are, or the next one, will do it
            with self._lock:
                self._threads -= 1

    def wait(self, batch: _Batch, seconds: float) -> bool:
        """Wait for *batch*, for so long at most; whether it is closed."""
        with self._progress:
            return self._progress.wait_for(lambda: not batch.left, seconds)

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._threads -= 1
                    return
                fd, batch = self._waiting.popleft()
                more = bool(self._waiting)
            if more:  # this one may hang: not the rest behind it
                self.start_thread()
            fd.close()
            with self._lock:
                self.pending -= 1
                batch.left -= 1
                if not batch.left:
                    self._progress.notify_all()


class ClosePool:
    """Closes descriptors: at once those that cannot block, the others in threads."""

    def __init__(self) -> None:
        self._slow, self._quick = _Lane(), _Lane()
        self._grace_from = 0.0
        self._status = make_statx()
        # From the start: later there may be no descriptor left for it.
        try:
            self._file_systems: _FileSystems | None = _FileSystems()
        except OSError:  # no /proc
            self._file_systems = None

    def shut_down(self) -> None:
        """The daemon is ending: what is being closed goes on, nothing else will come."""
        if self._file_systems is not None:
            self._file_systems.close()
            self._file_systems = None

    @property
    def pending(self) -> int:
        """How many closes are under way, or wait for a thread."""
        return self._slow.pending + self._quick.pending

    def close(self, fds: Iterable[Fd]) -> None:
        """Close each of *fds*; returns at once, or nearly so."""
        risky: list[tuple[Risk, Fd]] = []
        for fd in fds:
            number = fd.number
            if number < 0:
                continue
            try:
                risk = self.risk(number)
            except OSError:  # out of descriptors, or a name that is too long
                risk = Risk.HIGH
            if risk is _NO_RISK:
                fd.close()
            else:
                risky.append((risk, fd))
        if risky:
            if slow := [fd for risk, fd in risky if risk is Risk.HIGH]:
                self._slow.add(slow)
            if careful := [fd for risk, fd in risky if risk is Risk.SLIGHT]:
                self._close_carefully(careful)

    def close_duplicates(self, fds: Iterable[Fd]) -> None:
        """Close descriptors of files that another process has open as well: only a file system is
        asked at each close (``flush``, Linux's vfs.rst), everything else waits for the last.
        """
        for fd in fds:
            flags = fcntl.fcntl(fd.fileno(), fcntl.F_GETFL)
            if flags & _O_LARGEFILE and not flags & os.O_PATH:
                self.close([fd])
            else:
                fd.close()

    def _close_carefully(self, fds: list[Fd]) -> None:
        """Close what should be quick.  It is waited for: who removes a descriptor may count on it
        that it is closed when the answer is there.
        """
        batch = self._quick.add(fds)
        if monotonic() >= self._grace_from:
            if self._quick.wait(batch, _GRACE):
                return
            self._grace_from = monotonic() + _NO_GRACE

    def risk(self, number: int) -> Risk:
        """Whether closing the descriptor may wait for somebody.  Finding out does not."""
        flags = fcntl.fcntl(number, _F_GETFL)
        if flags & _O_PATH:  # refers to a place, not to an open file: nothing to flush or release
            return _NO_RISK
        if flags & _O_LARGEFILE:
            return self._risk_of_file(number)
        link = os.readlink(f"/proc/self/fd/{number}")
        if link.startswith("socket:"):
            return _risk_of_socket(number)
        if _QUICK_ANONYMOUS.fullmatch(link):
            return Risk.NONE
        return Risk.SLIGHT if _LARGE_ANONYMOUS.fullmatch(link) else Risk.HIGH

    def _risk_of_file(self, number: int) -> Risk:
        """Tell by the file system, found without asking it."""
        found = self._status(number)
        if found is None:
            return Risk.HIGH
        nlink, mode, size, blocks, major, minor, dev_major, dev_minor = found
        kind = mode & _FORMAT
        if kind in _PLAIN:
            # Memory can be reserved beyond the end of a file, and a file can be longer than it is
            # big.
            if not nlink and (size > _SLOW_BYTES or blocks * 512 > _SLOW_BYTES):
                return Risk.HIGH
            file_systems = self._file_systems
            if file_systems is not None and (dev_major, dev_minor) in file_systems.local():
                return _NO_RISK
            # Not mounted, or not here: the kernel's own tmpfs, if it is a memfd's.
            return _NO_RISK if is_in_memory(number) else Risk.HIGH
        if kind == stat.S_IFCHR and (major in _QUICK_MAJORS or (major, minor) == _PTMX):
            return _NO_RISK
        return Risk.HIGH  # a block device writes back what it holds
