"""File descriptors with exactly one owner each, and the system calls that carry them.

Nothing else in this package closes a descriptor, and nothing else reads or writes control
messages, but for :mod:`qmpfd.supervisor`: a program of its own, which loads no more than it needs
of the standard library.  All calls here are synchronous and never wait: the sockets are
non-blocking, and who waits for them (Trio, or a poll in the command line) is the business of the
floors above.
"""

from __future__ import annotations

import array
import errno
import fcntl
import os
import resource
import socket
import struct
import termios
import warnings
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
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

    The number is given up before it is closed, so that no error and no second call can close a
    descriptor that has meanwhile been given to somebody else (close(2), "Dealing with error
    returns": it is closed even where close reports an error).

    Args:
        number: an open descriptor that nobody else will close.
    """

    __slots__ = ("number", "uid")

    def __init__(self, number: int) -> None:
        #: For reading only: the descriptor's number, -1 once it is closed or detached.
        self.number = number
        #: The user that it counts for until its close is done; None if nobody has said.
        self.uid: int | None = None

    def fileno(self) -> int:
        """The descriptor's number; ValueError once it is closed or detached."""
        if self.number < 0:
            raise ValueError("the descriptor is closed")
        return self.number

    #: A descriptor can stand for its number: ``os.read(fd, 10)``, ``open(fd.detach())``.
    __index__ = fileno

    @property
    def closed(self) -> bool:
        """Whether the descriptor is closed or detached."""
        return self.number < 0

    def detach(self) -> int:
        """Stop owning the descriptor: the caller owns the number that is returned."""
        number = self.fileno()
        self.number = -1
        return number

    def dup(self) -> Fd:
        """A second descriptor of the same open file description, close-on-exec (dup(2))."""
        return Fd(os.dup(self.fileno()))

    def move_to(self, number: int) -> None:
        """Give the descriptor another number, and close what has that number (dup2(2)).

        Raises:
            OSError: the number is beyond RLIMIT_NOFILE.
        """
        moved = os.dup2(self.fileno(), number, inheritable=False)
        self.close()
        self.number = moved

    def adopt(self, other: Fd) -> None:
        """Own the descriptor of *other* instead of this one, which is closed."""
        assert self.number < 0
        self.number = other.detach()

    def close(self) -> None:
        """Close the descriptor; a second call does nothing."""
        number, self.number = self.number, -1
        if number >= 0:
            try:
                os.close(number)
            except OSError:
                # EIO and the like speak of lost writes of the file, which is its writer's business;
                # the descriptor is gone in any case.
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
    """Close each of *fds*, those of consecutive numbers with one system call (close_range(2))."""
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
    """The number of *fd*, an int or anything with ``fileno()``; ValueError when it is negative."""
    number = fd if isinstance(fd, int) else fd.fileno()
    if number < 0:
        raise ValueError(f"{number} is no file descriptor")
    return number


def pipe() -> tuple[Fd, Fd]:
    """A pipe: its read end and its write end, which never block (pipe(7)).

    Raises:
        OSError: this process is out of descriptors.
    """
    reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    return Fd(reader), Fd(writer)


def is_in_memory(fd: int) -> bool:
    """Whether *fd* is of a file that is kept in memory, a memfd for one.  A name tells nothing:
    a file of another mount namespace can be called ``/memfd:x`` as well.
    """
    try:
        fcntl.fcntl(fd, fcntl.F_GET_SEALS)  # EINVAL on everything else (fcntl(2))
    except OSError:
        return False
    return True


def open_files_limit() -> int:
    """How many descriptors this process may have open (RLIMIT_NOFILE, the soft limit)."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def unread_bytes(sock: socket.socket) -> int:
    """How many bytes wait to be read from a Unix stream socket (SIOCINQ, unix(7))."""
    return _ask(sock, termios.FIONREAD)


def max_unreceived_messages(sock: socket.socket) -> int:
    """How many messages the peer of a Unix stream socket can have left unread at most (SIOCOUTQ,
    unix(7), which tells the memory that they take); 0 if there is none.
    """
    return -(-_ask(sock, termios.TIOCOUTQ) // _MESSAGE_BYTES)


def _ask(sock: socket.socket, question: int) -> int:
    """What ioctl(2) answers; into a buffer that can be written to, it takes half of the time."""
    answer = bytearray(_INT_BYTES)
    fcntl.ioctl(sock.fileno(), question, answer)
    found: int
    (found,) = _unpack(answer)
    return found


#: What the command is told whose descriptors the kernel has dropped (MSG_CTRUNC, recvmsg(2)).
_WERE_LOST = "File descriptors sent via SCM_RIGHTS were lost: "
OUT_OF_FDS = _WERE_LOST + "the receiver is out of file descriptors"
DENIED = _WERE_LOST + "the kernel's security module denied them to the receiver"

# Room for one control message with as many descriptors as the kernel passes at a time.
_CONTROL_BYTES = socket.CMSG_SPACE(SCM_MAX_FD * array.array("i").itemsize)

# As plain numbers: the enumerations of the socket module take microseconds to combine.
_PEEK, _CLOEXEC = int(socket.MSG_PEEK), int(socket.MSG_CMSG_CLOEXEC)
_TRUNCATED = int(socket.MSG_CTRUNC)
_SEND_FLAGS = int(socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)
_SOCKET_LEVEL, _RIGHTS = int(socket.SOL_SOCKET), int(socket.SCM_RIGHTS)
_SCM_PIDFD = 4  # linux/socket.h; not in Python's socket module

# Bytes of memory that a message takes on its way at least: its sk_buff and skb_shared_info.
_MESSAGE_BYTES = 512

_one = struct.Struct("i")
_INT_BYTES = _one.size
_unpack = _one.unpack


def peek(sock: socket.socket, most: int = READ_BYTES) -> tuple[bytes, bool]:
    """See what the next read would return, without consuming it: its bytes, and whether
    descriptors come with the last of them.

    The kernel ends a read after the bytes that descriptors were sent with.  Without room for
    control messages it leaves the descriptors where they are and says MSG_CTRUNC (recvmsg(2)).
    Where all *most* bytes are there, they may have been sent with bytes further behind.

    Args:
        sock: the socket.
        most: bytes to see at most.

    Raises:
        BlockingIOError: nothing is there yet.
    """
    data, _, flags, _ = sock.recvmsg(most, 0, _PEEK)
    fds_follow = flags & _TRUNCATED != 0
    if fds_follow and len(data) == READ_BYTES:
        # What they were sent with may go on behind these bytes: show it whole, the next time.
        data = data[:-SEGMENT_BYTES]
    return data, fds_follow


def receive(sock: socket.socket, count: int) -> tuple[bytes, list[Fd], str]:
    """Read up to *count* bytes and the descriptors that were sent with them.

    The descriptors are close-on-exec and owned from here on.  The text is not empty if the kernel
    had to drop some of them (MSG_CTRUNC), and says why.

    Raises:
        BlockingIOError: nothing is there yet.
    """
    data, control, flags, _ = sock.recvmsg(count, _CONTROL_BYTES, _CLOEXEC)
    fds: list[Fd] = []
    for level, kind, payload in control:
        if kind == _RIGHTS and level == _SOCKET_LEVEL:
            if len(payload) == _INT_BYTES:  # as nearly always
                (number,) = _unpack(payload)
                fds.append(Fd(number))
            else:
                fds += starmap(Fd, _one.iter_unpack(payload))
        elif level == _SOCKET_LEVEL and kind == _SCM_PIDFD:
            Fd(*_unpack(payload)).close()
    return data, fds, _why_lost(sock) if flags & _TRUNCATED else ""


def _why_lost(sock: socket.socket) -> str:
    """Why the kernel has dropped descriptors: it does not say, but whether there is room tells."""
    try:
        Fd(os.dup(sock.fileno())).close()
    except OSError:
        return OUT_OF_FDS
    return DENIED


def receive_planned(sock: socket.socket, lengths: Sequence[int]) -> tuple[int, list[Fd], str]:
    """Make reads of these *lengths*, one after the other until one of them brings descriptors, and
    discard what the others would read; as :func:`receive`, with the number of that read first.
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
    """Read *count* bytes that were seen already, and with which no descriptors come."""
    sock.recv(count)


def send(sock: socket.socket, data: bytes | memoryview, fds: Sequence[FileDescriptorLike]) -> int:
    """Send *data*, with duplicates of *fds* attached to its first byte; how many bytes went.

    Raises:
        BlockingIOError: the peer has to read first; nothing was sent.
    """
    if not fds:
        return sock.send(data, _SEND_FLAGS)
    rights = array.array("i", map(fileno, fds))
    return sock.sendmsg([data], [(_SOCKET_LEVEL, _RIGHTS, rights)], _SEND_FLAGS)


def peer_address(fd: FileDescriptorLike) -> str | bytes:
    """The address that the Unix socket *fd* is connected to; empty where there is none."""
    try:
        sock = socket.socket(fileno=fileno(fd))
    except OSError:  # no socket
        return ""
    try:
        address: str | bytes = sock.getpeername() if sock.family == socket.AF_UNIX else ""
    except OSError:  # not connected
        address = ""
    sock.detach()
    return address


# capabilities(7): CAP_SYS_ADMIN and CAP_SYS_RESOURCE.
_UNLIMITED_IN_FLIGHT = 1 << 21 | 1 << 24


def in_flight_is_limited() -> bool:
    """Whether this process meets the limit that :class:`InFlightProbe` is about: root does as well,
    where a service manager has taken both capabilities from it.
    """
    try:
        with open("/proc/self/status", "rb") as status:
            held = next(line for line in status if line.startswith(b"CapEff:"))
    except (OSError, StopIteration):
        return True
    return not int(held.split()[1], 16) & _UNLIMITED_IN_FLIGHT


class InFlightProbe:
    """Tells whether descriptors can be passed at all: of an unprivileged user, all processes
    together may have only so many on their way that nobody has received yet (ETOOMANYREFS,
    unix(7)), and a send that meets that limit is a reply that cannot go out.

    Raises:
        OSError: this process is out of descriptors.
    """

    def __init__(self) -> None:
        with ExitStack() as stack:
            self._near, self._far = map(stack.enter_context, socket.socketpair())
            self._null = stack.enter_context(Fd(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)))
            self._open = stack.pop_all()

    def exhausted(self) -> bool:
        """Whether it would fail now."""
        try:
            send(self._near, b" ", [self._null])
        except OSError as exc:
            return exc.errno == errno.ETOOMANYREFS
        discard(self._far, 1)  # and with it the descriptor
        return False

    def close(self) -> None:
        """Close what this takes."""
        self._open.close()
