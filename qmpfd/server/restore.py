"""Saved state and descriptors become store, listeners and sessions: in a restart, in a takeover."""

from __future__ import annotations

import logging
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import msgspec
import trio

from ..client.blocking import NoDaemon
from ..commands.events import EventLog
from ..errors import QMPError
from ..fdsets import PERMANENT, Lifetime, Peer, StoredFd
from ..kernel.fd import Fd
from ..limits import TAKEOVER_TIMEOUT
from ..transport import FdStream
from .connection.snapshot import restore, resume
from .fdstore.recover import Recovered
from .listen.listener import UnixListener
from .saved_state import SavedFd, SavedListener

_log = logging.getLogger("qmpfd")

if TYPE_CHECKING:
    from .connection.session import Session
    from .connection.snapshot import SavedRest
    from .server import DaemonServer
    from .takeover.receiver import Takeover

#: Seconds that can have gone by since an old daemon has described what it stores.
_MAX_ELAPSED = 10 * TAKEOVER_TIMEOUT


def restore_recovered(
    server: DaemonServer, recovered: Recovered, listeners: list[UnixListener]
) -> None:
    """Put what has come back after a crash in its place.

    Args:
        server: a daemon that does not run yet.
        recovered: what has come back.
        listeners: where the listening sockets go.

    Raises:
        NoDaemon: it makes no sense.
        OSError: this process is out of descriptors.
    """
    state = recovered.state
    with _usable():
        _fill_store(server, state.at, state.fds, recovered.stored, skip_refused=True)
        _inherit_listeners(state.listeners, recovered.others, listeners)


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

    stored: dict[int, StoredFd] = {}
    state = takeover.state

    def drop(removed: list[int]) -> None:
        placeholders: list[Fd] = []
        server.daemon.remove([stored[number] for number in removed], "removed", placeholders)
        server.daemon.closer.close(placeholders)

    def finish() -> list[UnixListener]:
        with _usable():
            rest = takeover.receive_rest(TAKEOVER_TIMEOUT, drop)
            _inherit_listeners(state.listeners, takeover.others, listeners)
            _restore_sessions(server, rest, takeover)
        return listeners

    try:
        with _usable():
            stored = _fill_store(server, state.at, state.fds, dict(takeover.stored))
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
    fds = iter(takeover.others.popleft, None)  # IndexError where there are too few
    sessions = []
    for saved in rest.sessions:
        sock = socket.socket(fileno=next(fds).detach())
        stream = FdStream(trio.socket.from_stdlib_socket(sock))
        session = server.readmit(stream, Peer(*saved.peer), frozenset(saved.groups), saved.idle)
        restore(session, saved, fds)
        sessions.append(session)
    _fill_store(server, rest.at, rest.added, dict(takeover.stored), sessions)
    # Only now, as what was stored before is news to nobody, and a listing is of what is stored.
    logs: dict[EventLog, int] = {}
    for session, saved in zip(sessions, rest.sessions, strict=True):
        resume(session, saved, rest, logs)
    stats, saved_stats = server.daemon.stats, rest.stats
    stats.commands.update(saved_stats.commands)
    stats.errors.update(saved_stats.errors)
    stats.accepted, stats.turned_away = saved_stats.accepted, saved_stats.turned_away
    stats.started_at = saved_stats.started_at + _clock_offset(server, rest.at)


def _clock_offset(server: DaemonServer, at: float) -> float:
    """The daemon's clock minus the CLOCK_MONOTONIC of who has saved something.

    Args:
        server: the daemon.
        at: when it was saved, by the latter.
    """
    elapsed = time.monotonic() - at
    if not 0 < elapsed < _MAX_ELAPSED:  # the old daemon is in another time namespace
        elapsed = 0.0
    return server.daemon.clock() - elapsed - at


def _fill_store(
    server: DaemonServer,
    at: float,
    entries: Iterable[SavedFd],
    fds: dict[int, Fd],
    sessions: Sequence[Session] = (),
    *,
    skip_refused: bool = False,
) -> dict[int, StoredFd]:
    """Store descriptors; what is stored, by number.

    Args:
        server: the daemon.
        at: when *entries* was so, by CLOCK_MONOTONIC.
        entries: what they are.
        fds: the descriptors by number: taken out of this once they are stored.
        sessions: those that some of them are kept until the end of.
        skip_refused: one that cannot be stored costs itself only.

    Raises:
        QMPError: a descriptor cannot be stored.
    """
    offset = _clock_offset(server, at)
    peers: dict[tuple[int, int, int], Peer] = {}  # there are many descriptors, of few clients
    stored = {}
    for saved in entries:
        number = saved.number
        peer = None
        if saved.added_by is not None:
            peer = peers.get(saved.added_by) or peers.setdefault(
                saved.added_by, Peer(*saved.added_by)
            )
        try:
            if saved.owner == -1:  # kept until the end of a connection that is over
                fds[number].close()
            else:
                stored[number] = _store(server, saved, fds[number], peer, sessions, offset)
        except QMPError as exc:
            if not skip_refused:
                raise
            _log.error("descriptor %d of fd set %d is lost: %s", number, saved.fdset_id, exc)
            fds[number].close()
        del fds[number]
    return stored


def _store(
    server: DaemonServer,
    saved: SavedFd,
    fd: Fd,
    peer: Peer | None,
    sessions: Sequence[Session],
    offset: float,
) -> StoredFd:
    lifetime = PERMANENT
    if saved.owner is not None or saved.expires_at is not None or saved.watch_hangup:
        lifetime = Lifetime(
            owner=None if saved.owner is None else sessions[saved.owner].context,
            expires_at=None if saved.expires_at is None else saved.expires_at + offset,
            watch_hangup=saved.watch_hangup,
        )
    add = partial(
        server.daemon.add,
        [fd],
        saved.fdset_id,
        saved.opaque,
        peer,
        create=True,
        now=saved.added_at + offset,
    )
    try:
        return add(lifetime=lifetime)[0]
    except QMPError as exc:
        if not lifetime.watch_hangup:
            raise
        # The kernel has no more watches, or no memory: the descriptor itself is all right.
        _log.error(
            "descriptor %d of fd set %d is not removed when its peer hangs up: %s",
            saved.number,
            saved.fdset_id,
            exc,
        )
        return add(lifetime=replace(lifetime, watch_hangup=False))[0]
