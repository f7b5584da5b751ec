"""The daemon as a Trio task: one nursery, one store, one lock."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, suppress
from math import inf
from pathlib import Path

import trio

from ..commands import TABLE, Client, Dialect, SharedState
from ..errors import GenericError, QMPError
from ..fdsets import Peer
from ..kernel.close_pool import ClosePool
from ..kernel.fd import Fd
from ..kernel.hangups import Hangups
from ..limits import (
    EVICTION_INTERVAL,
    MAX_INCOMPLETE_BYTES,
    Limits,
)
from ..policy import Policy
from ..protocol import Budget
from ..transport import FdStream
from .connection.session import Session
from .connection.turns import Turns
from .connection.unsent_budget import UnsentBudget
from .fdstore.mirror import FdStoreMirror
from .herald import tell_watchers
from .listen.accept import SpareFd, accept_clients
from .listen.admission import Admission, groups_of, peer_of
from .listen.listener import UnixListener
from .listen.rejections import RejectionLog, refusal
from .metrics import write_metrics
from .retire import retire_expired, retire_hung_up
from .saved_state import SavedSession

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
        clock = trio.lowlevel.current_clock().current_time
        self.daemon = SharedState(
            dialect, limits, clock, self.quit, TABLE, ClosePool(), Hangups(), self._clients
        )
        self.store = self.daemon.store
        #: What the incomplete requests of all connections together may take.
        self.budget = Budget(MAX_INCOMPLETE_BYTES)
        #: The replies that wait for their clients.
        self.backlog = UnsentBudget()
        #: Where clients queue who ask for much.
        self.turns = Turns()
        self.reserve = SpareFd()
        #: Whoever keeps a second copy of what is stored, if anybody does.
        self.keeper: FdStoreMirror | None = None
        #: It ends for good: what is kept is to be let go.
        self.quits = False
        self._refusals = RejectionLog()
        self._admission = Admission(limits, policy or Policy())
        self._metrics_path = metrics_path
        #: The daemon is ending: what was received is carried out, nothing else is waited for.
        self.stopping = False
        self._stop_event = trio.Event()
        self._drained_by = inf
        #: Set when an event waits for those who watch.
        self.news = trio.Event()
        self.daemon.on_event = self._tell_watchers
        self.daemon.quotas.refresh_in_flight = self._look
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
        self.quits = True
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

    def confirmed(self) -> None:
        """What was fetched is ours now."""
        if self.keeper is not None:
            self.keeper.confirm()

    def prepare_to_leave(self, leaves: bool) -> None:
        """A successor is about to take over, or has not: whoever starts us again has to know."""
        if self.keeper is not None:
            self.keeper.log_handover(leaves)

    @property
    def is_settled(self) -> bool:
        """Whether all that was changed is safe."""
        return self.keeper is None or self.keeper.is_synced

    async def settle(self) -> None:
        """Wait until all that was changed so far is safe; without a checkpoint if it is."""
        if self.keeper is not None:
            await self.keeper.sync()

    def dispose(self, fds: list[Fd]) -> None:
        """Close what was taken out, as soon as that is settled; owned from here on."""
        if self.keeper is None:
            self.daemon.closer.close(fds)
        else:
            self.keeper.close_after_sync(fds)

    def _tell_watchers(self) -> None:
        self.news.set()

    def close(self) -> None:
        """Close every stored descriptor."""
        self.daemon.closer.close(self._clear())
        self.daemon.closer.shut_down()
        self.daemon.hangups.close()
        self.reserve.give_up()

    def _clear(self) -> list[Fd]:
        """Take everything out of the store, at the daemon's end: the caller closes it."""
        fds: list[Fd] = []
        self.daemon.remove(self.store.everything(), "removed", fds)
        return fds

    @asynccontextmanager
    async def entered(self) -> AsyncGenerator[None, None]:
        """Hold the lock while the block runs.  Where nobody has it there is no checkpoint, in which
        trio's own way would hold it for a pass of the loop.
        """
        try:
            self.lock.acquire_nowait()
        except trio.WouldBlock:
            await self.lock.acquire()
        try:
            yield
        finally:
            self.lock.release()

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
            session.send_buffer.freeze()
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
        self.daemon.closer.close_duplicates(self._clear())
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
        self._refusals.note(peer, reason)
        with suppress(trio.BrokenResourceError):
            stream.send_nowait(refusal(reason))
        self.close_stream(stream)

    def close_stream(self, stream: FdStream) -> None:
        """Close a connection; what its client sent and nobody read may hold that up."""
        if self.has_left:  # the connection goes on, in the successor
            stream.close()
            return
        fd = stream.shutdown()
        if fd is not None:
            self.daemon.closer.close([fd])

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
