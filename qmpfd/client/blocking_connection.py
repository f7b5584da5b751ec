"""A connection to a QMP server whose calls block: one request at a time, and its reply."""

from __future__ import annotations

import errno
import os
import select
import socket
import stat
import time
from _thread import RLock  # threading's own, without the rest of it
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from math import inf
from typing import Any, Self

from ..kernel.fd import Fd, FileDescriptorLike, close_all, discard, peek, receive_planned, send
from ..kernel.unix_address import connectable
from ..limits import MAX_EVENTS
from ..protocol.client import ClientConnection, QMPEvent, Reply
from ..protocol.connection import ProtocolError, State
from .errors import ClientClosed, NoAnswer, NoDaemon, cannot_connect

_RETRY = 0.01

#: Milliseconds that poll(2) waits at most.
_LONGEST = (1 << 31) - 1


def _no_connection(path: str, error: OSError) -> str:
    """Why there is no connection, and what to do about it."""
    start = f"start one: qmpfd serve --socket {path}; or name another socket"
    if isinstance(error, FileNotFoundError):
        return f"no daemon at {path}: {error.strerror} ({start})"
    if isinstance(error, ConnectionRefusedError):
        # Of any other file, too (unix(7)).
        if os.path.exists(path) and not stat.S_ISSOCK(os.stat(path).st_mode):
            return f"no daemon at {path}: not a socket (name another path)"
        return f"no daemon at {path}: the daemon of this socket has ended ({start})"
    if isinstance(error, PermissionError):
        advice = "its owner can let you in, with qmpfd serve --socket-mode and --policy"
    else:
        advice = "name another socket"
    return f"cannot connect to {path}: {error.strerror or error} ({advice})"


