"""Service managers that speak systemd's protocols: inherited sockets, readiness, watchdog, and
the file-descriptor store.

See sd_listen_fds(3), sd_notify(3), sd_pid_notify_with_fds(3) and sd_watchdog_enabled(3).  Nothing
here needs systemd itself, and without its environment variables nothing here does anything.  The
parent of ``serve --supervise`` speaks the same, over a socket that its worker inherits.
"""

from __future__ import annotations

import os
import select
import socket
import stat
import time
from collections.abc import Sequence
from typing import NamedTuple

from . import fd as fds
from .fd import Fd, FileDescriptorLike

#: The first inherited descriptor (SD_LISTEN_FDS_START).
_FIRST = 3


class InheritedFd(NamedTuple):
    """A descriptor that the service manager has passed to us.

    Args:
        fd: the descriptor, close-on-exec from here on.
        name: what it is called there.
    """

    fd: Fd
    name: str


def take_listen_fds() -> list[InheritedFd]:
    """The descriptors that were passed to this process, with their names.

    The variables that tell of them are removed: children are not to take them for theirs.
    """
    pid, count = os.environ.pop("LISTEN_PID", ""), os.environ.pop("LISTEN_FDS", "")
    names = os.environ.pop("LISTEN_FDNAMES", "").split(":")
    os.environ.pop("LISTEN_PIDFDID", None)
    if pid != str(os.getpid()) or not count.isdecimal():
        return []
    taken = []
    for number in range(_FIRST, _FIRST + int(count)):
        os.set_inheritable(number, False)
        index = number - _FIRST
        taken.append(InheritedFd(Fd(number), names[index] if index < len(names) else "unknown"))
    return taken


class Notifier:
    """A connection to whoever started this process, for datagrams and descriptors with them.

    Args:
        sock: the socket, connected; owned from here on.
        is_parent: it is the parent of ``serve --supervise``, which tells us by closing its end
            that it is gone.
    """

    def __init__(self, sock: socket.socket, is_parent: bool) -> None:
        sock.setblocking(False)
        self._sock = sock
        self.is_parent = is_parent

    @classmethod
    def connect(cls) -> Notifier | None:
        """The service manager at ``$NOTIFY_SOCKET``; None if there is none."""
        path = os.environ.get("NOTIFY_SOCKET", "")
        if not path.startswith(("/", "@")):
            return None
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            sock.connect("\0" + path[1:] if path.startswith("@") else path)
        except OSError:
            sock.close()
            return None
        return cls(sock, is_parent=False)

    @classmethod
    def inherit(cls, number: int) -> Notifier | None:
        """The parent behind an inherited descriptor; None if that is something else."""
        try:
            if not stat.S_ISSOCK(os.fstat(number).st_mode):
                return None
        except OSError:
            return None
        os.set_inheritable(number, False)
        return cls(socket.socket(fileno=number), is_parent=True)

    def fileno(self) -> int:
        """Of the socket: writable when there is room, readable when the parent is gone."""
        return self._sock.fileno()

    def move_to(self, number: int) -> None:
        """As :meth:`qmpfd.kernel.fd.Fd.move_to`."""
        with Fd(self._sock.detach()) as fd:
            fd.move_to(number)
            self._sock = socket.socket(fileno=fd.detach())

    def send(self, text: str, passed: Sequence[FileDescriptorLike] = ()) -> None:
        """Send one message.

        Args:
            text: its lines.
            passed: descriptors whose duplicates go with it.

        Raises:
            BlockingIOError: there is no room for it.
            OSError: nobody will get it.
        """
        fds.send(self._sock, text.encode(), passed)

    def close(self) -> None:
        """End the connection."""
        self._sock.close()


_PARENT_VARIABLE = "QMPFD_NOTIFY_FD"
_parent: Notifier | None = None


def take_parent() -> Notifier | None:
    """The parent of ``serve --supervise``, if this process is its worker.

    From then on it is told what would be told to the service manager.
    """
    global _parent  # noqa: PLW0603 - as the environment that it comes from, one for the process
    number = os.environ.pop(_PARENT_VARIABLE, "")
    if number.isdecimal():
        _parent = Notifier.inherit(int(number))
    return _parent


def take_store_size() -> int:
    """How many descriptors whoever started this process keeps for it (``$FDSTORE``)."""
    size = os.environ.pop("FDSTORE", "")
    return int(size) if size.isdecimal() else 0


def notify(*assignments: str) -> bool:
    """Tell the service manager something, such as ``"READY=1"``; whether there is one.

    That it cannot be reached is no reason to end: it is told again, or not.
    """
    notifier = _parent or Notifier.connect()
    if notifier is None:
        return False
    try:
        notifier.send("\n".join(assignments))
    except OSError:
        return False
    finally:
        if notifier is not _parent:
            notifier.close()
    return True


def announce_ready(fd: Fd) -> None:
    """Write a newline to *fd* and close it: readiness as s6 has it (its page notifywhenup).

    The reader may be gone, or so slow that the pipe is full: that is no reason to wait or to end.
    """
    poll = select.poll()
    poll.register(fd.fileno(), select.POLLOUT)
    with fd:
        if poll.poll(0):
            try:
                os.write(fd.fileno(), b"\n")
            except OSError:
                pass


def notify_reloading() -> None:
    """Tell the service manager that a reload has begun; ``"READY=1"`` tells that it is over."""
    notify("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")


def watchdog_interval() -> float | None:
    """Seconds within which the service manager wants to hear ``"WATCHDOG=1"``; None if it does
    not.
    """
    limit, pid = os.environ.get("WATCHDOG_USEC", ""), os.environ.get("WATCHDOG_PID")
    if not limit.isdecimal() or pid not in (None, str(os.getpid())):
        return None
    return int(limit) / 1e6 or None
