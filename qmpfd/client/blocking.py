"""The client for programs without an event loop, and for the short verbs of the command line.

It imports neither Trio nor msgspec at its top: Trio alone takes longer to import than all of a
short verb's work.
"""

from __future__ import annotations

import os
import select
import socket
import time
from _thread import TIMEOUT_MAX, RLock  # importing threading takes longer
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from math import inf
from typing import Any, Concatenate, Self

from ..errors import QMPError
from ..kernel.fd import Fd, FileDescriptorLike, close_all, peek, poll, receive_planned, send
from ..protocol.client import ClientConnection, QMPEvent, Request
from ..protocol.connection import ProtocolError, State
from . import calls
from .calls import Call, ParamsT, ResultT, as_method
from .connecting import RETRY, connect_nowait
from .errors import ClientClosed, NoAnswer, NoDaemon

__all__ = ["BlockingClient", "NoDaemon", "connect_blocking"]

#: Maximum timeout of poll(2), in seconds: a C int of milliseconds.
_LONGEST = ((1 << 31) - 1) / 1000


def _blocking(
    description: Callable[Concatenate[Any, ParamsT], Call[ResultT]],
) -> Callable[Concatenate[BlockingClient, ParamsT], ResultT]:
    """Make a method that sends the described call and blocks until its reply has come."""

    def method(self: BlockingClient, /, *args: ParamsT.args, **kwargs: ParamsT.kwargs) -> ResultT:
        call = description(self, *args, **kwargs)
        return call.result(*self.request(call.command, call.arguments, call.fds))

    return as_method(method, description)


