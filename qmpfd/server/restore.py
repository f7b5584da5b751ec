"""The new daemon's side of a takeover: a server made of what was fetched."""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import msgspec
import trio

from ..client.blocking import NoDaemon
from ..fdsets import PERMANENT, Lifetime, Peer
from ..kernel.fd import Fd
from ..transport import FdStream
from .connection.saved import SavedConnections
from .connection.snapshot import WatchRestorer
from .fdstore.recover import Recovered
from .listen.listener import UnixListener
from .saved_state import SavedFd, SavedState
from .takeover.receiver import ReceivedState

if TYPE_CHECKING:
    from .connection.session import Session
    from .server import Server


@contextmanager
def taking_over(
    server: Server, inheritance: ReceivedState | Recovered
) -> Iterator[list[UnixListener]]:
    """Put everything in its place, and give the listeners.

    If the takeover is not confirmed in the block, all of it is let go at the block's end, as the
    old daemon's: no connection is shut down, and no socket file removed.

    Args:
        server: a daemon that does not run yet.
        inheritance: what was fetched, or has come back.

    Raises:
        NoDaemon: it makes no sense.
        OSError: this process is out of descriptors.
    """
    listeners: list[UnixListener] = []
    try:
        try:
            _restore(server, inheritance, listeners)
        except (ValueError, LookupError, msgspec.MsgspecError) as exc:
            raise NoDaemon(f"the old daemon's state cannot be used, it goes on: {exc}") from exc
        yield listeners
    finally:
        if not inheritance.confirmed:
            for session in server.sessions:
                session.abandon()
            for listener in listeners:
                listener.abandon()
        for listener in listeners:
            listener.close()


def _restore(
    server: Server, inheritance: ReceivedState | Recovered, listeners: list[UnixListener]
) -> None:
    state, fds = inheritance.state, _take_out(inheritance.fds)
    # What is stored comes last: it may be kept until the end of one of the sessions.
    inheritance.fds.rotate(-len(state.stored_numbers))
    listeners.extend(  # each as soon as there is one: the next may fail
        UnixListener.inherit(next(fds), saved) for saved in state.listeners
    )
    sessions = []
    connections = SavedConnections([], [], [])
    if state.connection_states:
        connections = msgspec.msgpack.decode(state.connection_states, type=SavedConnections)
    for saved in connections.sessions:
        sock = socket.socket(fileno=next(fds).detach())
        stream = FdStream(trio.socket.from_stdlib_socket(sock))
        sessions.append(server.restore_session(stream, saved, fds))
    _fill_store(server, state, inheritance.fds, sessions)
    # Only now, as what was stored before is news to nobody, and a listing is of what is stored.
    watches = WatchRestorer(connections.logs)
    for session, saved in zip(sessions, connections.sessions, strict=True):
        session.restore_reply(saved, connections.texts)
        watches.restore(saved, session.context)
    stats = server.daemon.stats
    stats.commands.update(state.commands)
    stats.errors.update(state.errors)
    stats.accepted, stats.turned_away = state.accepted, state.turned_away
    stats.started_at -= state.uptime


def _take_out(fds: deque[Fd]) -> Iterator[Fd]:
    """Each of *fds*, which the caller owns from then on."""
    while fds:
        yield fds.popleft()


def _fill_store(server: Server, state: SavedState, fds: deque[Fd], sessions: list[Session]) -> None:
    now = server.daemon.clock()
    for fdset in state.sets:
        for saved in fdset.fds:
            fd = fds[0]
            lifetime = _lifetime(saved, sessions, now)
            if lifetime is None:  # kept until the end of a connection that is over
                fds.popleft().close()
                continue
            server.daemon.add(
                [fd],
                fdset.id,
                saved.opaque,
                None if saved.added_by is None else Peer(*saved.added_by),
                lifetime,
                create=True,
                now=now - saved.age,
            )
            fds.popleft()


def _lifetime(saved: SavedFd, sessions: list[Session], now: float) -> Lifetime | None:
    if saved.owner == -1:
        return None
    lifetime = Lifetime(
        owner=None if saved.owner is None else sessions[saved.owner].context,
        expires_at=None if saved.expires_in is None else now + saved.expires_in,
        watch_hangup=saved.watch_hangup,
    )
    return PERMANENT if lifetime == PERMANENT else lifetime
