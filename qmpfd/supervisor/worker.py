"""A worker process, and the socket to it."""

from __future__ import annotations

import os
import select
import signal
import socket
import time

#: Signals that end the worker or have it read its policy again: those are forwarded.
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

#: Signals that keep what they do by default: faults, job control, and what nobody can change.
_BY_DEFAULT = {
    signal.SIGKILL,
    signal.SIGSTOP,
    signal.SIGTSTP,
    signal.SIGCONT,
    signal.SIGABRT,
    signal.SIGBUS,
    signal.SIGFPE,
    signal.SIGILL,
    signal.SIGSEGV,
    signal.SIGSYS,
    signal.SIGTRAP,
}

#: Bytes of a message: the longest names socket files.
_MESSAGE = 32 << 10

#: Room for one control message with as many descriptors as the kernel passes at a time.
_CONTROL = socket.CMSG_SPACE(253 * 4)
_FLAGS = int(socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC)
_RIGHTS = int(socket.SOL_SOCKET), int(socket.SCM_RIGHTS)
_TRUNCATED = int(socket.MSG_CTRUNC)


def ignore_signals(heard: tuple[int, ...]) -> None:
    """Ignore every signal that would end or stop this process and is none of *heard*.

    SIGTTOU is one: with ``stty tostop``, it would stop whoever logs to the terminal.
    """
    for number in signal.valid_signals() - _BY_DEFAULT - set(heard):
        signal.signal(number, signal.SIG_IGN)


class Worker:
    """A running worker.

    Args:
        pid: its process, a child of ours.
        sock: our end of the socket to it.
    """

    def __init__(self, pid: int, sock: socket.socket) -> None:
        self.pid = pid
        self.sock = sock
        self.started_at = self.heard_at = time.monotonic()
        self.ready_at: float | None = None
        #: Signals forwarded that end it, and when the first one was.
        self.stops, self.stopped_at = 0, 0.0
        #: It has had a journal kept.
        self.had_journal = False
        #: What its socket is polled for.
        self.polled_for: int = select.POLLIN
        self._unsent: list[bytes] = []

    def kill(self, number: int) -> None:
        """Send a signal.  Until we wait for it, no other process can have its pid."""
        try:
            os.kill(self.pid, number)
        except OSError:
            pass

    def receive(self) -> tuple[bytes, list[int], bool] | None:
        """The next message, its descriptors, and whether some of these were lost for want of room;
        None if there is none now; without bytes and descriptors if there will be none any more.
        """
        try:
            data, control, flags, _ = self.sock.recvmsg(_MESSAGE, _CONTROL, _FLAGS)
        except BlockingIOError:
            return None
        except OSError:
            return b"", [], False
        fds: list[int] = []
        for level, kind, payload in control:
            if (level, kind) == _RIGHTS:
                fds += memoryview(payload[: len(payload) & ~3]).cast("i").tolist()
        return data, fds, flags & _TRUNCATED != 0

    def send(self, message: bytes) -> None:
        """Send a message, now or with :meth:`flush`."""
        self._unsent.append(message)
        self.flush()

    def flush(self) -> bool:
        """Send what could not be sent before; whether something is still left."""
        while self._unsent:
            try:
                self.sock.send(self._unsent[0], socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            except BlockingIOError:
                break
            except OSError:  # it is dead
                self._unsent.clear()
                break
            del self._unsent[0]
        return bool(self._unsent)
