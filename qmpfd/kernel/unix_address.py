"""Addresses of Unix sockets: paths of any length, and abstract names (unix(7)).

A ``sockaddr_un`` has room for 107 bytes of path.  A longer path is replaced by one through
``/proc/self/fd``: connect(2) follows the link to the socket file, bind(2) the link to its folder.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from .fd import BorrowedSocket, Fd, FileDescriptorLike

#: Maximum size of a path in ``sun_path``, without the final NUL.
_MAX_PATH = 107


def is_abstract(path: str | os.PathLike[str]) -> bool:
    """Whether *path* is ``@NAME``: an abstract socket, without a file."""
    return os.fspath(path).startswith("@")


@contextmanager
def connectable(path: str | os.PathLike[str]) -> Iterator[bytes]:
    """Yield the address of the socket at *path* for connect(2), valid inside the block.

    Args:
        path: the socket's file, or ``@NAME``.

    Raises:
        OSError: *path* is too long for an address and cannot be opened, or the name is too long.
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
    """Bind a socket to *path*, with permissions for the owner only.

    Args:
        sock: an unbound Unix socket.
        path: the file to create, or ``@NAME``.

    Raises:
        OSError: *path* exists (EADDRINUSE), or its folder does not, or permission is denied.
    """
    name = os.fsencode(path)
    if is_abstract(path):
        sock.bind(_abstract(name))
        return
    # bind(2) creates the file with the umask, which is the process's: it is changed for the call,
    # because no other user may connect before the daemon has set the mode.
    umask = os.umask(0o177)
    try:
        if len(name) <= _MAX_PATH:
            sock.bind(name)
        else:
            _bind_in_folder(sock, *os.path.split(name))
    finally:
        os.umask(umask)


def is_served(path: str | os.PathLike[str]) -> bool:
    """Whether a process listens at *path*.

    Raises:
        OSError: permission is denied, or the socket is not a stream socket.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            with connectable(path) as address:
                probe.connect(address)
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        except BlockingIOError:  # the backlog is full, so a process listens
            pass
    return True


def listens(fd: FileDescriptorLike) -> bool:
    """Whether *fd* is a Unix stream socket that listens (SO_ACCEPTCONN, socket(7))."""
    try:
        with BorrowedSocket(fd) as sock:
            is_stream = (sock.family, sock.type) == (socket.AF_UNIX, socket.SOCK_STREAM)
            return is_stream and bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
    except OSError:  # not a socket
        return False


def bound_path(fd: FileDescriptorLike) -> str:
    """Return the path, or ``@NAME``, that a Unix socket is bound to; "" if it is not bound.

    Args:
        fd: the socket.

    Raises:
        OSError: *fd* is no socket.
    """
    with BorrowedSocket(fd) as sock:
        return os.fsdecode(sock.getsockname()).replace("\0", "@", 1)


def _bind_in_folder(sock: socket.socket, folder: bytes, name: bytes) -> None:
    with Fd(os.open(folder or b".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)) as opened:
        here = b"/proc/self/fd/%d/" % opened.fileno()
        if len(here + name) <= _MAX_PATH:
            sock.bind(here + name)
            return
        # The file name alone is too long: bind a short one, and link(2) it, which fails if the
        # long one exists.
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
