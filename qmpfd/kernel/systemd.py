"""systemd's protocols for services: inherited sockets, readiness, watchdog, file descriptor store.

See sd_listen_fds(3), sd_notify(3), sd_pid_notify_with_fds(3) and sd_watchdog_enabled(3).  systemd
itself is not needed: without its environment variables, nothing here has an effect.  The parent
of ``serve --supervise`` speaks the same protocols, over a socket that its worker inherits.
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

#: Microseconds for which the event loop may block for the parent's acknowledgement; the kernel
#: rounds up to its next tick, of 1 to 10 ms (socket(7), SO_RCVTIMEO).
_ANSWER_USEC = 1000
_TIMEVAL = struct.Struct("ll")

#: The first inherited descriptor (SD_LISTEN_FDS_START).
_FIRST = 3

#: Maximum size of a message of the parent: the names of the descriptors that one can carry.
_MESSAGE_BYTES = 128 << 10


class InheritedFd(NamedTuple):
    """A descriptor passed by the service manager, close-on-exec, and its LISTEN_FDNAMES name."""

    fd: Fd
    name: str


def take_listen_fds() -> list[InheritedFd]:
    """Return the descriptors that were passed to this process, with their names.

    The environment variables are removed: they must not reach child processes.
    """
    pid, count = os.environ.pop("LISTEN_PID", ""), os.environ.pop("LISTEN_FDS", "")
    # A name becomes an opaque text, which is UTF-8.
    told = os.environ.pop("LISTEN_FDNAMES", "").encode("utf-8", "backslashreplace").decode()
    names = told.split(":") if told else []
    os.environ.pop("LISTEN_PIDFDID", None)
    if not pid and not count:
        return []
    if pid != str(os.getpid()) or not count.isdecimal():
        # The service manager has started a shell or another program, which did not exec(2) us.
        _log.warning(
            "LISTEN_PID=%s LISTEN_FDS=%s are not for this process, %d: no descriptor is taken",
            *(pid, count, os.getpid()),
        )
        return []
    taken = []
    for index in range(min(int(count[:9]), fds.open_files_limit())):
        name = names[index] if index < len(names) else "unknown"
        try:
            os.set_inheritable(_FIRST + index, False)
        except OSError:  # not open, so not passed
            continue
        taken.append(InheritedFd(Fd(_FIRST + index), name))
    return taken


class Notifier:
    """Connection to the service manager or supervising parent; sends messages with descriptors.

    Args:
        sock: the connected socket; owned from here on.
        is_parent: whether the peer is the parent of ``serve --supervise``: then the end of the
            connection means that the parent has exited.
    """

    def __init__(self, sock: socket.socket, is_parent: bool) -> None:
        # All calls have MSG_DONTWAIT, but for one recv(2), whose waiting SO_RCVTIMEO bounds.
        sock.setblocking(True)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _TIMEVAL.pack(0, _ANSWER_USEC))
        self._sock = sock
        self.is_parent = is_parent
        #: Called with each message of the parent, see :mod:`qmpfd.supervisor`, except SIGNALS=.
        self.on_message: Callable[[str], object] = lambda _: None
        #: Number of terminating signals that the parent has forwarded so far.
        self.signals = 0

    @classmethod
    def connect(cls) -> Notifier | None:
        """Connect to the service manager at ``$NOTIFY_SOCKET``; return None if that fails."""
        path = os.environ.get("NOTIFY_SOCKET", "")
        if not path.startswith(("/", "@")):
            return None
        try:
            with ExitStack() as stack:
                sock = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
                sock.connect(stack.enter_context(connectable(path)))
                stack.pop_all()
        except OSError:  # no such socket, or out of descriptors
            return None
        return cls(sock, is_parent=False)

    def fileno(self) -> int:
        """Return the socket's descriptor; it is readable once the parent has exited."""
        return self._sock.fileno()

    def receive_fds(self, timeout: float | None) -> tuple[str, list[Fd]]:
        """Receive the parent's next message and its descriptors; "" if the parent has exited.

        Args:
            timeout: maximum seconds to wait; None for no limit.

        Raises:
            OSError: the kernel dropped some of the descriptors, or *timeout* has passed.
        """
        if not fds.poll(self._sock, select.POLLIN, timeout):
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
        """Receive one message of the parent, and handle it; return whether there was one.

        Args:
            wait: whether to block for it, for a few milliseconds at most.

        Raises:
            EOFError: the parent has exited.
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
        """Renumber the socket, see :meth:`qmpfd.kernel.fd.Fd.move_to`."""
        with Fd(self._sock.detach()) as fd:
            fd.move_to(number)
            self._sock = socket.socket(fileno=fd.detach())

    def send(self, text: str, passed: Sequence[FileDescriptorLike] = ()) -> None:
        """Send one message.

        Args:
            text: the lines of the message.
            passed: descriptors whose duplicates are attached.

        Raises:
            BlockingIOError: the receiver's queue is full.
            OSError: the receiver has closed its socket, or refuses the descriptors.
        """
        fds.send(self._sock, text.encode(), passed)

    def close(self) -> None:
        """Close the socket."""
        self._sock.close()


def take_parent() -> Notifier | None:
    """Return the connection to the parent of ``serve --supervise``; None if there is no parent.

    The parent receives the messages that are meant for the service manager.
    """
    number = os.environ.pop("QMPFD_NOTIFY_FD", "")
    try:
        if not number.isdecimal() or not stat.S_ISSOCK(os.fstat(int(number)).st_mode):
            return None
    except OSError:  # no descriptor of that number
        return None
    os.set_inheritable(int(number), False)
    return Notifier(socket.socket(fileno=int(number)), is_parent=True)


def invocation_id() -> str | None:
    """Return the id of the service's run that this process belongs to (systemd.exec(5))."""
    found = os.environ.get("INVOCATION_ID", "")
    return found if found.isascii() and found.isalnum() else None


def take_store_size() -> int:
    """Return the capacity of the fd store (``$FDSTORE``); 0 without one."""
    size = os.environ.pop("FDSTORE", "")
    return int(size) if size.isdecimal() else 0


def announce_ready(fd: Fd) -> None:
    """Write a newline to *fd* and close it: s6's readiness protocol (its page notifywhenup).

    Errors are ignored: the reader may have closed its end, and the pipe may be full.
    """
    with fd, suppress(OSError):
        write_nowait(fd.fileno(), b"\n")


def watchdog_interval() -> float | None:
    """Return the watchdog's timeout in seconds; None if the service manager has set none."""
    limit, pid = os.environ.get("WATCHDOG_USEC", ""), os.environ.get("WATCHDOG_PID")
    if not limit.isdecimal() or pid not in (None, str(os.getpid())):
        return None
    return int(limit) / 1e6 or None
