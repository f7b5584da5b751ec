"""Addresses of Unix sockets: paths of any length, and abstract names (unix(7)).

A ``sockaddr_un`` has room for 107 bytes of path.  A longer one is reached through
``/proc/self/fd``: connect(2) follows the link there to the socket file itself, bind(2) the one to
its folder.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from .fd import Fd, FileDescriptorLike, fileno

#: Bytes of a path that ``sun_path`` holds beside the final NUL.
_MAX_PATH = 107


def is_abstract(path: str | os.PathLike[str]) -> bool:
    """Whether *path* is ``@NAME``, an abstract socket: it has no file."""
    return os.fspath(path).startswith("@")


@contextmanager
def connectable(path: str | os.PathLike[str]) -> Iterator[bytes]:
    """The address for connect(2) to reach the socket at *path*, valid while the block runs.

    Args:
        path: its file, or ``@NAME``.

    Raises:
        OSError: it is too long, and cannot be opened: there is none, or no way to it.
    """
    name = os.fsencode(path)
    if is_abstract(path):
        yield _abstract(name)
    elif len(name) <= _MAX_PATH:
        yield name
    else:
        with Fd(os.open(name, os.O_PATH | os.O_CLOEXEC)) as file:
            yield b"/proc/self/fd/%d" % file.fileno()


def bind(sock: socket.socket, path: str | os.PathLike[str]) -> None:
    """Bind a socket to *path*, where nothing may be yet, with permission for the owner only.

    Args:
        sock: an unbound Unix socket.
        path: its file, or ``@NAME``.

    Raises:
        OSError: there is something already (EADDRINUSE), or no such folder, or no permission.
    """
    name = os.fsencode(path)
    if is_abstract(path):
        sock.bind(_abstract(name))
        return
    # Nobody else may connect before the owner has set the mode: so the umask, which is the whole
    # process's, is another one for the time of the call.
    umask = os.umask(0o177)
    try:
        if len(name) <= _MAX_PATH:
            sock.bind(name)
        else:
            _bind_in_folder(sock, *os.path.split(name))
    finally:
        os.umask(umask)


def is_served(path: str | os.PathLike[str]) -> bool:
    """Whether a program listens at *path*.

    Raises:
        OSError: it may not be asked, or *path* is of another kind of socket.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            with connectable(path) as address:
                probe.connect(address)
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        except BlockingIOError:  # its backlog is full: very much alive
            pass
    return True


def listens(fd: FileDescriptorLike) -> bool:
    """Whether *fd* is a Unix stream socket that listens (SO_ACCEPTCONN, socket(7))."""
    try:
        sock = socket.socket(fileno=fileno(fd))
    except OSError:  # no socket
        return False
    try:
        return (
            sock.family == socket.AF_UNIX
            and sock.type == socket.SOCK_STREAM
            and bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
        )
    finally:
        sock.detach()


def _bind_in_folder(sock: socket.socket, folder: bytes, name: bytes) -> None:
    with Fd(os.open(folder or b".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)) as opened:
        here = b"/proc/self/fd/%d/" % opened.fileno()
        if len(here + name) <= _MAX_PATH:
            sock.bind(here + name)
            return
        # The name alone is too long: link(2) gives it one, and fails where there is something.
        short = b".qmpfd.%d" % os.getpid()
        sock.bind(here + short)
        try:
            os.link(short, name, src_dir_fd=opened.fileno(), dst_dir_fd=opened.fileno())
        except FileExistsError:
            raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE)) from None
        finally:
            os.unlink(short, dir_fd=opened.fileno())


def _abstract(name: bytes) -> bytes:
    if len(name) > _MAX_PATH + 1:
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), os.fsdecode(name))
    return b"\0" + name[1:]