class BlockingClient:
    """A connection to a QMP server whose calls block; made by :func:`connect_blocking`.

    Calls may come from several threads; one is executed at a time, the wait for an event included:
    a thread that waits for events needs a client of its own.

    Args:
        path: the server's Unix socket; ``@NAME`` is one in the abstract namespace (unix(7)).
        timeout: seconds that connecting, and then each call, may take; None for no limit.

    Raises:
        NoDaemon: no QMP server answers at *path* in time.
        QMPError: the server refuses the connection.
    """

    def __init__(self, path: str | os.PathLike[str], timeout: float | None = 10.0) -> None:
        self._path = os.fsdecode(path)
        self._timeout = inf if timeout is None else timeout
        self._deadline = time.monotonic() + self._timeout
        self._connection = ClientConnection()
        self._calling = RLock()  # a signal handler may close the client in the middle of a call
        self._closed = False
        self._watching = 0  # number of active watch_fdsets blocks
        while (sock := connect_nowait(path)) is None:
            if time.monotonic() > self._deadline:
                raise self._silent()
            time.sleep(min(RETRY, self._timeout))
        self._sock = sock
        try:
            while self._connection.state is State.CONNECTED:
                self._receive()
            close_all(self.request("qmp_capabilities")[1])
            self._connection.negotiated()
        except BaseException:
            self.close()
            raise

    @property
    def greeting(self) -> Mapping[str, Any]:
        """The server's greeting: its ``version`` and ``capabilities``."""
        return self._connection.greeting or {}

    execute = _blocking(calls.execute)
    add_fd = _blocking(calls.add_fd)
    remove_fd = _blocking(calls.remove_fd)
    query_fdsets = _blocking(calls.query_fdsets)
    open_fdset = _blocking(calls.open_fdset)
    add_fds = _blocking(calls.add_fds)
    query_fds = _blocking(calls.query_fds)
    remove_fds = _blocking(calls.remove_fds)

    def request(
        self,
        command: str,
        arguments: Mapping[str, Any] | None = None,
        fds: Sequence[FileDescriptorLike] = (),
    ) -> tuple[Any, list[Fd]]:
        """As :meth:`execute`; return the result and the descriptors that came with the reply.

        Args:
            command: name of the command.
            arguments: its arguments, as on the wire.
            fds: descriptors to pass with it (SCM_RIGHTS); the caller keeps them.

        Raises:
            Exception: what :meth:`execute` raises.
        """
        with self._call(self._timeout), self._connection.request(command, arguments) as request:
            self._send(request, fds)
            while request.reply is None:
                self._receive()
            return request.result()

    @contextmanager
    def watch_fdsets(self) -> Iterator[Iterator[QMPEvent]]:
        """As :meth:`qmpfd.Client.watch_fdsets`: ``with client.watch_fdsets() as events``.

        Raises:
            Exception: what :meth:`execute` raises.
        """
        self.execute("watch-fdsets", {"enable": True})
        self._watching += 1
        try:
            yield self.events()
        finally:
            self._watching -= 1
            if not self._watching:
                with suppress(ClientClosed):
                    self.execute("watch-fdsets", {"enable": False})

    def events(self) -> Iterator[QMPEvent]:
        """Iterate over the server's events as they arrive, without a time limit.

        At most 4096 unread events are kept; beyond that, the oldest is dropped.

        Raises:
            QMPError: the server refuses the connection.
            NoDaemon: the connection is lost.
            ClientClosed: this client is closed.
        """
        while True:
            with self._call(inf):
                while not self._connection.events:
                    self._receive()
                event = self._connection.events.popleft()
            yield event

    def take_events(self) -> list[QMPEvent]:
        """Return the events received so far, without waiting for more.

        Raises:
            QMPError: the server refuses the connection.
            NoDaemon: the connection is lost; the call before has returned its last events.
        """
        with self._call(self._timeout):
            try:
                while self._connection.failure or poll(self._sock, select.POLLIN):
                    self._receive()
            except (NoDaemon, QMPError):
                if not self._connection.events:
                    raise
            events = list(self._connection.events)
            self._connection.events.clear()
        return events

    def fileno(self) -> int:
        """Number of the socket, which is readable once the server has sent something."""
        return self._sock.fileno()

    def detach(self) -> socket.socket:
        """Detach the socket and return it: the caller owns it from here on.

        Raises:
            ClientClosed: this client is closed; further calls raise it, too.
        """
        self._check_open()
        self._closed = True
        return socket.socket(fileno=self._sock.detach())

    def close(self) -> None:
        """Close the connection; further calls raise ClientClosed, and so do those that wait in
        other threads.
        """
        self._closed = True
        if not self._calling.acquire(blocking=False):
            # shutdown(2) wakes the call that waits for the server.  Not called otherwise: a forked
            # child that has the connection as well must close its own descriptor only.
            with suppress(OSError):
                self._sock.shutdown(socket.SHUT_RDWR)
            self._calling.acquire()
        try:
            self._connection.close()
            self._sock.close()
        finally:
            self._calling.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    # -- the connection ------------------------------------------------------------------------

    @contextmanager
    def _call(self, timeout: float) -> Iterator[None]:
        """Execute one call at a time; any exception after :meth:`close` becomes ClientClosed."""
        deadline = time.monotonic() + timeout
        if not self._calling.acquire(timeout=max(0.0, min(timeout, TIMEOUT_MAX))):
            raise NoAnswer(
                "another thread's call of this client has not ended, or waits for events"
            )
        try:
            self._check_open()
            self._deadline = deadline
            yield
        except NoDaemon:
            raise
        except Exception:  # for example, an OSError from the closed socket
            self._check_open()
            raise
        finally:
            self._calling.release()

    def _check_open(self) -> None:
        if self._closed:
            raise ClientClosed("this client is closed")

    def _send(self, request: Request, fds: Sequence[FileDescriptorLike]) -> None:
        data = request.data
        try:
            while data:
                try:
                    sent = send(self._sock, data, () if request.sent else fds)
                except BlockingIOError:
                    self._wait(select.POLLOUT)
                except ConnectionError:  # the server may have sent an error before it closed
                    self._receive()
                else:
                    self._connection.mark_sent(request)
                    data = data[sent:]
        except BaseException:
            if request.sent:  # sent in part: the next request would be taken as its rest
                self.close()
            raise

    def _receive(self) -> None:
        failure = self._connection.failure
        if isinstance(failure, ProtocolError):
            raise NoDaemon(f"at {self._path}: {failure}")
        if failure is not None:
            raise failure
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
            self._sock.recv(lengths[0])  # consume the bytes that peek() has returned
        self._connection.deliver()

    def _wait(self, event: int) -> None:
        self._check_open()
        left = self._deadline - time.monotonic()
        # A timeout of more than 24 days counts as none.
        if left <= 0 or not poll(self._sock, event, None if left > _LONGEST else left):
            raise self._silent()
        self._check_open()  # after close() by another thread, the number may be another file's

    def _silent(self) -> NoDaemon:
        why = "it is stopped or busy"
        if self._connection.state is State.CONNECTED:  # no greeting
            why += ", or not a QMP server, or a QEMU that serves another client"
        return NoAnswer(f"the daemon at {self._path} does not answer ({why})")


def connect_blocking(
    path: str | os.PathLike[str], *, timeout: float | None = 10.0
) -> BlockingClient:
    """Connect to the QMP server at *path*, for a program without an event loop.

    Use it as ``with qmpfd.connect_blocking(path) as client``; the connection is closed at the end.
    An asyncio program calls it, and the methods of the client, with :func:`asyncio.to_thread`.

    Args:
        path: the server's Unix socket; ``@NAME`` is one in the abstract namespace (unix(7)).
        timeout: seconds that connecting, and then each call, may take; None for no limit.

    Raises:
        NoDaemon: no QMP server answers at *path* in time.
        QMPError: the server refuses the connection.
    """
    return BlockingClient(path, timeout)