class BlockingConnection:
    """The connection of a :class:`qmpfd.BlockingClient`, which see for the arguments."""

    def __init__(self, path: str | os.PathLike[str], timeout: float | None = 10.0) -> None:
        self._path = os.fspath(path)
        self._timeout = inf if timeout is None else timeout
        self._deadline = time.monotonic() + self._timeout
        self._connection = ClientConnection()
        self._calling = RLock()  # a signal handler may close the client in the middle of a call
        self._closed = False  # such a call sees it before the connection is in that state
        self._last_id = 0
        self._replies: list[Reply] = []
        self._events: deque[QMPEvent] = deque(maxlen=MAX_EVENTS)
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            # A byte sent with MSG_OOB stays one of the stream, where it belongs (unix(7)).
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
            self._sock.setblocking(False)
            self._connect()
            while self._connection.state is State.CONNECTED:
                self._receive()
                self._raise_refusal()
            close_all(self.request("qmp_capabilities")[1])
            self._connection.negotiated()
        except BaseException:
            self.close()
            raise

    def _connect(self) -> None:
        while True:
            try:
                with connectable(self._path) as address:
                    self._sock.connect(address)
                return
            except BlockingIOError:  # the backlog is full, and poll(2) does not tell when it is not
                left = self._deadline - time.monotonic()
                if left <= 0:
                    raise self._silent() from None
                time.sleep(min(left, _RETRY))
            except (OSError, ValueError) as exc:
                error = exc if isinstance(exc, OSError) else OSError(errno.EINVAL, str(exc))
                why = _no_connection(os.fsdecode(self._path), error)
                raise cannot_connect(why, error) from exc

    @property
    def greeting(self) -> Mapping[str, Any]:
        """The server's greeting: its ``version`` and ``capabilities``."""
        return self._connection.greeting or {}

    def request(
        self,
        command: str,
        arguments: Mapping[str, Any] | None = None,
        fds: Sequence[FileDescriptorLike] = (),
    ) -> tuple[Any, list[Fd]]:
        """Carry out a command; the ``return`` member of its reply, and the descriptors with it.

        Args:
            command: its name.
            arguments: its arguments, as they go over the wire.
            fds: descriptors to pass with it (SCM_RIGHTS); they stay the caller's.

        Raises:
            Exception: what :meth:`qmpfd.BlockingClient.execute` raises.
        """
        with self._call():
            self._deadline = time.monotonic() + self._timeout
            self._last_id += 1
            self._send(self._connection.execute(command, arguments, self._last_id), fds)
            while True:
                while self._replies:
                    reply = self._replies.pop(0)
                    if reply.id == self._last_id and reply.error is None:
                        return reply.value, reply.fds
                    close_all(reply.fds)
                    # Without an id: the server could not read the request.
                    if reply.id in (self._last_id, None):
                        reply.unwrap()
                self._receive()

    def events(self) -> Iterator[QMPEvent]:
        """The server's events, as they come, without a time limit.

        At most 4096 unread events are kept; beyond that, the oldest is dropped.

        Raises:
            QMPError: the server refuses the connection.
            NoDaemon: the connection is lost.
            ClientClosed: this client is closed.
        """
        while True:
            with self._call():
                self._deadline = inf
                self._forget_replies()
                while not self._events:
                    self._receive()
                    self._forget_replies()
                event = self._events.popleft()
            yield event

    def take_events(self) -> list[QMPEvent]:
        """The events that have come so far, without waiting for any.

        Raises:
            QMPError: the server refuses the connection.
            NoDaemon: the connection is lost.
        """
        with self._call():
            poll = select.poll()
            poll.register(self._sock, select.POLLIN)
            self._deadline = time.monotonic() + self._timeout
            self._forget_replies()
            while poll.poll(0):
                self._receive()
                self._forget_replies()
            events = list(self._events)
            self._events.clear()
        return events

    # -- the connection ------------------------------------------------------------------------

    @contextmanager
    def _call(self) -> Iterator[None]:
        """One call at a time; ClientClosed, whatever it meets, once the client is closed."""
        with self._calling:
            self._check_open()
            try:
                yield
            except NoDaemon:
                raise
            except Exception:  # the descriptor of a closed socket, say
                self._check_open()
                raise

    def fileno(self) -> int:
        """The socket: readable once the server has said something."""
        return self._sock.fileno()

    def _send(self, request: bytes, fds: Sequence[FileDescriptorLike]) -> None:
        begun = False
        try:
            while request:
                try:
                    request = request[send(self._sock, request, fds) :]
                    fds, begun = (), True
                except BlockingIOError:
                    self._wait(select.POLLOUT)
                except ConnectionError:
                    # It may have said why before it closed the connection.
                    self._receive()
                    self._raise_refusal()
        except BaseException:
            if begun and request:  # the next one would go into the middle of this one
                self._dispose()
            raise

    def _receive(self) -> None:
        self._wait(select.POLLIN)
        try:
            data, fds_follow = peek(self._sock)
        except BlockingIOError:
            return
        except ConnectionError:
            data, fds_follow = b"", False
        if not data:
            raise NoDaemon(f"the daemon at {self._path} has closed the connection")
        lengths, _ = self._connection.plan(data, fds_follow)
        if fds_follow:
            self._connection.received(*receive_planned(self._sock, lengths))
        else:
            discard(self._sock, lengths[0])
        try:
            for message in self._connection.messages():
                if isinstance(message, QMPEvent):
                    self._events.append(message)
                else:
                    self._replies.append(message)
        except ProtocolError as exc:
            raise NoDaemon(f"at {self._path}: {exc}") from None
        finally:
            close_all(self._connection.fds_to_close)
            self._connection.fds_to_close.clear()

    def _forget_replies(self) -> None:
        """Drop the replies that no request waits for.

        Raises:
            QMPError: one tells why the server turns us away.
        """
        self._raise_refusal()
        self._drop_replies()

    def _drop_replies(self) -> None:
        for reply in self._replies:
            close_all(reply.fds)
        self._replies.clear()

    def _raise_refusal(self) -> None:
        """Raise what the server said before it was asked anything."""
        for reply in self._replies:
            if reply.id is None and reply.error is not None:
                raise reply.error

    def _check_open(self) -> None:
        if self._closed:
            raise ClientClosed("this client is closed")

    def _wait(self, event: int) -> None:
        self._check_open()
        poll = select.poll()
        poll.register(self._sock, event)
        left = (self._deadline - time.monotonic()) * 1000
        # poll(2) takes a C int: a limit of more than 24 days is none.
        if left <= 0 or not poll.poll(None if left > _LONGEST else left):
            raise self._silent()
        self._check_open()  # closed meanwhile, the descriptor may be another file's by now

    def _silent(self) -> NoDaemon:
        why = "it is stopped or busy"
        if self._connection.state is State.CONNECTED:  # no greeting
            why += ", or not a QMP server, or a QEMU that serves another client"
        return NoAnswer(f"the daemon at {self._path} does not answer ({why})")

    def detach(self) -> socket.socket:
        """Give the connection up: the caller owns the socket that is returned."""
        return socket.socket(fileno=self._sock.detach())

    def close(self) -> None:
        """Close the connection; further calls raise ClientClosed, and so do those that wait in
        other threads.
        """
        self._closed = True
        if not self._calling.acquire(blocking=False):
            # A call waits for the server: it is woken.  Where none does, the connection may be a
            # forked child's as well, which closes no more than its own descriptor.
            with suppress(OSError):
                self._sock.shutdown(socket.SHUT_RDWR)
            self._calling.acquire()
        try:
            self._dispose()
        finally:
            self._calling.release()

    def _dispose(self) -> None:
        self._closed = True
        if self._connection.state is not State.CLOSED:
            self._connection.close()
        close_all(self._connection.fds_to_close)
        self._drop_replies()
        self._sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
