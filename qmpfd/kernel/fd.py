"""File descriptors with exactly one owner each, and the system calls that pass them.

Only this module closes descriptors and reads or writes control messages; the exception is
:mod:`qmpfd.supervisor`, a program of its own that imports little.  All calls are synchronous and
never block, because the sockets are non-blocking; waiting (by Trio, or by poll(2) in the command
line) is left to the callers.
"""

from __future__ import annotations

import array
import fcntl
import os
import resource
import select
import socket
import struct
import termios
import warnings
from collections.abc import Container, Iterable, Sequence
from itertools import starmap
from typing import Protocol, TypeAlias

from ..limits import READ_BYTES, SCM_MAX_FD, SEGMENT_BYTES


class HasFileno(Protocol):
    """Anything that has a descriptor: a file, a socket, a :class:`Fd`."""

    def fileno(self) -> int:
        """The number of the descriptor."""


FileDescriptorLike: TypeAlias = "int | HasFileno"


class Fd:
    """The one owner of an open descriptor.

    The number is set to -1 before close(2), which closes the descriptor even if it reports an error
    ("Dealing with error returns"): a second close could hit a new descriptor of that number.

    Args:
        number: an open descriptor; owned from here on.
    """

    __slots__ = ("number", "uid")

    def __init__(self, number: int) -> None:
        #: The descriptor's number, -1 once it is closed or detached; read-only for callers.
        self.number = number
        #: The user whose quota the descriptor counts for until it is closed; None if not set.
        self.uid: int | None = None

    def fileno(self) -> int:
        """Return the descriptor's number; raise ValueError once it is closed or detached."""
        if self.number < 0:
            raise ValueError("the descriptor is closed")
        return self.number

    #: An Fd can be used as an integer: ``os.read(fd, 10)``.
    __index__ = fileno

    @property
    def closed(self) -> bool:
        """Whether the descriptor is closed or detached."""
        return self.number < 0

    def detach(self) -> int:
        """Return the number and give up ownership: the caller has to close the descriptor."""
        number = self.fileno()
        self.number = -1
        return number

    def dup(self) -> Fd:
        """Duplicate the descriptor, close-on-exec: the same open file description (dup(2))."""
        return Fd(os.dup(self.fileno()))

    def move_to(self, number: int) -> None:
        """Renumber the descriptor; dup2(2) closes the descriptor that had that number.

        Raises:
            OSError: the number is beyond RLIMIT_NOFILE.
        """
        moved = os.dup2(self.fileno(), number, inheritable=False)
        self.close()
        self.number = moved

    def adopt(self, other: Fd) -> None:
        """Take over the descriptor that *other* owns; this object must be closed."""
        assert self.number < 0
        self.number = other.detach()

    def close(self) -> None:
        """Close the descriptor; a second call does nothing."""
        number, self.number = self.number, -1
        if number >= 0:
            try:
                os.close(number)
            except OSError:
                # The descriptor is closed in any case.  EIO and the like report lost writes, which
                # concern the process that wrote.
                pass

    def __enter__(self) -> Fd:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Fd {self.number}>" if self.number >= 0 else "<Fd closed>"

    def __del__(self) -> None:
        if self.number >= 0:
            warnings.warn(f"unclosed {self!r}", ResourceWarning, stacklevel=2, source=self)
            self.close()


def close_all(fds: Iterable[Fd]) -> None:
    """Close all of *fds*, each run of consecutive numbers by one close_range(2)."""
    start = end = -1
    for fd in fds:
        number, fd.number = fd.number, -1
        if number < 0:
            continue
        if number == end:
            end += 1
            continue
        _close_range(start, end)
        start, end = number, number + 1
    _close_range(start, end)


def _close_range(start: int, end: int) -> None:
    if start >= 0:  # os.closerange(0, 0) would close everything
        os.closerange(start, end)


def fileno(fd: FileDescriptorLike) -> int:
    """Return the number of *fd*, an int or an object with ``fileno()``; ValueError if negative."""
    number = fd if isinstance(fd, int) else fd.fileno()
    if number < 0:
        raise ValueError(f"{number} is no file descriptor")
    return number


def duplicate(fd: FileDescriptorLike, least: int = 0, avoid: Container[int] = ()) -> Fd:
    """Duplicate *fd* to the lowest free number from *least* on that is not in *avoid*.

    Raises:
        OSError: no such number below RLIMIT_NOFILE is free.
    """
    while (copy := Fd(fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, least))).number in avoid:
        least = copy.number + 1
        copy.close()
    return copy


