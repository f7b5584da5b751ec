"""Connecting to a server's socket, the same for both clients."""

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
    """There is no socket of that name."""


class _NobodyListens(NoDaemon, ConnectionRefusedError):
    """There is a socket, or another file, and nobody listens there."""


class _Forbidden(NoDaemon, PermissionError):
    """The permissions of the socket, or of a folder above it, keep this user out."""


def connect_nowait(path: str | os.PathLike[str]) -> socket.socket | None:
    """A socket connected to the server at *path*, whose calls never wait; None while the server's
    backlog is full: nothing tells when it is not any more.

    Raises:
        NoDaemon: no server listens at *path*, or it may not be reached.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # A byte sent with MSG_OOB stays one of the stream, where it belongs (unix(7)).
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
        raise _no_connection(os.fsdecode(path), error) from exc
    return sock


def _no_connection(path: str, error: OSError) -> NoDaemon:
    """Why connect(2) failed, and what to do about it; also caught as what *error* is."""
    start = f"start one: qmpfd serve --socket {path}; or name another socket"
    if isinstance(error, FileNotFoundError):
        return _NoSocket(error.errno, f"no daemon at {path}: {error.strerror} ({start})")
    if isinstance(error, ConnectionRefusedError):
        why = f"the daemon of this socket has ended ({start})"
        # Of any other file, too (unix(7)).
        if os.path.exists(path) and not stat.S_ISSOCK(os.stat(path).st_mode):
            why = "not a socket (name another path)"
        return _NobodyListens(error.errno, f"no daemon at {path}: {why}")
    kind, advice = NoDaemon, "name another socket"
    if isinstance(error, PermissionError):
        kind = _Forbidden
        advice = "its owner can let you in, with qmpfd serve --socket-mode and --policy"
    return kind(error.errno, f"cannot connect to {path}: {error.strerror or error} ({advice})")
