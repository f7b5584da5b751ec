"""The daemon as a Trio task: one nursery, one store, one lock."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, suppress
from math import inf
from pathlib import Path

import trio

from ..commands import TABLE, Client, Daemon, Dialect
from ..errors import GenericError, QMPError
from ..fd import Fd, Passing, close_all
from ..fdsets import Peer
from ..limits import (
    EVICTION_INTERVAL,
    FORGET_TIMEOUT,
    MAX_INCOMPLETE_BYTES,
    REFUSAL_LOG_INTERVAL,
    TAKEOVER_TIMEOUT,
    Limits,
)
from ..policy import Policy
from ..protocol import Budget
from ..transport import FdStream
from .accept import Reserve, accept_clients
from .admission import Admission, groups_of, peer_of
from .backlog import Backlog
from .fetch import Inheritance
from .herald import tell_watchers
from .inherit import taking_over
from .keeper import Holdings, Keeper, Keeping
from .listener import UnixListener
from .metrics import write_metrics
from .recover import Recovered
from .retire import retire_expired, retire_hung_up
from .session import Session, refusal
from .state import SavedSession
from .turns import Turns
from .untaken import Untaken

_log = logging.getLogger("qmpfd")

#: Seconds between two looks at whether all sessions have come to rest.
_REST_POLL = 0.001


class Server:
    """A running daemon.

    Args:
        dialect: ``"spec"``, the published specification of the commands, or ``"qemu"``.
        limits: what each client is allowed.
        policy: who may connect, and do what.
        metrics_path: a file to write metrics to, or None.
    """

    def __init__(
        self,
        dialect: Dialect = "spec",
        limits: Limits | None = None,
        policy: Policy | None = None,
        metrics_path: Path | None = None,
    ) -> None:
        limits = limits or Limits()
        #: Guards the store, which all sessions share.
        self.lock = trio.Lock()
        #: What the commands see.
        self.daemon = Daemon(dialect, limits, trio.current_time, self.quit, TABLE, self._clients)
        self.store = self.daemon.store
        #: What the incomplete requests of all connections together may take.
        self.budget = Budget(MAX_INCOMPLETE_BYTES)
        #: The replies that wait for their clients.
        self.backlog = Backlog()
        #: Where clients queue who ask for much.
        self.turns = Turns()
        self.reserve = Reserve()
        #: Whoever keeps a second copy of what is stored, if anybody does.
        self.keeper: Keeper | None = None
        self._quits = False  # for good: what is kept is to be let go
        self._refusals = 0  # not logged yet
        self._refusals_logged_at = -inf
        self._admission = Admission(limits, policy or Policy())
        self._metrics_path = metrics_path
        #: The daemon is ending: what was received is carried out, nothing else is waited for.
        self.stopping = False
        self._stop_event = trio.Event()
        self._drained_by = inf
        #: Set when an event waits for those who watch.
        self.news = trio.Event()
        self.daemon.news = self._tell_watchers
        self.daemon.look = self._look
        self._untaken = Untaken(self.daemon, self.close_stream)
        #: Set when all is over.
        self.ended = trio.Event()
        self.sessions: set[Session] = set()
        #: Where clients connect.
        self.listeners: Sequence[UnixListener] = ()
        #: A takeover is under way: nobody is accepted, and no session begins anything.
        self.is_frozen = False
        self._thawed = trio.Event()
        self._settled = trio.Event()  # it has come to its end, either way
        self._accept_scopes: set[trio.CancelScope] = set()
        #: A successor has taken over.
        self.has_left = False
        #: Of the takeover under way.
        self.takeover_scope: trio.CancelScope | None = None
        self._nursery: trio.Nursery | None = None

    def stop(self) -> None:
        """End gracefully: accept nobody else, carry out what was received, then return."""
        if self.stopping:
            return
        self.stopping = True
        now, timeout = trio.current_time(), self.daemon.limits.drain_timeout
        self._drained_by = now + timeout
        if self.takeover_scope is not None:  # it is an end as well, if it does not take too long
            self.takeover_scope.deadline = min(self.takeover_scope.deadline, now + timeout / 2)
        self._stop_event.set()

    def quit(self) -> None:
        """As :meth:`stop`, and nothing is left for another daemon to come back to."""
        self._quits = True
        self.stop()

    async def run(
        self,
        listeners: Sequence[UnixListener],
        *,
        task_status: trio.TaskStatus[Server] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Serve until :meth:`stop`, then drain and close the listeners."""
        self.listeners = listeners
        async with trio.open_nursery() as sessions:
            self._nursery = sessions
            for session in self.sessions:
                sessions.start_soon(self._serve, session)
            async with trio.open_nursery() as accepting:
                for listener in listeners:
                    accepting.start_soon(accept_clients, self, listener)
                accepting.start_soon(retire_expired, self)
                accepting.start_soon(retire_hung_up, self)
                accepting.start_soon(tell_watchers, self)
                accepting.start_soon(self._evict)
                if self._metrics_path is not None:
                    accepting.start_soon(write_metrics, self.daemon, self._metrics_path)
                task_status.started(self)
                await self._stop_event.wait()
                accepting.cancel_scope.cancel()
            if self.is_frozen:
                await self._settled.wait()
            if self.has_left:
                sessions.cancel_scope.cancel()
            else:
                self._drain(sessions)

    def _drain(self, sessions: trio.Nursery) -> None:
        """Have everything answered that was asked, within the time there is."""
        # Whoever is in the backlog has connected in time: it is served as well.
        for listener in self.listeners:
            self._accept_rest(listener)
            listener.close()
        sessions.cancel_scope.deadline = self._drained_by
        for session in self.sessions:
            session.finish()

    # -- what is kept safe ---------------------------------------------------------------------

    @asynccontextmanager
    async def kept(
        self,
        keeping: Keeping | None,
        listeners: Sequence[UnixListener],
        recovered: Recovered | None,
        witness: Fd | None,
    ) -> AsyncGenerator[None, None]:
        """Have everything kept safe while the block runs.

        Args:
            keeping: by whom; None if there is nobody.
            listeners: the sockets that are to be kept.
            recovered: what came back from there, if anything may have.
            witness: what tells whether it is ours, in the middle of a takeover.

        Raises:
            GenericError: it is more than can be kept.
        """
        useless = [] if recovered is None else recovered.useless
        if keeping is None:
            self.daemon.closer.close(useless)
            yield
            return
        holdings = Holdings() if recovered is None else recovered.holdings
        keeper = Keeper(keeping, self.daemon.closer)
        async with keeper.running():
            await keeper.start(self.store, listeners, holdings, witness)
            self.daemon.closer.close(useless)
            self.keeper = self.daemon.keeper = keeper
            try:
                yield
            except Exception:
                # Whoever starts us again expects them where they are.
                for listener in listeners:
                    listener.abandon()
                raise
            answers = keeper.is_settled  # or else the end has waited for it long enough
            if self._quits:
                keeper.leave()
            elif not self.has_left:
                keeper.finish()
            if answers:
                with trio.move_on_after(FORGET_TIMEOUT):
                    await keeper.settle()

    def confirmed(self) -> None:
        """What was fetched is ours now."""
        if self.keeper is not None:
            self.keeper.confirm()

    def prepare_to_leave(self, leaves: bool) -> None:
        """A successor is about to take over, or has not: whoever starts us again has to know."""
        if self.keeper is not None:
            self.keeper.prepare_to_leave(leaves)

    @property
    def is_settled(self) -> bool:
        """Whether all that was changed is safe."""
        return self.keeper is None or self.keeper.is_settled

    async def settle(self) -> None:
        """Wait until all that was changed so far is safe; without a checkpoint if it is."""
        if self.keeper is not None:
            await self.keeper.settle()

    def dispose(self, fds: list[Fd]) -> None:
        """Close what was taken out, as soon as that is settled; owned from here on."""
        if self.keeper is None:
            self.daemon.closer.close(fds)
        else:
            self.keeper.close_settled(fds)

    def _tell_watchers(self) -> None:
        self.news.set()

    def close(self) -> None:
        """Close every stored descriptor."""
        self._untaken.close()
        self.daemon.closer.close([stored.fd for stored in self.store.clear()])
        self.daemon.closer.shut_down()
        self.daemon.hangups.close()
        self.reserve.give_up()

    async def enter(self) -> None:
        """Acquire the lock; without a checkpoint where nobody has it."""
        try:
            self.lock.acquire_nowait()
        except trio.WouldBlock:
            await self.lock.acquire()

    def start_soon(
        self, task: Callable[[trio.CancelScope], Awaitable[None]], scope: trio.CancelScope
    ) -> None:
        """Run a task of a session beside it.

        Args:
            task: what to run; it is given *scope*.
            scope: the session's, which ends it.
        """
        assert self._nursery is not None
        self._nursery.start_soon(task, scope)

    # -- takeover ------------------------------------------------------------------------------

    @asynccontextmanager
    async def frozen(self) -> AsyncGenerator[None, None]:
        """Begin nothing while the block runs; then go on, unless a successor has taken over.

        Raises:
            GenericError: a takeover is under way already, or the daemon is ending.
        """
        if self.is_frozen or self.stopping:
            raise GenericError("The daemon is being taken over, or is ending")
        self.is_frozen = True
        self._thawed, self._settled = trio.Event(), trio.Event()
        for scope in self._accept_scopes:
            scope.cancel()
        for session in self.sessions:
            session.outbox.freeze()
        try:
            yield
        finally:
            self.takeover_scope = None
            self._settled.set()
            if not self.has_left:
                self.is_frozen = False
                self._thawed.set()
                for session in self.sessions:
                    session.thaw()
                self.news.set()

    async def until_thawed(self) -> None:
        """Wait while a takeover is under way."""
        if self.is_frozen:
            await self._thawed.wait()

    async def until_at_rest(self, newcomer: Session) -> list[Session]:
        """Wait until nothing of any session is under way but of the newcomer's, and acquire the
        lock: the other sessions.
        """
        while True:
            others = [session for session in self.sessions if session is not newcomer]
            if not self._accept_scopes and all(session.at_rest for session in others):
                with suppress(trio.WouldBlock):
                    self.lock.acquire_nowait()
                    return others
            # They come to rest within a few passes of the loop, and there is nothing else to do.
            await trio.sleep(_REST_POLL)

    def leave(self) -> None:
        """A successor has taken over: let go of everything, without a word to anybody, and end."""
        self.has_left = True
        self.stopping = True
        if self.keeper is not None:
            self.keeper.leave()
        self.daemon.watchers.clear()
        self.daemon.logs.clear()
        for listener in self.listeners:
            listener.abandon()
            listener.close()
        self.daemon.closer.close_duplicates([stored.fd for stored in self.store.clear()])
        for session in self.sessions:
            session.leave()
        self._stop_event.set()

    def readmit(self, stream: FdStream, saved: SavedSession, fds: Iterator[Fd]) -> Session:
        """Go on with a client of the predecessor, once :meth:`run` runs.

        Args:
            stream: its connection; owned from here on.
            saved: the session's state.
            fds: the session's descriptors.
        """
        peer, groups = Peer(*saved.peer), frozenset(saved.groups)
        session = Session(self, stream, peer, groups, self._admission.readmit(peer, groups))
        self.daemon.stats.connections += 1
        self.sessions.add(session)
        session.restore(saved, fds)
        return session

    async def accept(self, listener: UnixListener) -> trio.socket.SocketType | None:
        """The next client; None when the daemon is frozen meanwhile: it stays in the backlog."""
        with trio.CancelScope() as scope:
            self._accept_scopes.add(scope)
            try:
                sock, _ = await listener.socket.accept()
            finally:
                self._accept_scopes.discard(scope)
            return sock
        return None

    # -- connections ---------------------------------------------------------------------------

    def _accept_rest(self, listener: UnixListener) -> None:
        """Accept those who have connected already, without waiting for others."""
        with suppress(OSError):
            for _ in range(self.daemon.limits.max_connections):
                self.welcome(listener.accept_nowait())

    def welcome(self, sock: trio.socket.SocketType) -> None:
        """Serve a new client, or tell it why not."""
        with ExitStack() as stack:
            stream = stack.enter_context(FdStream(sock))
            peer = peer_of(stream.socket)
            groups = groups_of(stream.socket, peer)
            try:
                access = self._admission.admit(peer, groups)
            except QMPError as exc:
                self._refuse(stream, peer, exc)
                return
            session = Session(self, stream, peer, groups, access)
            stack.pop_all()
        stats = self.daemon.stats
        stats.accepted += 1
        stats.connections += 1
        self.sessions.add(session)
        assert self._nursery is not None
        self._nursery.start_soon(self._serve, session)

    def turn_away(self, sock: trio.socket.SocketType, reason: QMPError) -> None:
        """Tell a client why it is not served.

        Args:
            sock: its connection; owned from here on.
            reason: what it is told.
        """
        stream = FdStream(sock)
        self._refuse(stream, peer_of(stream.socket), reason)

    def _refuse(self, stream: FdStream, peer: Peer, reason: QMPError) -> None:
        self.daemon.stats.turned_away += 1
        self._log_refusal(peer, reason)
        with suppress(trio.BrokenResourceError):
            stream.send_nowait(refusal(reason))
        self.close_stream(stream)

    def _log_refusal(self, peer: Peer, reason: QMPError) -> None:
        """Say who was turned away; of many a second, one and how many."""
        now = trio.current_time()
        if now - self._refusals_logged_at < REFUSAL_LOG_INTERVAL:
            self._refusals += 1
            return
        more = f" (and {self._refusals} others before)" if self._refusals else ""
        self._refusals, self._refusals_logged_at = 0, now
        _log.info("turned away pid %d, uid %d: %s%s", peer.pid, peer.uid, reason.desc, more)

    def close_stream(self, stream: FdStream) -> None:
        """Close a connection; what its client sent and nobody read may hold that up."""
        if self.has_left:  # the connection goes on, in the successor
            stream.close()
            return
        fd = stream.retire()
        if fd is not None:
            self.daemon.closer.close([fd])

    def end_stream(self, stream: FdStream, uid: int, in_flight: int) -> None:
        """End a connection of *uid*, which has not taken so many descriptors that were sent."""
        if in_flight and not self.stopping:
            self._untaken.keep(stream, uid, in_flight)
        else:
            self.close_stream(stream)

    async def _serve(self, session: Session) -> None:
        try:
            await session.run()
        finally:
            self.sessions.discard(session)
            self._admission.leave(session.peer)
            self.daemon.stats.connections -= 1

    def _look(self) -> None:
        for session in self.sessions:
            session.look()
        self._untaken.look()

    def _clients(self) -> list[Client]:
        """Who is connected."""
        now = trio.current_time()
        return [session.about(now) for session in self.sessions]

    def change_policy(self, policy: Policy) -> None:
        """Put other rules in force, for those who are connected as well."""
        self._admission.policy = policy
        for session in self.sessions:
            session.change_access(policy.access(session.peer.uid, session.groups))

    async def _evict(self) -> None:
        """Cut off who never negotiates, and who is idle for too long."""
        while True:
            await trio.sleep(EVICTION_INTERVAL)
            await self.until_thawed()
            now = trio.current_time()
            for session in list(self.sessions):
                session.evict_if_idle(now)
            self._untaken.look()


