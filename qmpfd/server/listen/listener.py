"""Listening Unix sockets."""

from __future__ import annotations

import errno
import logging
import os
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import trio

from ...kernel.binding import OWNER_ONLY, FileId, Permissions, identity, listen_at
from ...kernel.fd import Fd
from ...kernel.sockets import inherited_options, is_shut_down
from ...kernel.unix_address import is_abstract, listens
from ..saved_state import NOT_OURS, SavedListener


class ListenerShutDown(OSError):
    """Another process that has the listening socket has called shutdown(2) on it."""


_log = logging.getLogger("qmpfd")


class UnixListener:
    """A listening Unix socket and its socket file.

    Args:
        sock: the socket; owned from here on.
        path: path of its file, or ``@NAME``; None for a service manager's socket.
        file: identity of the file that was bound; no other file is ever removed.
        permissions: permissions of the file, for when it has to be created again.
    """

    def __init__(
        self,
        sock: socket.socket,
        path: Path | None,
        file: FileId | None,
        permissions: Permissions = OWNER_ONLY,
    ) -> None:
        sock.setblocking(False)
        self.path = path
        self.file = file
        self._sock = sock
        self.permissions = permissions
        #: Called when the socket and its file have been replaced, or the socket is closed.
        self.on_changed: Callable[[], object] = lambda: None
        self._options = inherited_options(sock)
        self.socket = trio.socket.from_stdlib_socket(sock)

    def __str__(self) -> str:
        return "of the service manager" if self.path is None else str(self.path)

    @classmethod
    def inherit(cls, fd: Fd, saved: SavedListener = NOT_OURS) -> UnixListener:
        """Listen on a socket from a predecessor or a service manager.

        Args:
            fd: the socket; owned from here on.
            saved: its file, if this daemon owns that from here on.

        Raises:
            OSError: *fd* is not a listening Unix stream socket.
        """
        with fd:
            if not listens(fd):
                why = f"inherited descriptor {fd.number} is not a listening Unix stream socket"
                raise OSError(errno.EINVAL, why)
            sock = socket.socket(fileno=fd.detach())
        path = None if saved.path is None else Path(os.fsdecode(saved.path))
        return cls(sock, path, saved.file)

    @classmethod
    def bind(
        cls, where: str | os.PathLike[str], permissions: Permissions = OWNER_ONLY
    ) -> UnixListener:
        """Listen at a path, or under an abstract name.

        Args:
            where: the path, where a stale socket file is replaced; or ``@NAME``.
            permissions: permissions of the file.

        Raises:
            SocketInUse: a daemon listens there.
            OSError: the path cannot be bound; no file is left there.
        """
        # Absolute, as a successor may have another working directory.
        path = Path(where) if is_abstract(where) else Path(where).absolute()
        sock, file = listen_at(path, permissions)
        return cls(sock, path, file, permissions)

    @property
    def saved(self) -> SavedListener:
        """Description of the socket for a successor."""
        return SavedListener(None if self.path is None else os.fsencode(self.path), self.file)

    def change_permissions(self, permissions: Permissions) -> None:
        """Change the permissions of the socket file, if it is still the one that was bound."""
        self.permissions = permissions
        if self.path is None or self.file is None or identity(self.path) != self.file:
            return
        group = os.getegid() if permissions.group is None else permissions.group
        try:
            if os.stat(self.path).st_gid != group:
                os.chown(self.path, -1, group)
            self.path.chmod(permissions.mode)
        except OSError as exc:
            _log.error("cannot set the permissions of %s: %s", self, exc.strerror or exc)

    def bind_if_lost(self, accept_backlog: Callable[[UnixListener], object]) -> None:
        """Call :meth:`bind_again` if the socket file is missing or has been replaced by another."""
        if self.path is None or self.file is None or identity(self.path) == self.file:
            return
        try:
            self.bind_again(accept_backlog)
        except OSError as exc:
            _log.error("cannot listen on %s again: %s", self, exc.strerror or exc)
        else:
            _log.warning("the socket file %s was missing: made it again", self)

    def bind_again(self, accept_backlog: Callable[[UnixListener], object]) -> None:
        """Listen with a new socket at the same path, under the same descriptor number.  The socket
        is one with a file, neither abstract nor a service manager's.

        Args:
            accept_backlog: accepts the clients in the backlog of the old socket.

        Raises:
            SocketInUse: another program listens there.
            OSError: the path cannot be bound.
        """
        assert self.path is not None
        sock, self.file = listen_at(self.path, self.permissions, 0)
        with sock:
            sock.setblocking(False)
            accept_backlog(self)
            trio.lowlevel.notify_closing(self._sock)
            os.dup2(sock.fileno(), self._sock.fileno(), inheritable=False)
        self.on_changed()

    async def wait_readable(self) -> None:
        """Wait until a client has connected, or the socket was shut down, closed or replaced; the
        caller then calls :meth:`accept_nowait`.
        """
        with suppress(trio.ClosedResourceError):
            await trio.lowlevel.wait_readable(self._sock)

    def accept_nowait(self) -> trio.socket.SocketType:
        """Accept a client of the backlog.

        Raises:
            BlockingIOError: the backlog is empty.
            ListenerShutDown: the backlog is empty and no client can connect any more.
            OSError: accept(2) failed.
        """
        try:
            sock, _ = self._sock.accept()
        except BlockingIOError:
            if is_shut_down(self._sock):  # such a socket stays readable
                raise ListenerShutDown(
                    errno.ESHUTDOWN, "the socket was shut down", str(self)
                ) from None
            raise
        for option, value in self._options:
            sock.setsockopt(socket.SOL_SOCKET, option, value)
        return trio.socket.from_stdlib_socket(sock)

    def abandon(self) -> None:
        """Give up the socket file: another daemon owns it from here on."""
        self.path = None

    def unlink(self) -> None:
        """Remove the socket file, if it is still the one that was bound."""
        if self.path is not None and self.file is not None and identity(self.path) == self.file:
            with suppress(OSError):
                self.path.unlink()
        self.file = None

    def close(self) -> None:
        """Stop listening, and remove the socket file if it is still ours."""
        if self.socket.fileno() >= 0:
            self.unlink()  # before close(2): while this socket listens, no daemon binds the path
            self.socket.close()
            self.on_changed()
