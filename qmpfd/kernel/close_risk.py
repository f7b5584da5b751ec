"""Finds out, without blocking, whether closing a descriptor may block.

close(2) can block: on a TCP socket with SO_LINGER and unsent data for the linger time; on a file of
a FUSE or network file system until its server answers; on a serial line until it has drained; and
on a Unix socket whose receive queue holds such a descriptor.
"""

from __future__ import annotations

import fcntl
import os
import re
import select
import socket
import stat
from enum import Enum, auto

from .fd import BorrowedSocket, Fd, poll, unread_bytes
from .fdinfo import Status, make_statx
from .mounts import LocalFileSystems

#: 64-bit kernels set it on files that were opened; sockets, pipes and anonymous inodes lack it.
_O_LARGEFILE = 0o100000

#: Size of an unlinked file beyond which its close is slow, as the last close frees the blocks.
_SLOW_BYTES = 64 << 20

# Character devices: memory (null, zero, random), and pseudo-terminals.
_QUICK_MAJORS = frozenset([1, *range(136, 144)])
_PTMX = (5, 2)
_FORMAT = stat.S_IFMT(0o777777)
_PLAIN = (stat.S_IFREG, stat.S_IFDIR, stat.S_IFIFO)
# Not inotify, whose close takes 3 ms: it waits until no CPU uses its marks.
_QUICK_ANONYMOUS = re.compile(r"anon_inode:\[?(eventfd|timerfd|signalfd|pidfd)\]?|pipe:\[\d+\]")
_LARGE_ANONYMOUS = re.compile(r"anon_inode:\[?eventpoll\]?")  # slow if it watches many descriptors


class Risk(Enum):
    """Whether a close may block."""

    NONE = auto()
    SLIGHT = auto()  #: only if another process causes it on purpose right now
    HIGH = auto()


# A local name: an Enum member takes 0.16 us before Python 3.12, and a command 20 us.
_NO_RISK = Risk.NONE


def _risk_of_socket(number: int) -> Risk:
    try:
        with BorrowedSocket(number) as sock:
            if sock.family == socket.AF_UNIX:
                return _risk_of_unix_socket(sock)
            if sock.family not in (socket.AF_INET, socket.AF_INET6):
                return Risk.HIGH  # for one, closing a packet socket waits for all other CPUs
            if sock.proto in (socket.IPPROTO_UDP, socket.IPPROTO_ICMP):
                return Risk.NONE  # never lingers
            onoff = sock.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8)[:4]
            return Risk.HIGH if any(onoff) else Risk.SLIGHT
    except OSError:  # for one, opened with O_PATH: the file of a bound socket
        return Risk.HIGH


def _risk_of_unix_socket(sock: socket.socket) -> Risk:
    """Return the risk of a Unix socket: its close also closes all descriptors in its queue."""
    # If the peer has shut down its sending side, an empty queue stays empty.
    is_stream = sock.type == socket.SOCK_STREAM
    is_over = is_stream and poll(sock, select.POLLRDHUP) & select.POLLRDHUP
    return Risk.NONE if is_over and not unread_bytes(sock) else Risk.SLIGHT


class CloseRisks:
    """Finds out whether closing a descriptor may block; for use by one thread."""

    def __init__(self) -> None:
        #: The status of a descriptor, see :func:`.make_statx`.
        self.status = make_statx()
        self._memfds = self._memfd_device()
        try:
            self._file_systems: LocalFileSystems | None = LocalFileSystems()
        except OSError:  # no /proc
            self._file_systems = None

    def _memfd_device(self) -> tuple[int, int] | None:
        """Return the device of memfds: the kernel's internal tmpfs, which is never unmounted.  An
        unmounted tmpfs is freed by the close of its last descriptor, in 0.8 s a gigabyte.
        """
        try:
            with Fd(os.memfd_create("qmpfd")) as fd:
                found = self.status(fd.fileno())
        except OSError:
            return None
        return found and found[6:]

    def close(self) -> None:
        """Close the table of mounts."""
        if self._file_systems is not None:
            self._file_systems.close()
            self._file_systems = None

    def find(self, number: int) -> Risk:
        """Return the risk that closing the descriptor *number* blocks.

        Raises:
            OSError: this process is out of descriptors, or the file's name is too long.
        """
        found = self.status(number)
        if found is None:
            return self._risk_by_link(number, found)
        nlink, mode, size, blocks, major, minor, fs_major, fs_minor = found
        kind = mode & _FORMAT
        if kind in _PLAIN:
            # A file may have blocks beyond its end (fallocate(2)), or be sparse: check both sizes.
            if not nlink and (size > _SLOW_BYTES or blocks * 512 > _SLOW_BYTES):
                return Risk.HIGH
            if self._is_local((fs_major, fs_minor)):
                return _NO_RISK
        elif kind == stat.S_IFSOCK:
            return _risk_of_socket(number)
        elif kind == stat.S_IFCHR and (major in _QUICK_MAJORS or (major, minor) == _PTMX):
            return _NO_RISK
        return self._risk_by_link(number, found)

    def is_quick_duplicate(self, number: int) -> bool:
        """Whether closing the descriptor never blocks while another process has its file open.

        Each close(2) calls only the file system (``flush``, Linux's vfs.rst); all other work is
        done at the last close.
        """
        try:
            flags = fcntl.fcntl(number, fcntl.F_GETFL)
            return not flags & _O_LARGEFILE or self.find(number) is _NO_RISK
        except OSError:
            return False

    def _is_local(self, device: tuple[int, ...]) -> bool:
        """Whether *device* is a mounted local file system, on which close(2) never blocks.

        A detached file system (umount2(2), MNT_DETACH) does not count: the close of its last
        descriptor, also of one with O_PATH, unmounts it.
        """
        file_systems = self._file_systems
        if file_systems is not None and device in file_systems.devices():
            return True
        return device == self._memfds

    def _risk_by_link(self, number: int, found: Status | None) -> Risk:
        """Return the risk by the link in /proc/self/fd: closing a block device writes back data."""
        if fcntl.fcntl(number, fcntl.F_GETFL) & os.O_PATH:
            return Risk.HIGH if found is None or not self._is_local(found[6:]) else _NO_RISK
        link = os.readlink(f"/proc/self/fd/{number}")
        if link.startswith("socket:"):
            return _risk_of_socket(number)
        if _QUICK_ANONYMOUS.fullmatch(link):
            return _NO_RISK
        return Risk.SLIGHT if _LARGE_ANONYMOUS.fullmatch(link) else Risk.HIGH
