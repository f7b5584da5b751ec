"""Service managers that speak systemd's protocols: inherited sockets, readiness, watchdog, and
the file-descriptor store.

See sd_listen_fds(3), sd_notify(3), sd_pid_notify_with_fds(3) and sd_watchdog_enabled(3).  Nothing
here needs systemd itself, and without its environment variables nothing here does anything.  The
parent of ``serve --supervise`` speaks the same, over a socket that its worker inherits.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import socket
import stat
import struct
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from typing import NamedTuple

from . import fd as fds
from .fd import Fd, FileDescriptorLike
from .streams import write_nowait
from .unix_address import connectable

_log = logging.getLogger("qmpfd")

_DONTWAIT = int(socket.MSG_DONTWAIT)

#: Microseconds that the parent has to answer, before others are served meanwhile: the kernel waits
#: until its next tick, of 1 to 10 ms (socket(7), SO_RCVTIMEO).
_ANSWER_USEC = 1000
_TIMEVAL = struct.Struct("ll")

#: The first inherited descriptor (SD_LISTEN_FDS_START).
_FIRST = 3

#: Bytes of a message of the parent at most: the names of as many descriptors as can come with one.
_MESSAGE_BYTES = 128 << 10

#: What the parent of ``serve --supervise`` calls an inherited descriptor that has its number among
#: those that are passed: it is none of them.
_IN_PLACE = "qmpfd-inherited"


class InheritedFd(NamedTuple):
    """A descriptor that the service manager has passed to us, close-on-exec from here on; and its
    name there.
    """

    fd: Fd
    name: str


def take_listen_fds() -> list[InheritedFd]:
    """The descriptors that were passed to this process, with their names.

    The variables that tell of them are removed: children are not to take them for theirs.
    """
    pid, count = os.environ.pop("LISTEN_PID", ""), os.environ.pop("LISTEN_FDS", "")
    # A name becomes an opaque text, which is UTF-8.
    told = os.environ.pop("LISTEN_FDNAMES", "").encode("utf-8", "backslashreplace").decode()
    names = told.split(":") if told else []
    os.environ.pop("LISTEN_PIDFDID", None)
    if not pid and not count:
        return []
    if pid != str(os.getpid()) or not count.isdecimal():
        # A shell or another program between the service manager and us, which is to exec(2).
        _log.warning(
            "LISTEN_PID=%s LISTEN_FDS=%s are not for this process, %d: no descriptor is taken",
            *(pid, count, os.getpid()),
        )
        return []
    taken = []
    for index in range(min(int(count[:9]), fds.open_files_limit())):
        name = names[index] if index < len(names) else "unknown"
        if name == _IN_PLACE:
            continue
        try:
            os.set_inheritable(_FIRST + index, False)
        except OSError:  # it was not passed after all
            continue
        taken.append(InheritedFd(Fd(_FIRST + index), name))
    return taken


class Notifier:
    """A connection to whoever started this process, for datagrams and descriptors with them.

    Args:
        sock: the socket, connected; owned from here on.
        is_parent: it is the parent of ``serve --supervise``, which tells us by closing its end
            that it is gone.
    """

    def __init__(self, sock: socket.socket, is_parent: bool) -> None:
        # Calls that are not to wait have MSG_DONTWAIT; SO_RCVTIMEO bounds the one that is.
        sock.setblocking(True)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _TIMEVAL.pack(0, _ANSWER_USEC))
        self._sock = sock
        self.is_parent = is_parent
        #: Called with each message of the parent, see :mod:`qmpfd.supervisor`, that is not about
        #: signals.
        self.on_message: Callable[[str], object] = lambda _: None
        #: How many signals that end this process it has forwarded so far.
        self.signals = 0

    @classmethod
    def connect(cls) -> Notifier | None:
        """The service manager at ``$NOTIFY_SOCKET``; None if it cannot be reached."""
        path = os.environ.get("NOTIFY_SOCKET", "")
        if not path.startswith(("/", "@")):
            return None
        try:
            with ExitStack() as stack:
                sock = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
                sock.connect(stack.enter_context(connectable(path)))
                stack.pop_all()
        except OSError:  # this process may be out of descriptors as well
            return None
        return cls(sock, is_parent=False)

    def fileno(self) -> int:
        """Of the socket: writable when there is room, readable when the parent is gone."""
        return self._sock.fileno()

    def receive_fds(self, timeout: float | None) -> tuple[str, list[Fd]]:
        """Wait for the parent's next message, and the descriptors with it; an empty one if the
        parent is gone.

        Args:
            timeout: seconds to wait, None for any time.

        Raises:
            OSError: not all of the descriptors can be had here, or it does not answer in time.
        """
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        if not poll.poll(None if timeout is None else timeout * 1000):
            raise TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
        try:
            data, received, lost = fds.receive(self._sock, _MESSAGE_BYTES)
        except ConnectionError:
            return "", []
        if lost:
            fds.close_all(received)
            raise OSError(errno.EMFILE, lost)
        return data.decode("utf-8", "backslashreplace"), received

    def receive(self, *, wait: bool = False) -> bool:
        """Receive one message of the parent, and handle it; whether there was one.

        Args:
            wait: wait for it for some milliseconds at most.

        Raises:
            EOFError: the parent is gone.
        """
        try:
            message = self._sock.recv(4096, 0 if wait else _DONTWAIT).decode("ascii", "replace")
        except BlockingIOError:
            return False
        except OSError as exc:
            raise EOFError from exc
        if not message:
            raise EOFError
        if message.startswith("SIGNALS="):
            self.signals = int(message.partition("=")[2])
        else:
            self.on_message(message)
        return True

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


#: The variable that tells a worker the number of its socket to the parent.
PARENT_VARIABLE = "QMPFD_NOTIFY_FD"


def take_parent() -> Notifier | None:
    """The parent of ``serve --supervise``, if this process is its worker: the parent gets the
    messages that the service manager would get.
    """
    number = os.environ.pop(PARENT_VARIABLE, "")
    try:
        if not number.isdecimal() or not stat.S_ISSOCK(os.fstat(int(number)).st_mode):
            return None
    except OSError:  # nothing is open there
        return None
    os.set_inheritable(int(number), False)
    return Notifier(socket.socket(fileno=int(number)), is_parent=True)


def invocation_id() -> str | None:
    """Which run of which service this process belongs to, if it does (systemd.exec(5))."""
    found = os.environ.get("INVOCATION_ID", "")
    return found if found.isascii() and found.isalnum() else None


def take_store_size() -> int:
    """How many descriptors whoever started this process keeps for it (``$FDSTORE``)."""
    size = os.environ.pop("FDSTORE", "")
    return int(size) if size.isdecimal() else 0


def announce_ready(fd: Fd) -> None:
    """Write a newline to *fd* and close it: readiness as s6 has it (its page notifywhenup).

    The reader may be gone, or so slow that the pipe is full: that is no reason to wait or to end.
    """
    with fd, suppress(OSError):
        write_nowait(fd.fileno(), b"\n")


def watchdog_interval() -> float | None:
    """Seconds within which the service manager wants to hear ``"WATCHDOG=1"``; None if it does
    not.
    """
    limit, pid = os.environ.get("WATCHDOG_USEC", ""), os.environ.get("WATCHDOG_PID")
    if not limit.isdecimal() or pid not in (None, str(os.getpid())):
        return None
    return int(limit) / 1e6 or None
