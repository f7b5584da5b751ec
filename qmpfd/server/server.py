"""The daemon as a Trio task: one nursery, one store, one lock."""

from __future__ import annotations

import errno
import logging
import os
import socket
import struct
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import ExitStack, suppress

import trio

from ..commands import TABLE, Daemon, Dialect
from ..errors import GenericError, PermissionDenied, QMPError
from ..fd import Fd, close_all
from ..fdsets import Peer
from ..limits import Limits
from ..protocol import encode
from ..transport import FdStream
from .listener import UnixListener
from .retire import retire_expired, retire_hung_up
from .session import Session

_log = logging.getLogger("qmpfd")

#: accept(2): the process or the system is out of something; the next try may do better.
_ACCEPT_LATER = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}


class Server:
    """A running daemon.

    Args:
        dialect: ``"spec"`` or ``"qemu"``, see INTERFACE, "Dialects".
        limits: what each client is allowed.
    """

    def __init__(self, dialect: Dialect = "spec", limits: Limits | None = None) -> None:
        #: Guards the store, which all sessions share.
        self.lock = trio.Lock()
        #: What the commands see.
        self.daemon = Daemon(dialect, limits or Limits(), trio.current_time, self.stop, TABLE)
        self.store = self.daemon.store
        #: The daemon is ending: what was received is carried out, nothing else is waited for.
        self.stopping = False
        self._stop_event = trio.Event()
        #: Set when all is over.
        self.ended = trio.Event()
        self._sessions: set[Session] = set()
        self._nursery: trio.Nursery | None = None

    def stop(self) -> None:
        """End gracefully: accept nobody else, carry out what was received, then return."""
        self.stopping = True
        self._stop_event.set()

    async def run(
        self,
        listeners: Sequence[UnixListener],
        *,
        task_status: trio.TaskStatus[Server] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Serve until :meth:`stop`, then drain and close the listeners."""
        async with trio.open_nursery() as sessions:
            self._nursery = sessions
            async with trio.open_nursery() as accepting:
                for listener in listeners:
                    accepting.start_soon(self._accept, listener)
                accepting.start_soon(retire_expired, self)
                accepting.start_soon(retire_hung_up, self)
                task_status.started(self)
                await self._stop_event.wait()
                accepting.cancel_scope.cancel()
            # Whoever is in the backlog has connected in time: it is served as well.
            for listener in listeners:
                self._accept_rest(listener)
                listener.close()
            sessions.cancel_scope.deadline = trio.current_time() + self.daemon.limits.drain_timeout
            for session in self._sessions:
                session.finish()

    def close(self) -> None:
        """Close every stored descriptor."""
        close_all(stored.fd for stored in self.store.clear())
        self.daemon.hangups.close()

    async def enter(self) -> None:
        """Acquire the lock; without a checkpoint where nobody has it."""
        try:
            self.lock.acquire_nowait()
        except trio.WouldBlock:
            await self.lock.acquire()

    def start_soon(
        self, task: Callable[[trio.CancelScope], Awaitable[None]], scope: trio.CancelScope
    ) -> None:
        """Run a task of a session beside it."""
        assert self._nursery is not None
        self._nursery.start_soon(task, scope)

    # -- connections ---------------------------------------------------------------------------

    async def _accept(self, listener: UnixListener) -> None:
        while True:
            try:
                sock, _ = await listener.socket.accept()
            except OSError as exc:
                if exc.errno not in _ACCEPT_LATER:
                    raise
                _log.error("cannot accept a connection: %s", exc.strerror)
                await trio.sleep(0.1)
            else:
                self._welcome(sock)

    def _accept_rest(self, listener: UnixListener) -> None:
        """Accept those who have connected already, without waiting for others."""
        with suppress(OSError):
            while len(self._sessions) < self.daemon.limits.max_connections:
                self._welcome(listener.accept_nowait())

    def _welcome(self, sock: trio.socket.SocketType) -> None:
        """Serve a new client, or tell it why not."""
        stats = self.daemon.stats
        with ExitStack() as stack:
            stream = stack.enter_context(FdStream(sock))
            peer = _peer(stream.socket)
            try:
                self._admit(peer)
            except QMPError as exc:
                stats.turned_away += 1
                _log.warning("turned away pid %d, uid %d: %s", peer.pid, peer.uid, exc.desc)
                refusal = {"error": {"class": exc.error_class, "desc": exc.desc}}
                with suppress(trio.BrokenResourceError):
                    stream.send_nowait(encode(refusal) + b"\r\n")
                return
            session = Session(self, stream, peer)
            stack.pop_all()
        stats.accepted += 1
        stats.connections += 1
        self._sessions.add(session)
        assert self._nursery is not None
        self._nursery.start_soon(self._serve, session)

    def _admit(self, peer: Peer) -> None:
        """Refuse a client that may not connect, or for whom there is no room."""
        most = self.daemon.limits.max_connections
        if len(self._sessions) >= most:
            raise GenericError(f"Too many connections: the limit is {most}")
        if peer.uid not in (0, os.geteuid()):
            raise PermissionDenied(f"uid {peer.uid} may not connect")

    async def _serve(self, session: Session) -> None:
        try:
            await session.run()
        finally:
            self._sessions.discard(session)
            self.daemon.stats.connections -= 1


def _peer(sock: socket.socket) -> Peer:
    """Who connected (SO_PEERCRED, unix(7))."""
    packed = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return Peer(*struct.unpack("3i", packed))


async def serve(  # noqa: ASYNC128 - Server.run does that
    paths: Iterable[str | os.PathLike[str]],
    *,
    dialect: Dialect = "spec",
    limits: Limits | None = None,
    socket_mode: int = 0o600,
    initial_fds: Iterable[tuple[Fd, int, str | None]] = (),
    task_status: trio.TaskStatus[Server] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Hold file descriptors for the clients that connect to *paths*.

    Runs until it is cancelled, :meth:`Server.stop` is called or a client says ``quit``; then
    every stored descriptor is closed and the socket files are removed.  Started with
    ``await nursery.start(qmpfd.serve, [path])``, it returns once clients can connect, and gives
    the :class:`Server`.

    Args:
        paths: the Unix sockets to listen on; a stale socket file is replaced.
        dialect: ``"spec"``, the published specification of the commands, or ``"qemu"``, today's
            QEMU.
        limits: what each client is allowed.
        socket_mode: permission bits of the socket files.
        initial_fds: descriptors to start with: each with the id of its fd set, which is created
            if need be, and its opaque text or None; owned by the daemon from here on.

    Raises:
        SocketInUse: another daemon listens on one of *paths*.
        OSError: one of *paths* cannot be used.
    """
    server = Server(dialect, limits)
    with ExitStack() as stack:
        stack.callback(server.close)
        for fd, fdset_id, opaque in initial_fds:
            server.store.add(fd, fdset_id, opaque, create=True)
        listeners = []
        for path in paths:
            listener = UnixListener(path, mode=socket_mode)
            stack.callback(listener.close)
            listeners.append(listener)
        try:
            await server.run(listeners, task_status=task_status)
        finally:
            server.ended.set()
