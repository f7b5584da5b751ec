"""Restores store, listeners and sessions from saved state: after a crash and in a takeover."""

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

#: Maximum age in seconds of a saved state: the takeover in which it was sent has ended by then.
_MAX_ELAPSED = 10 * TAKEOVER_TIMEOUT


def restore_recovered(
    server: DaemonServer, recovered: Recovered, listeners: list[UnixListener]
) -> None:
    """Restore the store and the listening sockets after a crash.

    Args:
        server: a daemon that does not run yet.
        recovered: the state and the descriptors from the fd store.
        listeners: list to append the listening sockets to.

    Raises:
        NoDaemon: the saved state is invalid.
        OSError: this process is out of descriptors.
    """
    state = recovered.state
    with _as_no_daemon():
        _fill_store(server, state.at, state.fds, recovered.stored, skip_refused=True)
        _inherit_listeners(state.listeners, recovered.others, listeners)


@contextmanager
def taking_over(
    server: DaemonServer, takeover: Takeover
) -> Iterator[Callable[[], list[UnixListener]]]:
    """Fill the store with placeholders of the predecessor's descriptors, while it goes on serving.

    The context manager gives a function that completes the takeover: it pauses the predecessor,
    receives the rest and returns the listeners.  Call it when all else is ready.

    If the takeover is not confirmed within the block, everything still belongs to the predecessor.
    At the end of the block its duplicates are closed without shutdown(2), and no file is removed.

    Args:
        server: a daemon that does not run yet.
        takeover: the takeover.

    Raises:
        NoDaemon: the predecessor's state is invalid.
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
        with _as_no_daemon():
            rest = takeover.receive_rest(drop)
            _inherit_listeners(state.listeners, takeover.others, listeners)
            _restore_sessions(server, rest, takeover)
        return listeners

    try:
        with _as_no_daemon():
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
def _as_no_daemon() -> Iterator[None]:
    try:
        yield
    except (ValueError, LookupError, msgspec.MsgspecError, MemoryError, QMPError) as exc:
        reason = str(exc) or "this process is out of memory"  # str(MemoryError()) is empty
        raise NoDaemon(f"the old daemon's state cannot be used, it goes on: {reason}") from exc


def _inherit_listeners(
    saved: list[SavedListener], fds: deque[Fd], listeners: list[UnixListener]
) -> None:
    listeners.extend(  # a generator: the caller owns each listener before the next one can fail
        UnixListener.inherit(fds.popleft(), each) for each in saved
    )


def _restore_sessions(server: DaemonServer, rest: SavedRest, takeover: Takeover) -> None:
    fds = iter(takeover.others.popleft, None)  # raises IndexError when descriptors are missing
    sessions = []
    for saved in rest.sessions:
        sock = socket.socket(fileno=next(fds).detach())
        stream = FdStream(trio.socket.from_stdlib_socket(sock))
        peer, groups = Peer(*saved.peer), frozenset(saved.groups)
        session = server.begin(stream, peer, groups, idle=saved.idle)
        restore(session, saved, fds)
        sessions.append(session)
    _fill_store(server, rest.at, rest.added, dict(takeover.stored), sessions)
    # Watches and listings resume last: restored descriptors are no events, and listings read them.
    logs: dict[EventLog, int] = {}
    for session, saved in zip(sessions, rest.sessions, strict=True):
        resume(session, saved, rest, logs)
    stats, saved_stats = server.daemon.stats, rest.stats
    stats.commands.update(saved_stats.commands)
    stats.errors.update(saved_stats.errors)
    stats.accepted, stats.turned_away = saved_stats.accepted, saved_stats.turned_away
    stats.started_at = saved_stats.started_at + _clock_offset(server, rest.at)


def _clock_offset(server: DaemonServer, at: float) -> float:
    """Return the daemon's clock minus the CLOCK_MONOTONIC of the process that saved the state.

    Args:
        server: the daemon.
        at: time of saving, by that process's CLOCK_MONOTONIC.
    """
    elapsed = time.monotonic() - at
    if not 0 < elapsed < _MAX_ELAPSED:  # that process is in another time namespace
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
    """Store descriptors; return the new entries by number.

    Args:
        server: the daemon.
        at: time of saving, by CLOCK_MONOTONIC.
        entries: saved entries of the store.
        fds: the descriptors by number: removed from this dict once they are stored.
        sessions: the sessions that ``SavedFd.owner`` refers to by index.
        skip_refused: whether to log and close a descriptor that cannot be stored, and go on.

    Raises:
        QMPError: a descriptor cannot be stored.
    """
    offset = _clock_offset(server, at)
    peers: dict[tuple[int, int, int], Peer] = {}  # shared: many descriptors, few clients
    stored = {}
    for saved in entries:
        number = saved.number
        peer = None
        if saved.added_by is not None:
            peer = peers.get(saved.added_by) or peers.setdefault(
                saved.added_by, Peer(*saved.added_by)
            )
        try:
            if saved.owner == -1:  # its lifetime ended with a connection that is not handed over
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
        # The kernel is out of epoll watches or of memory: store the descriptor without a watch.
        _log.error(
            "descriptor %d of fd set %d is not removed when its peer hangs up: %s",
            saved.number,
            saved.fdset_id,
            exc,
        )
        return add(lifetime=replace(lifetime, watch_hangup=False))[0]
