"""A worker process, waiting as a spare one or started, and the socket to it."""

from __future__ import annotations

import errno
import os
import select
import signal
import socket
from array import array

TYPE_CHECKING = False
if TYPE_CHECKING:  # typing takes a mebibyte
    from collections.abc import Sequence

#: Seconds that a worker has until it serves; a takeover may take a while.
START_TIMEOUT = 120.0

#: Seconds that a waiting worker has, after START, until its first message.
_ANSWER_TIMEOUT = 5.0

#: Maximum size of a message in bytes; QMPFD_SOCKETS= makes the longest.
_MESSAGE = 32 << 10

#: Number of empty messages in a row that count as EOF: recvmsg(2) returns b"" for both.
_EMPTY_MESSAGES = 8

#: Size of a control message with the maximum number of descriptors (SCM_MAX_FD, unix(7)).
_MOST_FDS = 253
_CONTROL = socket.CMSG_SPACE(_MOST_FDS * 4)
_FLAGS = int(socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC)
_RIGHTS = int(socket.SOL_SOCKET), int(socket.SCM_RIGHTS)
_SEND_FLAGS = int(socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
_TRUNCATED = int(socket.MSG_CTRUNC)

#: sendmsg(2): the socket has no room now, or the kernel no memory.
_NO_ROOM = (errno.EAGAIN, errno.ENOBUFS, errno.ENOMEM)


class Worker:
    """A worker.  Until :meth:`start`, it is a spare worker, which waits.

    Args:
        pid: its process.
        sock: the parent's end of the socket to it; owned from here on.
    """

    def __init__(self, pid: int, sock: socket.socket) -> None:
        self.pid = pid
        self.sock = sock
        self.number = sock.fileno()
        #: Seconds that it has from its start until it serves; at first, until its first message.
        self.start_timeout = START_TIMEOUT
        self.ready_at: float | None = None
        #: Number of terminating signals forwarded to it.
        self.stops = 0
        #: The events that its socket is polled for (poll(2)).
        self.polled_for: int = select.POLLIN
        self._empty = 0  # number of empty messages in a row
        #: Messages and descriptors for which its queue had no room.
        self.unsent: list[tuple[bytes, Sequence[int]]] = []

    def kill(self, number: int) -> None:
        """Send a signal.  The kernel does not reuse the pid before waitpid(2)."""
        try:
            os.kill(self.pid, number)
        except OSError:
            pass

    def receive(self) -> tuple[bytes, list[int], bool] | None:
        """Receive the next message.

        Returns:
            The message, its descriptors, and whether the kernel has dropped some of these; None if
            no message is queued, or at EOF.
        """
        try:
            data, control, flags, _ = self.sock.recvmsg(_MESSAGE, _CONTROL, _FLAGS)
        except OSError:  # BlockingIOError: no message is queued
            return None
        fds: list[int] = []
        for _, _, payload in control:  # SCM_RIGHTS only: no other kind was enabled
            fds += array("i", payload)
        if data:
            self._empty = 0
        else:
            self._empty += 1
            if self._empty > _EMPTY_MESSAGES and not fds:
                return None
        return data, fds, flags & _TRUNCATED != 0

    def send(self, message: bytes, fds: Sequence[int] = ()) -> None:
        """Send a message with descriptors, or queue it for :meth:`flush`."""
        if self.unsent or not self._send_nowait(message, fds):
            self.unsent.append((message, fds))

    def flush(self) -> bool:
        """Send queued messages; return whether some are left."""
        while self.unsent and self._send_nowait(*self.unsent[0]):
            del self.unsent[0]
        return bool(self.unsent)

    def _send_nowait(self, message: bytes, fds: Sequence[int]) -> bool:
        """Send a message; return False if it has to be queued."""
        try:
            if fds:
                rights = [(*_RIGHTS, array("i", fds))]
                self.sock.sendmsg([message], rights, _SEND_FLAGS)
            else:
                self.sock.send(message, _SEND_FLAGS)
        except OSError as exc:
            if exc.errno in _NO_ROOM:
                return False
            # The worker is dead; or this user has too many descriptors in flight (ETOOMANYREFS):
            # send the message without them, which the worker treats as an error.
            return not fds or self._send_nowait(message, ())
        return True

    # -- a spare worker ------------------------------------------------------------------------

    @property
    def is_child(self) -> bool:
        """Whether it lives, and is a child of the parent and not of the worker that forked it."""
        try:
            return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
        except ChildProcessError:
            return False

    def wake(self, may_be_others: bool) -> bool:
        """Return whether it lives and can be started; from here on, it has to answer soon.

        Args:
            may_be_others: whether the worker that has forked it may hang in its end, and so still
                be its parent: then its socket shows whether it lives.
        """
        self.start_timeout = _ANSWER_TIMEOUT
        return self.is_child or (may_be_others and self.receive() is None)

    def start(self, names: Sequence[bytes]) -> None:
        """Start it as the worker.

        Args:
            names: the names of the stored descriptors, which it fetches.
        """
        for at in range(0, len(names), _MOST_FDS):
            self.send(b"NAMES=" + b":".join(names[at : at + _MOST_FDS]))
        self.send(b"START")

    def end(self) -> bool:
        """Kill it, if it is a child, and close the socket, which ends it otherwise; return whether
        it was killed.
        """
        killed = self.is_child
        if killed:
            self.kill(signal.SIGKILL)
        self.sock.close()
        return killed
