"""Saved state and descriptors become store, listeners and sessions: in a restart, in a takeover."""

from __future__ import annotations

import logging
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import msgspec
import trio

from ..client.blocking import NoDaemon
from ..errors import QMPError
from ..fdsets import PERMANENT, Lifetime, Peer
from ..kernel.fd import Fd
from ..limits import TAKEOVER_TIMEOUT
from ..transport import FdStream
from .connection.snapshot import WatchRestorer
from .fdstore.recover import Recovered
from .listen.listener import UnixListener
from .saved_state import SavedFd, SavedListener, SavedSet

_log = logging.getLogger("qmpfd")

if TYPE_CHECKING:
    from .connection.saved import SavedCounters, SavedRest
    from .connection.session import Session
    from .server import DaemonServer
    from .takeover.receiver import Takeover

#: Seconds that can have gone by since an old daemon has described what it stores.
_MAX_ELAPSED = 10 * TAKEOVER_TIMEOUT


@contextmanager
def restored(server: DaemonServer, recovered: Recovered) -> Iterator[list[UnixListener]]:
    """Put what has come back after a crash in its place, and give the listeners, which are closed
    at the block's end.

    Raises:
        NoDaemon: it makes no sense.
        OSError: this process is out of descriptors.
    """
    listeners: list[UnixListener] = []
    try:
        fds = recovered.fds
        with _usable():
            _fill_store(
                server,
                recovered.state.at,
                recovered.state.sets,
                lambda number: fds[0],
                [],
                fds.popleft,
                _drop,
            )
            _inherit_listeners(recovered.state.listeners, fds, listeners)
        yield listeners
    finally:
        for listener in listeners:
            listener.close()


@contextmanager
def taking_over(
    server: DaemonServer, takeover: Takeover
) -> Iterator[Callable[[], list[UnixListener]]]:
    """Store what the old daemon has, while it goes on serving; and give what fetches the rest, once
    everything else is ready: the old daemon pauses then.  That gives its listeners.

    If the takeover is not confirmed in the block, all of it is let go at the block's end, as the
    old daemon's: no connection is shut down, and no socket file removed.

    Args:
        server: a daemon that does not run yet.
        takeover: the takeover.

    Raises:
        NoDaemon: it makes no sense.
        OSError: this process is out of descriptors.
    """
    listeners: list[UnixListener] = []

    def drop(removed: list[tuple[int, int]]) -> None:
        for fdset_id, number in removed:
            fdset, fd = server.store.get(fdset_id), takeover.stored[number]
            entries = [] if fdset is None else fdset.select(fd.fileno())
            placeholders: list[Fd] = []
            server.daemon.remove(entries, "removed", placeholders)
            server.daemon.closer.close(placeholders)

    def finish() -> list[UnixListener]:
        with _usable():
            rest = takeover.receive_rest(TAKEOVER_TIMEOUT, drop)
            _inherit_listeners(takeover.state.listeners, takeover.others, listeners)
            _restore_sessions(server, rest, takeover)
        return listeners

    try:
        with _usable():
            _fill_store(
                server, takeover.state.at, takeover.state.sets, takeover.stored.__getitem__, []
            )
        yield finish
    finally:
        if not takeover.confirmed:
            server.drop_duplicates()
            for session in server.sessions:
                session.stream.close()
            for listener in listeners:
                listener.abandon()
        for listener in listeners:
            listener.close()


@contextmanager
def _usable() -> Iterator[None]:
    try:
        yield
    except (ValueError, LookupError, msgspec.MsgspecError, MemoryError, QMPError) as exc:
        reason = str(exc) or "this process is out of memory"  # a MemoryError says nothing
        raise NoDaemon(f"the old daemon's state cannot be used, it goes on: {reason}") from exc


def _inherit_listeners(
    saved: list[SavedListener], fds: deque[Fd], listeners: list[UnixListener]
) -> None:
    listeners.extend(  # each as soon as there is one: the next may fail
        UnixListener.inherit(fds.popleft(), each) for each in saved
    )