async def serve(  # noqa: ASYNC128 - Server.run does that
    paths: Iterable[str | os.PathLike[str]],
    *,
    dialect: Dialect = "spec",
    limits: Limits | None = None,
    policy: Policy | None = None,
    socket_mode: int = 0o600,
    socket_group: int | None = None,
    metrics_path: Path | None = None,
    initial_fds: Iterable[tuple[Fd, int, str | None]] = (),
    listen_fds: Iterable[Fd] = (),
    inheritance: Inheritance | None = None,
    recovered: Recovered | None = None,
    keeping: Keeping | None = None,
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
        policy: who may connect, and do what; by default the daemon's own user and root may do
            everything, and nobody else.
        socket_mode: permission bits of the socket files.
        socket_group: the gid of their group; the process's own by default.
        metrics_path: a file to write OpenMetrics text to, every 10 seconds.
        initial_fds: descriptors to start with: each with the id of its fd set, which is created
            if need be, and its opaque text or None; owned by the daemon from here on.
        listen_fds: Unix sockets that listen already, of a service manager; owned by the daemon
            from here on.
        inheritance: what was fetched from the daemon that is to be taken over, see
            :func:`qmpfd.server.fetch.fetch`; owned by the daemon from here on.
        recovered: what has come back of a daemon that was here before, see
            :func:`qmpfd.server.recover.recover`; owned by the daemon from here on.
        keeping: whoever keeps a second copy of what is stored, and starts the daemon again.

    Raises:
        SocketInUse: another daemon listens on one of *paths*.
        OSError: one of *paths* cannot be used.
    """
    server = Server(dialect, limits, policy, metrics_path)
    given, inherited = deque(initial_fds), deque(listen_fds)
    listeners: list[UnixListener] = []
    with ExitStack() as stack:
        stack.callback(lambda: close_all([*(fd for fd, _, _ in given), *inherited]))
        stack.callback(server.close)
        if os.geteuid():
            server.daemon.passing = Passing()
            stack.callback(server.daemon.passing.close)
        for before in (inheritance, recovered):
            if before is not None:
                stack.enter_context(before)
                listeners += stack.enter_context(taking_over(server, before))
        while given:
            fd, fdset_id, opaque = given[0]
            server.store.add(fd, fdset_id, opaque, create=True)
            given.popleft()
        for path in paths:
            listeners.append(UnixListener.bind(path, mode=socket_mode, group=socket_group))
            stack.callback(listeners[-1].close)
        ours = list(listeners)  # the others are passed to every daemon that is started here
        while inherited:
            listeners.append(UnixListener.inherit(inherited.popleft()))
            stack.callback(listeners[-1].close)
        witness = None if inheritance is None else inheritance.witness
        async with server.kept(keeping, ours, recovered, witness):
            if inheritance is not None:
                inheritance.confirm(TAKEOVER_TIMEOUT)
                server.confirmed()
            try:
                await server.run(listeners, task_status=task_status)
            finally:
                server.ended.set()
