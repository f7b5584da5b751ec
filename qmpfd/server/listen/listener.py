"""Unix sockets to listen on."""

from __future__ import annotations

import errno
import os
import socket
import stat
from contextlib import suppress
from pathlib import Path

import trio

from ...kernel.fd import Fd

#: Connections that the kernel holds until they are accepted (listen(2)); it caps this itself.
_BACKLOG = 4096


class SocketInUse(OSError):
    """A live daemon listens on the path already."""


class UnixListener:
    """A listening Unix socket and the file that it is reached by.

    Args:
        sock: the socket; owned from here on.
        path: its file, which is removed when the listener is closed; None if it is not ours.
    """

    def __init__(self, sock: socket.socket, path: Path | None) -> None:
        sock.setblocking(False)
        self.path = path
        self._sock = sock
        self.socket = trio.socket.from_stdlib_socket(sock)
        self._file = None if path is None else _identity(path)

    @classmethod
    def inherit(cls, fd: Fd, path: Path | None = None) -> UnixListener:
        """Listen on a socket that somebody else has set up.

        Args:
            fd: the socket; owned from here on.
            path: its file, if that is ours now.

        Raises:
            OSError: it is no listening Unix stream socket.
        """
        with fd:
            sock = socket.socket(fileno=fd.fileno())
            fd.detach()
        listens = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        if sock.family != socket.AF_UNIX or sock.type != socket.SOCK_STREAM or not listens:
            number = sock.fileno()
            sock.close()
            raise OSError(
                errno.EINVAL, f"inherited descriptor {number} is no listening Unix stream socket"
            )
        return cls(sock, path)

    @classmethod
    def bind(
        cls, where: str | os.PathLike[str], *, mode: int = 0o600, group: int | None = None
    ) -> UnixListener:
        """Listen at a path.

        Args:
            where: the path; a stale socket file there is replaced.
            mode: the file's permission bits.
            group: the gid of its group; the process's own by default.

        Raises:
            SocketInUse: a daemon listens there.
            OSError: the path cannot be used.
        """
        path = Path(where)
        _remove_stale(path)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            # Nobody else may connect before the group and the mode are right.
            umask = os.umask(0o177)
            try:
                sock.bind(str(path))
            except OSError as exc:
                raise OSError(exc.errno, f"cannot bind: {exc.strerror or exc}", str(path)) from None
            finally:
                os.umask(umask)
            if group is not None:
                os.chown(path, -1, group)
            path.chmod(mode)
            sock.listen(_BACKLOG)
        except BaseException:
            sock.close()
            raise
        # A successor that takes it over may have another working directory.
        return cls(sock, path.absolute())

    def accept_nowait(self) -> trio.socket.SocketType:
        """A client that has connected already.

        Raises:
            BlockingIOError: there is none.
            OSError: it cannot be accepted.
        """
        sock, _ = self._sock.accept()
        return trio.socket.from_stdlib_socket(sock)

    def abandon(self) -> None:
        """The socket file is somebody else's from here on."""
        self.path = None

    def close(self) -> None:
        """Stop listening, and remove the socket file if it is still ours."""
        if self.socket.fileno() < 0:
            return
        self.socket.close()
        if self.path is not None and self._file is not None and _identity(self.path) == self._file:
            with suppress(OSError):
                self.path.unlink()


def _identity(path: Path) -> tuple[int, int] | None:
    """Which file *path* is, by device and inode."""
    try:
        found = path.lstat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _remove_stale(path: Path) -> None:
    """Remove a socket file that nobody listens on; refuse anything else that is in the way."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise OSError(errno.EEXIST, "exists and is not a socket", str(path))
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
        except FileNotFoundError:
            return
        except BlockingIOError:  # its backlog is full: very much alive
            pass
    raise SocketInUse(errno.EADDRINUSE, "a daemon is already listening", str(path))