def _restore_sessions(server: DaemonServer, rest: SavedRest, takeover: Takeover) -> None:
    fds = _take_out(takeover.others)
    sessions = []
    for saved in rest.sessions:
        sock = socket.socket(fileno=next(fds).detach())
        stream = FdStream(trio.socket.from_stdlib_socket(sock))
        sessions.append(server.restore_session(stream, saved, fds))
    _fill_store(server, rest.at, rest.added, takeover.stored.__getitem__, sessions)
    # Only now, as what was stored before is news to nobody, and a listing is of what is stored.
    watches = WatchRestorer(rest.logs)
    for session, saved in zip(sessions, rest.sessions, strict=True):
        session.restore_reply(saved, rest.texts)
        watches.restore(saved, session.context)
    _restore_counters(server, rest.counters)


def _restore_counters(server: DaemonServer, saved: SavedCounters) -> None:
    stats = server.daemon.stats
    stats.commands.update(saved.commands)
    stats.errors.update(saved.errors)
    stats.accepted, stats.turned_away = saved.accepted, saved.turned_away
    stats.started_at = server.daemon.clock() - saved.uptime


def _take_out(fds: deque[Fd]) -> Iterator[Fd]:
    """Each of *fds*, which the caller owns from then on."""
    while fds:
        yield fds.popleft()


def _fill_store(
    server: DaemonServer,
    at: float,
    sets: list[SavedSet],
    descriptor: Callable[[int], Fd],
    sessions: list[Session],
    stored: Callable[[], object] = lambda: None,
    refused: Callable[[int, int, Fd, QMPError], None] | None = None,
) -> None:
    """Store descriptors.

    Args:
        server: the daemon.
        at: when *sets* was so, by CLOCK_MONOTONIC.
        sets: what they are.
        descriptor: gives the descriptor that had a number; the store's once it is stored.
        sessions: those that some of them are kept until the end of.
        stored: called after each.
        refused: called with the fd set, the number and the descriptor of one that cannot be stored,
            and why; None where that ends it all.

    Raises:
        QMPError: a descriptor cannot be stored.
    """
    now = server.daemon.clock()
    elapsed = time.monotonic() - at
    if 0 < elapsed < _MAX_ELAPSED:  # else the old daemon is in another time namespace
        now -= elapsed
    peers: dict[tuple[int, int, int], Peer] = {}  # there are many descriptors, of few clients
    for fdset in sets:
        for saved in fdset.fds:
            fd = descriptor(saved.number)
            lifetime = _lifetime(saved, sessions, now)
            peer = None
            if saved.added_by is not None:
                peer = peers.get(saved.added_by) or peers.setdefault(
                    saved.added_by, Peer(*saved.added_by)
                )
            if lifetime is None:  # kept until the end of a connection that is over
                fd.close()
            else:
                try:
                    _store(server, fdset.id, saved, fd, peer, lifetime, now - saved.age)
                except QMPError as exc:
                    if refused is None:
                        raise
                    refused(fdset.id, saved.number, fd, exc)
            stored()


def _drop(fdset_id: int, number: int, fd: Fd, reason: QMPError) -> None:
    """What has come back after a crash and cannot be stored costs itself: all others are there."""
    _log.error("descriptor %d of fd set %d is lost: %s", number, fdset_id, reason)
    fd.close()


def _store(
    server: DaemonServer,
    fdset_id: int,
    saved: SavedFd,
    fd: Fd,
    peer: Peer | None,
    lifetime: Lifetime,
    added_at: float,
) -> None:
    add = server.daemon.add
    try:
        add([fd], fdset_id, saved.opaque, peer, lifetime, create=True, now=added_at)
    except QMPError as exc:
        if not lifetime.watch_hangup:
            raise
        # The kernel has no more watches, or no memory: the descriptor itself is all right.
        _log.error(
            "descriptor %d of fd set %d is not removed when its peer hangs up: %s",
            saved.number,
            fdset_id,
            exc,
        )
        lifetime = replace(lifetime, watch_hangup=False)
        add([fd], fdset_id, saved.opaque, peer, lifetime, create=True, now=added_at)


def _lifetime(saved: SavedFd, sessions: list[Session], now: float) -> Lifetime | None:
    if saved.owner == -1:
        return None
    if saved.owner is saved.expires_in is None and not saved.watch_hangup:
        return PERMANENT
    return Lifetime(
        owner=None if saved.owner is None else sessions[saved.owner].context,
        expires_at=None if saved.expires_in is None else now + saved.expires_in,
        watch_hangup=saved.watch_hangup,
    )
