"""A worker process, and the socket to it."""

from __future__ import annotations

import os
import select
import signal
import socket
from array import array

TYPE_CHECKING = False
if TYPE_CHECKING:  # typing takes a mebibyte
    from collections.abc import Sequence

#: Seconds within which a worker serves.  A takeover may take a while.
START_TIMEOUT = 120.0

#: Seconds within which a spare worker asks for what is kept: it has nothing else to do.
SPARE_TIMEOUT = 5.0

#: Bytes of a message: the longest names socket files.
_MESSAGE = 32 << 10

#: Messages without bytes in a row that show that nobody is left at the other end: recvmsg(2) does
#: not tell such a message from the end.
_EMPTY_MESSAGES = 8

#: Room for one control message with as many descriptors as the kernel passes at a time.
_MOST_FDS = 253
_CONTROL = socket.CMSG_SPACE(_MOST_FDS * 4)
_FLAGS = int(socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC)
_RIGHTS = int(socket.SOL_SOCKET), int(socket.SCM_RIGHTS)
_SEND_FLAGS = int(socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
_TRUNCATED = int(socket.MSG_CTRUNC)


class Worker:
    """A running worker.

    Args:
        pid: its process, a child of ours.
        sock: our end of the socket to it.
        timeout: seconds until it has to say something for the first time.
    """

    def __init__(self, pid: int, sock: socket.socket, timeout: float = START_TIMEOUT) -> None:
        self.pid = pid
        self.sock = sock
        self.number = sock.fileno()
        #: Seconds from its start until it has to serve, or to say something.
        self.start_timeout = timeout
        self.ready_at: float | None = None
        #: Signals forwarded that end it.
        self.stops = 0
        #: What its socket is polled for.
        self.polled_for: int = select.POLLIN
        self._empty = 0  # messages without bytes, in a row
        #: What there was no room for yet.
        self.unsent: list[tuple[bytes, Sequence[int]]] = []

    def kill(self, number: int) -> None:
        """Send a signal.  Until we wait for it, no other process can have its pid."""
        try:
            os.kill(self.pid, number)
        except OSError:
            pass

    def receive(self) -> tuple[bytes, list[int], bool] | None:
        """The next message, its descriptors, and whether some of these were lost for want of room;
        None if there is none now, or never again.
        """
        try:
            data, control, flags, _ = self.sock.recvmsg(_MESSAGE, _CONTROL, _FLAGS)
        except OSError:  # BlockingIOError if there is none now
            return None
        fds: list[int] = []
        for _, _, payload in control:  # SCM_RIGHTS: nothing else was asked for
            fds += array("i", payload)
        if data:
            self._empty = 0
        else:
            self._empty += 1
            if self._empty > _EMPTY_MESSAGES and not fds:
                return None
        return data, fds, flags & _TRUNCATED != 0

    def send(self, message: bytes, fds: Sequence[int] = ()) -> None:
        """Send a message and descriptors, now or with :meth:`flush`."""
        if self.unsent or not self._send_nowait(message, fds):
            self.unsent.append((message, fds))

    def flush(self) -> bool:
        """Send what could not be sent before; whether something is still left."""
        while self.unsent and self._send_nowait(*self.unsent[0]):
            del self.unsent[0]
        return bool(self.unsent)

    def _send_nowait(self, message: bytes, fds: Sequence[int]) -> bool:
        """Send a message; whether it needs not be sent again."""
        try:
            if fds:
                rights = [(*_RIGHTS, array("i", fds))]
                self.sock.sendmsg([message], rights, _SEND_FLAGS)
            else:
                self.sock.send(message, _SEND_FLAGS)
        except BlockingIOError:
            return False
        except OSError:
            # The worker is dead; or this user has too many descriptors on their way
            # (ETOOMANYREFS), and it asks for no more where these do not come.
            return not fds or self._send_nowait(message, ())
        return True


class Spare(Worker):
    """A worker that waits until it is needed."""

    def __init__(self, pid: int, sock: socket.socket) -> None:
        super().__init__(pid, sock, SPARE_TIMEOUT)

    @property
    def is_child(self) -> bool:
        """Whether it lives, and is a child of ours: it was another's before that died."""
        try:
            return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
        except ChildProcessError:
            return False

    def is_usable(self, may_be_others: bool) -> bool:
        """Whether it lives and can be started.

        Args:
            may_be_others: the worker that has started it hangs in its end, and so it is not a child
                of ours yet: its end is heard of from its socket meanwhile.
        """
        return self.is_child or (may_be_others and self.receive() is None)

    def start(self, sockets: Sequence[tuple[str, int]], names: Sequence[bytes]) -> None:
        """Have it take over.

        Args:
            sockets: those of the service manager, with their names.
            names: those of the descriptors that it may fetch.
        """
        for at in range(0, len(sockets), _MOST_FDS):
            some = sockets[at : at + _MOST_FDS]
            text = ":".join(name for name, _ in some)
            self.send(b"SOCKETS=" + os.fsencode(text), [number for _, number in some])
        for at in range(0, len(names), _MOST_FDS):
            self.send(b"NAMES=" + b":".join(names[at : at + _MOST_FDS]))
        self.send(b"START")

    def end(self) -> None:
        """It is not needed any more."""
        if self.is_child:
            self.kill(signal.SIGKILL)
        self.sock.close()