def pipe() -> tuple[Fd, Fd]:
    """Create a non-blocking pipe (pipe(7)); return its read end and its write end.

    Raises:
        OSError: this process is out of descriptors.
    """
    reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    return Fd(reader), Fd(writer)


def is_in_memory(fd: int) -> bool:
    """Whether *fd* refers to a file in memory, such as a memfd.  The name is no proof: a file of
    another mount namespace can be called ``/memfd:x`` too.
    """
    try:
        fcntl.fcntl(fd, fcntl.F_GET_SEALS)  # EINVAL for every other file (fcntl(2))
    except OSError:
        return False
    return True


def is_pipe(fd: Fd) -> bool:
    """Whether *fd* is an end of a pipe, or a FIFO."""
    try:
        fcntl.fcntl(fd, fcntl.F_GETPIPE_SZ)  # EBADF for every other file
    except OSError:
        return False
    return True


class BorrowedSocket(socket.socket):
    """A socket object for a descriptor of another owner, which its ``with`` block leaves open.

    Args:
        fd: the descriptor.

    Raises:
        OSError: it is no socket.
    """

    def __init__(self, fd: FileDescriptorLike) -> None:
        super().__init__(fileno=fileno(fd))

    def __exit__(self, *exc_info: object) -> None:
        self.detach()


def poll(fd: FileDescriptorLike, events: int = 0, timeout: float | None = 0.0) -> int:
    """Wait for events of one descriptor (poll(2)); return those that there are, or 0.

    Args:
        fd: the descriptor.
        events: the requested events; POLLHUP and POLLERR are always reported.
        timeout: maximum seconds to wait; None for no limit.
    """
    poller = select.poll()
    poller.register(fd, events)
    return next((found for _, found in poller.poll(timeout and timeout * 1000)), 0)


