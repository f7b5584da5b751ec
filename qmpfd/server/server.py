"""The daemon as a Trio task: one nursery, one store, one lock."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterator, Sequence, Set
from contextlib import ExitStack, suppress
from functools import partial
from math import inf
from pathlib import Path

import trio

from ..commands import TABLE, Client, Dialect, SharedState
from ..errors import QMPError
from ..fdsets import Peer
from ..kernel.close_pool import ClosePool
from ..kernel.credentials import peer_credentials, peer_groups
from ..kernel.fd import Fd
from ..kernel.hangups import Hangups
from ..limits import MAX_INCOMPLETE_BYTES, MAX_UNSENT_BYTES, Limits
from ..policy import Access, Policy
from ..protocol.budget import Budget
from ..transport import FdStream
from .connection.reader import Reader
from .connection.session import Session
from .connection.session_state import SessionEnd
from .durability import Durability, Unmirrored
from .fdstore.mirror import FdStoreConfig, FdStoreMirror
from .handle import Server
from .lifecycle import DRAINING, STOPPING, Event, Lifecycle, State
from .listen.accept import Acceptor
from .listen.admission import RejectionLog, admit, rejection_reply
from .listen.listener import UnixListener
from .maintenance import broadcast_events, evict_idle, remove_expired, remove_hung_up, supervise
from .metrics import write_metrics
from .services import Services
from .takeover.sender import hand_over

_log = logging.getLogger("qmpfd")


class DaemonServer(Server):
    """A running daemon.

    Args:
        dialect: ``"spec"``, the published specification of the commands, or ``"qemu"``.
        limits: limits of the daemon and of each client.
        policy: which users may connect, and which commands each may run.
        metrics_path: a file to write metrics to, or None.
        fd_store: the fd store that keeps a second copy of the store across a restart.
    """

    def __init__(
        self,
        dialect: Dialect = "spec",
        limits: Limits | None = None,
        policy: Policy | None = None,
        metrics_path: Path | None = None,
        fd_store: FdStoreConfig | None = None,
    ) -> None:
        clock, limits = trio.lowlevel.current_clock().current_time, limits or Limits()
        #: State shared by the commands.
        self.daemon = SharedState(
            dialect, limits, clock, self.quit, TABLE, ClosePool(), Hangups(), self._clients
        )
        self.store = self.daemon.store
        self.lifecycle = Lifecycle()
        closer = self.daemon.closer
        #: The second copy of the store; None without an fd store.
        self.mirror = None if fd_store is None else FdStoreMirror(fd_store, closer)
        self.durability: Durability = self.mirror or Unmirrored(closer)
        lock = trio.Lock()
        #: Services for the sessions.
        self.services = Services(
            shared=self.daemon,
            lifecycle=self.lifecycle,
            durability=self.durability,
            lock=lock,
            input_budget=Budget(max(MAX_INCOMPLETE_BYTES, 2 * limits.max_request_bytes)),
            unsent_budget=Budget(MAX_UNSENT_BYTES),
            reader=Reader(self.lifecycle, lock, self.durability),
            gate=trio.Lock(),
            spawn=self._spawn,
        )
        self._acceptor = Acceptor(self.lifecycle, self._handle_accepted)
        self._rejections = RejectionLog()
        self._policy = policy or Policy()
        self._metrics_path = metrics_path
        self.daemon.quotas.refresh_in_flight = self._refresh_in_flight
        self.sessions: set[Session] = set()
        #: The listening sockets.
        self.listeners: Sequence[UnixListener] = ()
        #: Cancel scope of the takeover under way.
        self.takeover_scope = trio.CancelScope()
        self._drained_by = inf
        self._nursery: trio.Nursery | None = None

    @property
    def ended(self) -> trio.Event:
        return self.lifecycle.ended

    def stop(self) -> None:
        self._end(Event.STOP)

    def quit(self) -> None:
        """As :meth:`stop`, and remove the second copy of the store: no restart restores it."""
        self._end(Event.QUIT)

    def _end(self, event: Event) -> None:
        is_first = self.lifecycle.can(Event.STOP)
        if self.lifecycle.can(event):
            self.lifecycle.handle(event)
        if not is_first:
            return
        if self.lifecycle.state in DRAINING:
            # Before any client can notice the end: it may start another daemon on the same path.
            for listener in self.listeners:
                listener.unlink()
        # A takeover under way ends the daemon as well: it gets half of the drain timeout.
        now, timeout = trio.current_time(), self.daemon.limits.drain_timeout
        self._drained_by = now + timeout
        self.takeover_scope.deadline = min(self.takeover_scope.deadline, now + timeout / 2)

    async def run(
        self,
        listeners: Sequence[UnixListener],
        *,
        task_status: trio.TaskStatus[DaemonServer] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Serve until :meth:`stop`, then drain and close the listeners."""
        self.listeners = listeners
        async with trio.open_nursery() as sessions:
            self._nursery = sessions
            for session in self.sessions:
                sessions.start_soon(self._serve, session)
            async with trio.open_nursery() as background:
                for name, task in self._background_tasks():
                    background.start_soon(supervise, name, task)
                if self.lifecycle.can(Event.START):
                    self.lifecycle.handle(Event.START)
                self._bind_if_lost()  # a socket file may have been removed between two daemons
                task_status.started(self)
                await self.lifecycle.wait_for(*STOPPING)
                background.cancel_scope.cancel()
            # Wait for the end of a takeover under way.
            await self.lifecycle.wait_for(*DRAINING, State.HANDED_OVER)
            if self.lifecycle.handed_over:
                sessions.cancel_scope.cancel()
            else:
                sessions.cancel_scope.deadline = self._drained_by
                self._drain()

    def _background_tasks(self) -> Iterator[tuple[str, Callable[[], Awaitable[None]]]]:
        """Names and functions of the tasks that run until the daemon begins to stop."""
        for listener in self.listeners:
            name = f"accepting clients at the socket {listener}"
            yield name, partial(self._acceptor.accept_clients, listener)
        services = self.services
        yield "serving clients", services.reader.run
        yield "removing expired descriptors", partial(remove_expired, services)
        yield "removing descriptors whose peer hung up", partial(remove_hung_up, services)
        yield "sending events", partial(broadcast_events, services)
        yield "disconnecting idle clients", partial(evict_idle, services, self.sessions)
        if self._metrics_path is not None:
            yield "writing metrics", partial(write_metrics, self.daemon, self._metrics_path)

    def _drain(self) -> None:
        """Have every session answer the commands received, and end."""
        # Clients in the backlog have connected before the stop: serve them as well.
        for listener in self.listeners:
            self._acceptor.accept_backlog(listener)
            listener.close()
        for session in self.sessions:
            session.finish()

    def close(self) -> None:
        """Close every stored descriptor."""
        fds: list[Fd] = []
        self.daemon.remove(self.store.everything(), "ended", fds)
        self.daemon.closer.close(fds)
        self.daemon.closer.shut_down()
        self.daemon.hangups.close()
        self.services.reader.close()
        self._acceptor.close()

    def _spawn(
        self, task: Callable[[trio.CancelScope], Awaitable[None]], scope: trio.CancelScope
    ) -> None:
        assert self._nursery is not None
        self._nursery.start_soon(task, scope)

    # -- takeover ------------------------------------------------------------------------------

    def drop_duplicates(self, quick: Set[Fd] = frozenset()) -> None:
        """Close the descriptors and connections that another daemon owns, without shutdown(2) and
        without events.

        Args:
            quick: stored descriptors whose duplicates can be closed without blocking.
        """
        self.daemon.watchers.clear()
        # All in one call: the successor serves no client until all of it is closed.  Placeholders
        # of a takeover that has failed may be closed already.
        fds = [fd for fd in self.store.drop_all() if not fd.closed]
        self.daemon.closer.close_duplicates(fds, quick)
        for session in self.sessions:
            session.release()

    # -- connections ---------------------------------------------------------------------------

    def _handle_accepted(self, sock: trio.socket.SocketType, reason: QMPError | None) -> None:
        """Serve a new client, or reject it with an error reply.

        Args:
            sock: its connection; owned from here on.
            reason: why it is rejected in any case, or None.
        """
        with ExitStack() as stack:
            stream = stack.enter_context(FdStream(sock))
            peer = Peer(*peer_credentials(stream.socket))
            try:
                if reason is not None:
                    raise reason
                groups = frozenset([peer.gid, *peer_groups(stream.socket)])
                access = admit(peer, groups, self._policy, self.daemon.limits, self.sessions)
                self.daemon.quotas.check_table(peer.uid, stream.socket.fileno())
            except QMPError as exc:
                self._reject(stream, peer, exc)
                return
            session = self.begin(stream, peer, groups, access)
            stack.pop_all()
        self.daemon.stats.accepted += 1
        assert self._nursery is not None
        self._nursery.start_soon(self._serve, session)

    def begin(
        self,
        stream: FdStream,
        peer: Peer,
        groups: frozenset[int],
        access: Access | None = None,
        idle: float = 0.0,
    ) -> Session:
        """Create a session; :meth:`run` starts to serve it, if it is a predecessor's.

        Args:
            stream: the connection; owned from here on.
            peer: credentials of the client.
            groups: all groups of the client.
            access: the client's rights; None for those of the policy.
            idle: seconds since its last command.
        """
        access = access or self._policy.access(peer.uid, groups)
        session = Session(self.services, stream, peer, groups, access, idle)
        self.sessions.add(session)
        return session

    def _reject(self, stream: FdStream, peer: Peer, reason: QMPError) -> None:
        self.daemon.stats.turned_away += 1
        self._rejections.note(peer, reason)
        if self.daemon.audit is not None:
            self.daemon.audit.refuse(peer, None, reason)
        with suppress(trio.BrokenResourceError, OSError):
            stream.send_nowait(rejection_reply(reason))
        self.services.close_stream(stream, peer.uid)

    async def _serve(self, session: Session) -> None:
        try:
            try:
                if await session.serve() is SessionEnd.TAKEOVER:
                    await hand_over(self, session)
            except QMPError as exc:
                session.refuse_takeover(exc)
            finally:
                await session.aclose()
        except Exception:  # noqa: BLE001 - an exception that left this task would end all sessions
            _log.exception("a connection failed")
        finally:
            self.sessions.discard(session)

    async def bind_lost_sockets(self) -> None:
        """Bind a new socket at each path whose socket file is missing; clients in the backlog of
        the old socket are served.  Wait for the end of a takeover under way: the predecessor has
        described the sockets to the successor as they were.
        """
        await self.lifecycle.wait_for(State.RUNNING)
        self._bind_if_lost()

    def _bind_if_lost(self) -> None:
        for listener in self.listeners:
            listener.bind_if_lost(self._acceptor.accept_backlog)

    def _refresh_in_flight(self) -> None:
        for session in self.sessions:
            session.fd_accounting.refresh_in_flight()

    def _clients(self) -> list[Client]:
        """Describe the connected clients."""
        now = trio.current_time()
        return [session.about(now) for session in self.sessions]

    def change_policy(self, policy: Policy) -> None:
        self._policy = policy
        for session in self.sessions:
            session.context.change_access(policy.access(session.peer.uid, session.groups))
