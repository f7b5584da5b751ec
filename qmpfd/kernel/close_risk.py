"""Whether closing a descriptor may block, found out without waiting for anything.

``close`` can block: on a TCP socket with SO_LINGER and unsent data for all of the linger time, on
a file of a FUSE or network file system for as long as its server does not answer, on a serial
line until it has drained; and on a Unix socket in whose queue such a descriptor was left behind.
"""

from __future__ import annotations

import fcntl
import os
import re
import select
import socket
import stat
from enum import Enum, auto

from .fd import Fd, unread_bytes
from .fdinfo import Status, make_statx
from .mounts import LocalFileSystems

#: Open files of the 64-bit kernel have it; sockets, pipes and anonymous inodes do not.
_O_LARGEFILE = 0o100000

# A module's own names are found faster.
_F_GETFL, _O_PATH = fcntl.F_GETFL, os.O_PATH

#: A file without a name gives its blocks back when it is closed, which takes time.
_SLOW_BYTES = 64 << 20

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
    try:
        sock = socket.socket(fileno=number)
    except OSError:  # O_PATH: a file that a socket is bound to
        return Risk.HIGH
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
    """The socket's queue is closed with it, and with that all descriptors in the queue."""
    if sock.type == socket.SOCK_STREAM:
        poll = select.poll()
        poll.register(sock, select.POLLRDHUP)
        # The other end is shut: nothing can come any more, so that it stays empty.
        over = any(events & select.POLLRDHUP for _, events in poll.poll(0))
        if over and not unread_bytes(sock):
            return Risk.NONE
    return Risk.SLIGHT


class CloseRisks:
    """Tells whether a close may block; for one thread."""

    def __init__(self) -> None:
        #: What a descriptor is, see :func:`.make_statx`.
        self.status = make_statx()
        self._memfds = self._memfd_device()
        try:
            self._file_systems: LocalFileSystems | None = LocalFileSystems()
        except OSError:  # no /proc
            self._file_systems = None

    def _memfd_device(self) -> tuple[int, int] | None:
        """Where the kernel keeps what memfd_create(2) makes: a tmpfs that is mounted nowhere, and
        always there.  Another one that is mounted nowhere gives back all its memory with the last
        descriptor, in 0.8 s a gigabyte.
        """
        try:
            with Fd(os.memfd_create("qmpfd")) as fd:
                found = self.status(fd.fileno())
        except OSError:
            return None
        return found and found[6:]

    def close(self) -> None:
        """Let go of what this has open."""
        if self._file_systems is not None:
            self._file_systems.close()
            self._file_systems = None

    def find(self, number: int) -> Risk:
        """Whether closing the descriptor *number* may wait for somebody.

        Raises:
            OSError: this process is out of descriptors, or the file's name is too long.
        """
        found = self.status(number)
        if found is None:
            return self._risk_by_link(number, found)
        nlink, mode, size, blocks, major, minor, fs_major, fs_minor = found
        kind = mode & _FORMAT
        if kind in _PLAIN:
            # Memory can be reserved beyond the end of a file, and a file can be longer than it is
            # big.
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
        """Whether closing the descriptor waits for nobody while another process has its file open
        as well: only a file system is asked at each close (``flush``, Linux's vfs.rst), everything
        else waits for the last.
        """
        try:
            flags = fcntl.fcntl(number, _F_GETFL)
            return not flags & _O_LARGEFILE or self.find(number) is _NO_RISK
        except OSError:
            return False

    def _is_local(self, device: tuple[int, ...]) -> bool:
        """Whether a close waits for nobody on the file system of that device, found without asking
        it.  One that is not mounted any more is unmounted by the close of the last descriptor
        (umount2(2), MNT_DETACH), also of one with O_PATH.
        """
        file_systems = self._file_systems
        if file_systems is not None and device in file_systems.devices():
            return True
        return device == self._memfds

    def _risk_by_link(self, number: int, found: Status | None) -> Risk:
        """The risk of what is on no file system; a block device, say, writes back what it holds."""
        if fcntl.fcntl(number, _F_GETFL) & _O_PATH:
            return Risk.HIGH if found is None or not self._is_local(found[6:]) else _NO_RISK
        link = os.readlink(f"/proc/self/fd/{number}")
        if link.startswith("socket:"):
            return _risk_of_socket(number)
        if _QUICK_ANONYMOUS.fullmatch(link):
            return _NO_RISK
        return Risk.SLIGHT if _LARGE_ANONYMOUS.fullmatch(link) else Risk.HIGH
