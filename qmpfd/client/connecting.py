"""Connects to a server's socket, for both clients."""

from __future__ import annotations

import errno
import os
import socket
import stat

from ..kernel.unix_address import connectable
from .errors import NoDaemon

#: Seconds between two tries to connect.
RETRY = 0.01


class _NoSocket(NoDaemon, FileNotFoundError):
    """No socket file or abstract socket has that name."""


class _NobodyListens(NoDaemon, ConnectionRefusedError):
    """The file exists, but no process listens on it, or it is not a socket."""


class _Forbidden(NoDaemon, PermissionError):
    """The permissions of the socket file, or of a directory above it, deny access to this user."""


def connect_nowait(path: str | os.PathLike[str]) -> socket.socket | None:
    """Connect a non-blocking socket to the server at *path*; return None if the server's backlog is
    full.  The caller tries again: no event says when the backlog has room.

    Raises:
        NoDaemon: no server listens at *path*, or this user may not connect.
    """
    path = os.fsdecode(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # A byte sent with MSG_OOB stays in its place in the stream (unix(7)).
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
        sock.setblocking(False)
        with connectable(path) as address:
            sock.connect(address)
    except BlockingIOError:
        sock.close()
        return None
    except (OSError, ValueError) as exc:
        sock.close()
        error = exc if isinstance(exc, OSError) else OSError(errno.EINVAL, str(exc))
        raise _no_connection(path, error) from exc
    return sock


def _no_connection(path: str, error: OSError) -> NoDaemon:
    """Make the exception for a failed connect(2), with advice; it has the class of *error* too."""
    start = f"start one: qmpfd serve --socket {path}; or name another socket"
    if isinstance(error, FileNotFoundError):
        return _NoSocket(error.errno, f"no daemon at {path}: {error.strerror} ({start})")
    if isinstance(error, ConnectionRefusedError):
        why = f"the daemon of this socket has ended ({start})"
        # connect(2) to a file that is not a socket fails with ECONNREFUSED as well (unix(7)).
        if os.path.exists(path) and not stat.S_ISSOCK(os.stat(path).st_mode):
            why = "not a socket (name another path)"
        return _NobodyListens(error.errno, f"no daemon at {path}: {why}")
    kind, advice = NoDaemon, "name another socket"
    if isinstance(error, PermissionError):
        kind = _Forbidden
        advice = "its owner can let you in, with qmpfd serve --socket-mode and --policy"
    return kind(error.errno, f"cannot connect to {path}: {error.strerror or error} ({advice})")
