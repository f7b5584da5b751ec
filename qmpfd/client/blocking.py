"""A small synchronous QMP client, for the short verbs of the command line and for openers: Trio
alone takes longer to import than all of a verb's work.  The protocol is the Trio client's.
"""

from __future__ import annotations

import os
import select
import socket
import stat
import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from math import inf
from types import TracebackType
from typing import Any

from ..kernel import fd
from ..kernel.fd import Fd, FileDescriptorLike
from ..protocol.client import ClientConnection, QMPEvent, Reply
from ..protocol.connection import ProtocolError, State


class NoDaemon(Exception):
    """Nobody answers at the socket, or not in time, or not QMP."""


def _no_connection(path: str, error: OSError) -> str:
    """Why there is no connection, and what to do about it."""
    start = f"name another, or start one: qmpfd serve --socket {path}"
    if isinstance(error, FileNotFoundError):
        return f"no daemon at {path}: {error.strerror} ({start})"
    if isinstance(error, ConnectionRefusedError):
        # Of any other file, too (unix(7)).
        if os.path.exists(path) and not stat.S_ISSOCK(os.stat(path).st_mode):
            return f"no daemon at {path}: that is no socket (name another)"
        return f"no daemon at {path}: the one that made it has ended ({start})"
    if isinstance(error, PermissionError):
        advice = "its owner can let you in: qmpfd serve --socket-mode, --policy"
    else:
        advice = "name another"
    return f"cannot connect to {path}: {error.strerror or error} ({advice})"


