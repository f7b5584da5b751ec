"""Opens the descriptors that a verb passes to the daemon: files and listening sockets."""

from __future__ import annotations

import errno
import os
import re
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from ..errors import QMPError
from ..kernel.fd import Fd, is_open
from ..kernel.files import open_without_waiting
from .exit_codes import UsageError
from .output import printable

#: Advice for a file that cannot be opened, by errno.
_OPEN_ADVICE = {
    errno.EACCES: "run qmpfd add as a user who may open it: the daemon needs no permission",
    errno.EISDIR: "a directory needs --mode r",
    errno.EWOULDBLOCK: "another process holds a lease on it: fcntl(2), F_SETLEASE",
    errno.ENXIO: "it is a socket, a FIFO for writing that has no reader, or a missing device",
}


def open_file(path: str, flags: int) -> Fd:
    """Open *path*, without waiting for the other end of a FIFO.

    Raises:
        UsageError: *path* cannot be opened.
    """
    try:
        return open_without_waiting(path, flags)
    except OSError as exc:
        advice = _OPEN_ADVICE.get(exc.errno or 0)
        shown = path or "''"
        message = f"cannot open {shown}: {exc.strerror}" + (f" ({advice})" if advice else "")
        raise UsageError(message) from None
    except ValueError as exc:  # a null byte in *path*
        raise UsageError(f"cannot open {path!r}: {exc}") from None


def check_open(number: int, advice: str = "") -> None:
    """Raise UsageError, with *advice* appended, if descriptor *number* is not open here."""
    if not is_open(number):
        raise UsageError(f"descriptor {number} is not open here{advice}")


@contextmanager
def listening_socket(address: str) -> Iterator[tuple[Fd, str]]:
    """Create a listening socket; the block gets it, and its address from getsockname(2).  After an
    exception of the block, the file of a socket that no other process has is removed.

    Args:
        address: ``HOST:PORT``, ``[V6]:PORT``, ``unix:PATH`` or ``unix:@NAME``.

    Raises:
        UsageError: *address* is invalid, or cannot be bound.
    """
    undo = ExitStack()
    try:
        if address.startswith("unix:"):
            fd, shown = _listening_unix(address[5:], undo)
        else:
            fd, shown = _listening_tcp(address)
    except (OSError, ValueError, UnicodeError) as exc:
        why = exc.strerror or exc if isinstance(exc, OSError) else exc
        raise UsageError(f"cannot listen on {printable(address)}: {why}") from None
    with undo, fd:
        yield fd, shown


def _listening_tcp(address: str) -> tuple[Fd, str]:
    match = re.fullmatch(r"(\[[^][]+\]|[^][]*):([0-9]{1,5})", address, re.DOTALL)
    if match is None or int(match[2]) > 0xFFFF:
        raise UsageError(
            f"{address!r} is not an address: HOST:PORT, [V6]:PORT or unix:PATH; a PORT is a number "
            f"from 0 to {0xFFFF}"
        )
    family, kind, protocol, _, where = socket.getaddrinfo(
        match[1].removeprefix("[").removesuffix("]") or None,
        int(match[2]),
        type=socket.SOCK_STREAM,
        flags=socket.AI_PASSIVE,
    )[0]
    with socket.socket(family, kind, protocol) as sock:
        # Connections of a former server on this port may be in TIME_WAIT (tcp(7)).
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(where)
        sock.listen(socket.SOMAXCONN)
        name, number = sock.getsockname()[:2]
        shown = f"[{name}]:{number}" if family == socket.AF_INET6 else f"{name}:{number}"
        return Fd(sock.detach()), shown


def _listening_unix(text: str, undo: ExitStack) -> tuple[Fd, str]:
    from pathlib import Path  # slow to import, and only needed here

    from ..kernel.binding import SocketInUse, identity, listen_at
    from ..kernel.unix_address import is_served

    if not text or text == "@":
        raise ValueError("unix: needs a path")
    path = Path(text)
    try:
        sock, file = listen_at(path)
    except SocketInUse as exc:  # its text says "a daemon", but the listener may be any program
        raise OSError(exc.errno, os.strerror(errno.EADDRINUSE)) from None

    @undo.push
    def remove_file(_: object, error: BaseException | None, __: object) -> None:
        # A daemon that refuses may close its duplicate after its reply.  After another error, such
        # as a lost reply, the daemon may have stored the socket.
        if error is None or file is None or identity(path) != file:
            return
        if isinstance(error, QMPError) or not is_served(path):
            path.unlink()

    return Fd(sock.detach()), f"unix:{text}"