def open_files_limit() -> int:
    """Return the maximum number of open descriptors (the soft limit RLIMIT_NOFILE)."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def is_open(number: int) -> bool:
    """Return whether a descriptor of this number is open."""
    try:
        fcntl.fcntl(number, fcntl.F_GETFD)
    except OSError:
        return False
    return True


def open_numbers(end: int | None = None) -> list[int]:
    """Return the numbers of the open descriptors below *end*; None for all, without /proc for
    65,536.
    """
    try:
        numbers: Iterable[int] = map(int, os.listdir("/proc/self/fd"))
    except OSError:  # /proc is not mounted
        numbers = range(min(open_files_limit(), end or 1 << 16))
    # listdir's own descriptor is closed again.
    return [number for number in numbers if (end is None or number < end) and is_open(number)]


def unread_bytes(fd: FileDescriptorLike) -> int:
    """Return the number of unread bytes of a pipe or stream socket (FIONREAD, unix(7))."""
    return _ioctl_int(fd, termios.FIONREAD)


def max_unreceived_messages(sock: socket.socket) -> int:
    """Return an upper bound of the messages that a Unix stream socket's peer has not read, from the
    memory that they take (SIOCOUTQ, unix(7)).
    """
    return -(-_ioctl_int(sock, termios.TIOCOUTQ) // _MESSAGE_BYTES)


def _ioctl_int(fd: FileDescriptorLike, question: int) -> int:
    """Return the int that ioctl(2) writes; with a mutable buffer the call takes half the time."""
    answer = bytearray(_INT_BYTES)
    fcntl.ioctl(fd, question, answer)
    found: int
    (found,) = _unpack(answer)
    return found


#: Error texts of a command whose descriptors the kernel has dropped (MSG_CTRUNC, recvmsg(2)).
_WERE_LOST = "File descriptors sent via SCM_RIGHTS were lost: "
OUT_OF_FDS = _WERE_LOST + "the receiver is out of file descriptors"
DENIED = _WERE_LOST + "the kernel's security module denied them to the receiver"

# Size of one control message with the maximum number of descriptors.
_CONTROL_BYTES = socket.CMSG_SPACE(SCM_MAX_FD * array.array("i").itemsize)

# Plain ints: combining members of the socket module's Enums takes microseconds.
_PEEK, _CLOEXEC = int(socket.MSG_PEEK), int(socket.MSG_CMSG_CLOEXEC)
_TRUNCATED = int(socket.MSG_CTRUNC)
_SEND_FLAGS = int(socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)
_SOCKET_LEVEL, _RIGHTS = int(socket.SOL_SOCKET), int(socket.SCM_RIGHTS)
_SCM_PIDFD = 4  # linux/socket.h; not in Python's socket module

# Minimum bytes of kernel memory of a queued message: its sk_buff and skb_shared_info.
_MESSAGE_BYTES = 512

_one = struct.Struct("i")
_INT_BYTES = _one.size
_unpack = _one.unpack


def peek(sock: socket.socket, max_bytes: int = READ_BYTES) -> tuple[bytes, bool]:
    """Peek at the next read: return its bytes, and whether their last segment carries descriptors.

    The kernel ends a read after the segment that carries descriptors.  Without space for control
    messages MSG_PEEK leaves the descriptors in the queue and sets MSG_CTRUNC (recvmsg(2)).  If
    *max_bytes* bytes are returned, that segment may have more bytes.

    Args:
        sock: the socket.
        max_bytes: maximum number of bytes.

    Raises:
        BlockingIOError: no input is queued.
    """
    data, _, flags, _ = sock.recvmsg(max_bytes, 0, _PEEK)
    fds_follow = flags & _TRUNCATED != 0
    if fds_follow and len(data) == READ_BYTES:
        # The segment may have more bytes: leave it out, so that the next peek shows it whole.
        data = data[:-SEGMENT_BYTES]
    return data, fds_follow


def receive(sock: socket.socket, count: int) -> tuple[bytes, list[Fd], str]:
    """Read up to *count* bytes and the descriptors that were sent with them.

    Return the bytes, the descriptors (close-on-exec, owned by the caller), and why the kernel
    dropped some of them (MSG_CTRUNC), or "".

    Raises:
        BlockingIOError: no input is queued.
    """
    data, control, flags, _ = sock.recvmsg(count, _CONTROL_BYTES, _CLOEXEC)
    fds: list[Fd] = []
    for level, kind, payload in control:
        if kind == _RIGHTS and level == _SOCKET_LEVEL:
            if len(payload) == _INT_BYTES:  # the usual case
                (number,) = _unpack(payload)
                fds.append(Fd(number))
            else:
                fds += starmap(Fd, _one.iter_unpack(payload))
        elif level == _SOCKET_LEVEL and kind == _SCM_PIDFD:
            Fd(*_unpack(payload)).close()
    return data, fds, _why_lost(sock) if flags & _TRUNCATED else ""


def _why_lost(sock: socket.socket) -> str:
    """Return why the kernel has dropped descriptors, by whether dup(2) succeeds."""
    try:
        Fd(os.dup(sock.fileno())).close()
    except OSError:
        return OUT_OF_FDS
    return DENIED


def receive_planned(sock: socket.socket, lengths: Sequence[int]) -> tuple[int, list[Fd], str]:
    """Make reads of these *lengths* until one returns descriptors; discard the remaining bytes.

    Return the index of that read, its descriptors, and why some were lost, as :func:`receive` does.
    """
    number = 0
    _, fds, lost = receive(sock, lengths[0])
    if len(lengths) > 1:
        while not (fds or lost) and number + 1 < len(lengths):
            number += 1
            _, fds, lost = receive(sock, lengths[number])
        if rest := lengths[number + 1 :]:
            discard(sock, sum(rest))
    return number, fds, lost


def discard(sock: socket.socket, count: int) -> None:
    """Read *count* bytes that were peeked at, and that carry no descriptors."""
    sock.recv(count)


def send(sock: socket.socket, data: bytes | memoryview, fds: Sequence[FileDescriptorLike]) -> int:
    """Send *data*, with *fds* attached to its first byte; return the number of bytes sent.

    Raises:
        BlockingIOError: the send buffer is full; nothing was sent.
    """
    if not fds:
        return sock.send(data, _SEND_FLAGS)
    rights = array.array("i", map(fileno, fds))
    return sock.sendmsg([data], [(_SOCKET_LEVEL, _RIGHTS, rights)], _SEND_FLAGS)


def peer_address(fd: FileDescriptorLike) -> str | bytes:
    """Return the address that the Unix socket *fd* is connected to; empty if there is none."""
    try:
        with BorrowedSocket(fd) as sock:
            return sock.getpeername() if sock.family == socket.AF_UNIX else ""
    except OSError:  # no socket, or not connected
        return ""