class SyncClient:
    """A connection to a QMP server, with one deadline for all that is done with it, or renewed.

    Args:
        path: the server's socket.
        timeout: seconds until it is given up.

    Raises:
        NoDaemon: nobody answers there, or not QMP.
        QMPError: the server turns us away.
    """

    def __init__(self, path: str | os.PathLike[str], timeout: float) -> None:
        self._path = os.fspath(path)
        self._deadline = time.monotonic() + timeout
        self._connection = ClientConnection()
        self._last_id = 0
        self._replies: list[Reply] = []
        self._events: list[QMPEvent] = []
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._connect(timeout)
            while self._connection.state is State.CONNECTED:
                self._receive()
                self._raise_refusal()
            self.execute("qmp_capabilities")
            self._connection.negotiated()
        except BaseException:
            self.close()
            raise

    def _connect(self, timeout: float) -> None:
        # A Unix socket's connect waits while the backlog is full, for SO_SNDTIMEO (socket(7)).
        # It takes microseconds, and none of them for no limit.
        limit = struct.pack("ll", *divmod(max(1, round(timeout * 1e6)), 1_000_000))
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        try:
            self._sock.connect(self._path)
        except BlockingIOError:
            raise self._silent() from None
        except OSError as exc:
            raise NoDaemon(_no_connection(self._path, exc)) from None
        self._sock.setblocking(False)

    def execute(
        self,
        command: str,
        arguments: Mapping[str, Any] | None = None,
        fds: Sequence[FileDescriptorLike] = (),
    ) -> Any:
        """Carry out a command; the ``return`` member of its reply.  See :meth:`request`."""
        result, passed = self.request(command, arguments, fds)
        fd.close_all(passed)
        return result

    def request(
        self,
        command: str,
        arguments: Mapping[str, Any] | None = None,
        fds: Sequence[FileDescriptorLike] = (),
    ) -> tuple[Any, list[Fd]]:
        """Carry out a command.

        Args:
            command: its name.
            arguments: its arguments, as they go over the wire.
            fds: descriptors to pass with it; they stay the caller's.

        Returns:
            The ``return`` member of its reply, and the descriptors that came with it.

        Raises:
            QMPError: the server refused it.
            NoDaemon: it does not answer.
        """
        self._last_id += 1
        self._send(self._connection.execute(command, arguments, self._last_id), fds)
        while True:
            while self._replies:
                reply = self._replies.pop(0)
                if reply.id == self._last_id and reply.error is None:
                    return reply.value, reply.fds
                fd.close_all(reply.fds)
                # Without an id: the server could not read the request.
                if reply.id in (self._last_id, None):
                    reply.unwrap()
            self._receive()

    def open_fdset(self, arguments: Mapping[str, Any]) -> Fd:
        """Get a duplicate of a stored descriptor (``open-fdset``).

        Args:
            arguments: which one, as it goes over the wire.

        Raises:
            QMPError: there is none.
            NoDaemon: the server does not answer, or not with a descriptor.
        """
        _, fds = self.request("open-fdset", arguments)
        if len(fds) != 1:
            fd.close_all(fds)
            raise NoDaemon(f"at {self._path}: an answer without a descriptor")
        return fds[0]

    def events(self) -> Iterator[QMPEvent]:
        """The server's events, as they come, without a deadline.

        Raises:
            NoDaemon: the server has closed the connection.
        """
        self._deadline = inf
        while True:
            yield from self._events
            self._events.clear()
            self._receive()

    def take_events(self) -> list[QMPEvent]:
        """The events that have come so far, without waiting for any.

        Raises:
            NoDaemon: the server has closed the connection.
        """
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        while poll.poll(0):
            self._receive()
        events, self._events = self._events, []
        return events

    def renew(self, timeout: float) -> None:
        """Give the server *timeout* seconds from now on."""
        self._deadline = time.monotonic() + timeout

    def fileno(self) -> int:
        """The socket: readable once the server has said something."""
        return self._sock.fileno()

    def _send(self, request: bytes, fds: Sequence[FileDescriptorLike]) -> None:
        while request:
            try:
                request = request[fd.send(self._sock, request, fds) :]
                fds = ()
            except BlockingIOError:
                self._wait(select.POLLOUT)
            except ConnectionError:
                # It may have said why before it closed the connection.
                self._receive()
                self._raise_refusal()

    def _receive(self) -> None:
        self._wait(select.POLLIN)
        try:
            data, fds_follow = fd.peek(self._sock)
        except BlockingIOError:
            return
        except ConnectionError:
            data, fds_follow = b"", False
        if not data:
            raise NoDaemon(f"the daemon at {self._path} has closed the connection")
        if fds_follow:
            self._connection.receive_with_fds(data, partial(fd.receive, self._sock))
        else:
            fd.discard(self._sock, self._connection.receive(data))
        try:
            for message in self._connection.messages():
                if isinstance(message, QMPEvent):
                    self._events.append(message)
                else:
                    self._replies.append(message)
        except ProtocolError as exc:
            raise NoDaemon(f"at {self._path}: {exc}") from None
        finally:
            fd.close_all(self._connection.fds_to_close)
            self._connection.fds_to_close.clear()

    def _raise_refusal(self) -> None:
        """Raise what the server said before it was asked anything."""
        for reply in self._replies:
            if reply.id is None and reply.error is not None:
                raise reply.error

    def _wait(self, event: int) -> None:
        poll = select.poll()
        poll.register(self._sock, event)
        left = self._deadline - time.monotonic()
        if left <= 0 or not poll.poll(None if left == inf else left * 1000):
            raise self._silent()

    def _silent(self) -> NoDaemon:
        why = "stopped, or busy"
        if self._connection.state is State.CONNECTED:  # no greeting
            why += ", or no QMP server, or a QEMU with another client"
        return NoDaemon(f"the daemon at {self._path} does not answer ({why}; see --timeout)")

    def detach(self) -> socket.socket:
        """Give the connection up: the caller owns the socket that is returned."""
        return socket.socket(fileno=self._sock.detach())

    def close(self) -> None:
        """Close the connection."""
        if self._connection.state is not State.CLOSED:
            self._connection.close()
        fd.close_all(self._connection.fds_to_close)
        for reply in self._replies:
            fd.close_all(reply.fds)
        self._sock.close()

    def __enter__(self) -> SyncClient:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
