"""The new daemon's side of a takeover: a server made of what was fetched."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from ..fd import Fd
from ..fdsets import FOREVER, FdSet, Peer, Terms
from ..limits import TAKEOVER_TIMEOUT
from ..transport import FdStream
from .fetch import Inheritance
from .listener import UnixListener
from .recover import Recovered
from .state import SavedFd, SavedState

if TYPE_CHECKING:
    from .server import Server
    from .session import Session


def restore(server: Server, inheritance: Inheritance | Recovered) -> list[UnixListener]:
    """Put everything in its place; the listeners.

    Args:
        server: a daemon that does not run yet.
        inheritance: what was fetched, or has come back.
    """
    state, fds = inheritance.state, _take_out(inheritance.fds)
    stored = [next(fds) for _ in state.stored_numbers]
    listeners = [
        UnixListener.inherit(next(fds), None if path is None else Path(path))
        for path in state.listeners
    ]
    sessions = []
    for saved in state.sessions:
        sock = socket.socket(fileno=next(fds).detach())
        stream = FdStream(trio.socket.from_stdlib_socket(sock))
        sessions.append(server.readmit(stream, saved, fds))
    _fill_store(server, state, iter(stored), sessions)
    stats = server.daemon.stats
    stats.commands.update(state.commands)
    stats.errors.update(state.errors)
    stats.accepted, stats.turned_away = state.accepted, state.turned_away
    stats.started_at -= state.uptime
    return listeners


def _take_out(fds: list[Fd]) -> Iterator[Fd]:
    """Each of *fds*, which the caller owns from then on."""
    while fds:
        yield fds.pop(0)


def _fill_store(
    server: Server, state: SavedState, fds: Iterator[Fd], sessions: list[Session]
) -> None:
    now = server.daemon.clock()
    for fdset in state.sets:
        for saved in fdset.fds:
            fd = next(fds)
            terms = _terms(saved, sessions, now)
            if terms is None:  # kept until the end of a connection that is over
                fd.close()
                continue
            if terms.watch_hangup:
                server.daemon.hangups.register(fd)
            added: FdSet = server.store.add(
                fd,
                fdset.id,
                saved.opaque,
                create=True,
                added_by=None if saved.added_by is None else Peer(*saved.added_by),
                now=now - saved.age,
                terms=terms,
            )
            if terms.watch_hangup:
                server.daemon.hangups.watch(added.fds[fd.fileno()])


def _terms(saved: SavedFd, sessions: list[Session], now: float) -> Terms | None:
    if saved.owner == -1:
        return None
    terms = Terms(
        owner=None if saved.owner is None else sessions[saved.owner].context,
        expires_at=None if saved.expires_in is None else now + saved.expires_in,
        watch_hangup=saved.watch_hangup,
    )
    return FOREVER if terms == FOREVER else terms


def confirm(server: Server, listeners: list[UnixListener], inheritance: Inheritance) -> None:
    """Everything is in its place: take over.

    Raises:
        NoDaemon: the old daemon goes on; nothing was touched.
    """
    try:
        inheritance.confirm(TAKEOVER_TIMEOUT)
        if server.keeper is not None:
            server.keeper.confirm()
    except BaseException:
        for session in server.sessions:
            session.outbox.mute()
        for listener in listeners:
            listener.abandon()
        raise
