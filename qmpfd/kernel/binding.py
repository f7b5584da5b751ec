"""Binds Unix sockets: one process at a time per path; a failed attempt leaves no file behind."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, TypeAlias

from .fd import Fd
from .unix_address import bind, is_abstract, is_served

#: Backlog for listen(2), which the kernel caps at net.core.somaxconn.
BACKLOG = 4096

#: Seconds that binding waits for another process that binds the same path.
_LOCK_TIMEOUT = 2.0

#: Identity of a file: device and inode.
FileId: TypeAlias = "tuple[int, int]"


class SocketInUse(OSError):
    """A live daemon listens on the path already."""


class Permissions(NamedTuple):
    """Permissions of a socket file.

    Args:
        mode: permission bits.
        group: gid; None for the process's own.
    """

    mode: int = 0o600
    group: int | None = None


OWNER_ONLY = Permissions()


def listen_at(
    path: Path, permissions: Permissions = OWNER_ONLY, timeout: float = _LOCK_TIMEOUT
) -> tuple[socket.socket, FileId | None]:
    """Bind a new socket at *path* and listen; on an error neither socket nor file is left behind.

    Args:
        path: path of the socket file, or ``@NAME``.
        permissions: permissions of the file.
        timeout: seconds to wait for another process that binds the same path.

    Returns:
        The socket, and the identity of its file; None for an abstract socket.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if is_abstract(path):
            _bind(sock, path)
            sock.listen(BACKLOG)
            return sock, None
        with _exclusively(path, timeout):
            _remove_stale(path)
            _bind(sock, path)
            try:
                file = identity(path)
                if permissions.group is not None:
                    os.chown(path, -1, permissions.group)
                path.chmod(permissions.mode)
                sock.listen(BACKLOG)
            except BaseException:
                path.unlink(missing_ok=True)
                raise
        return sock, file
    except BaseException:
        sock.close()
        raise


def _bind(sock: socket.socket, path: Path) -> None:
    try:
        bind(sock, path)
    except OSError as exc:
        if exc.errno == errno.EADDRINUSE:
            raise SocketInUse(exc.errno, "a daemon is already listening", str(path)) from None
        raise OSError(exc.errno, f"cannot bind: {exc.strerror or exc}", str(path)) from None


@contextmanager
def _exclusively(path: Path, timeout: float) -> Iterator[None]:
    """Exclude other processes from binding *path* while the block runs.

    Between bind(2) and listen(2) a socket looks stale: two daemons that start at once could remove
    each other's socket file.  A lock, flock(2) on a file beside the socket, excludes that.  The
    holder removes the lock file at the end: a lock counts only if its file is still the one at that
    name.

    Args:
        path: path of the socket.
        timeout: seconds to wait for the other process.

    Raises:
        SocketInUse: another process holds the lock for longer.
        OSError: the lock file cannot be created.
    """
    lock = path.parent / os.fsdecode(b"." + os.fsencode(path.name)[:240] + b".lock")
    deadline = time.monotonic() + timeout
    while True:
        try:
            number = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as exc:
            raise OSError(exc.errno, f"cannot bind: {exc.strerror}", str(path)) from None
        with Fd(number) as fd:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise SocketInUse(
                        errno.EADDRINUSE, "another daemon is about to listen", str(path)
                    ) from None
                time.sleep(0.01)
                continue
            except OSError:  # the file system lacks flock(2): bind without the lock
                pass
            found = os.fstat(fd.fileno())
            if identity(lock) != (found.st_dev, found.st_ino):
                continue
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)
            return


def _remove_stale(path: Path) -> None:
    """Remove a socket file on which no process listens; raise OSError for any other file there."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return
    except OSError as exc:
        raise OSError(exc.errno, f"cannot bind: {exc.strerror}", str(path)) from None
    if not stat.S_ISSOCK(found.st_mode):
        raise OSError(errno.EEXIST, "exists and is not a socket", str(path))
    if is_served(path):
        raise SocketInUse(errno.EADDRINUSE, "a daemon is already listening", str(path))
    path.unlink(missing_ok=True)


def identity(path: Path) -> FileId | None:
    """Return the identity of the file at *path*, or None if there is none."""
    try:
        found = path.lstat()
    except OSError:
        return None
    return found.st_dev, found.st_ino
