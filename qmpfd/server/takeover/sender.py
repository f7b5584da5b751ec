"""The old daemon's side of a takeover: one transaction, under the store's lock.

Nobody is accepted, no session reads, and all that is under way comes to rest; then everything is
described, and its descriptors are sent.  The newcomer confirms once all of it is in its place.

Who owns it is decided by one system call, that which says DONE.  Before, all of it is ours, and
everybody goes on when the newcomer dies, hangs or gives up: then DONE cannot be sent any more.
After it, we serve nobody; and until the newcomer hears that all is closed here, neither does it,
so that what it removes for a client has really gone by the time of its reply.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from typing import Protocol

import msgspec
import trio

from ...errors import GenericError
from ...fdsets import StoredFd
from ...kernel.fd import Fd
from ...limits import FORGET_TIMEOUT, SCM_MAX_FD, TAKEOVER_TIMEOUT
from ...transport import FdStream
from .. import saved_state as saved
from ..closing import all_closed
from ..connection.saved import SavedConnections, SharedParts
from ..connection.session import Session
from ..listen.listener import UnixListener
from ..services import Durability, Services

_log = logging.getLogger("qmpfd")


class Predecessor(Protocol):
    """What the sender needs of the daemon that is taken over; see :class:`..server.Server`."""

    services: Services
    listeners: Sequence[UnixListener]

    def paused(self, scope: trio.CancelScope) -> AbstractAsyncContextManager[None]:
        """Begin nothing while the block runs, in *scope*."""

    async def wait_quiescent(self, newcomer: Session) -> list[Session]:
        """Wait until no other session has anything under way, and acquire the lock."""

    def release_all(self) -> None:
        """A successor has taken over: let go of everything."""


async def hand_over(server: Predecessor, newcomer: Session) -> None:
    """Hand everything over to the client of *newcomer*; its connection is over then.

    Args:
        server: the daemon.
        newcomer: the session that asked for it.

    Raises:
        GenericError: it cannot even begin: one is under way already, or the daemon is ending, out
            of descriptors or too busy.
    """
    services, stream = server.services, newcomer.stream
    begun = False
    with trio.move_on_after(TAKEOVER_TIMEOUT) as scope:
        async with server.paused(scope):
            try:
                others = await server.wait_quiescent(newcomer)
                try:
                    state, fds = describe(server, others)
                    with _in_memory(saved.encode(state)) as memory:
                        begun = True
                        _log.info("pid %d takes over", newcomer.peer.pid)
                        await newcomer.reply_to_takeover(memory)
                    if await _send_all(stream, fds) and _let_go(services.durability, stream):
                        server.release_all()
                        _log.info("pid %d has taken over", newcomer.peer.pid)
                        with trio.move_on_after(FORGET_TIMEOUT):
                            await services.durability.sync()  # what was kept of it is closed too
                            await all_closed(services.shared.closer)
                        return
                finally:
                    services.lock.release()
            except trio.BrokenResourceError:
                pass  # the newcomer is gone
            finally:
                if begun and not services.lifecycle.handed_over:
                    _log.warning("pid %d has not taken over: going on", newcomer.peer.pid)
                    with suppress(trio.BrokenResourceError):
                        stream.send_nowait(saved.REFUSED)
    if not begun:
        raise GenericError("The daemon did not come to rest in time: it goes on")


def _in_memory(data: bytes) -> Fd:
    try:
        memory = Fd(os.memfd_create("qmpfd-state", os.MFD_CLOEXEC))
    except OSError as exc:
        raise GenericError(f"The daemon cannot hand over: {exc.strerror}") from None
    written = 0
    while written < len(data):
        written += os.write(memory.fileno(), data[written:])
    return memory


async def _send_all(stream: FdStream, fds: list[int]) -> bool:
    """Send the descriptors, as they are asked for; whether the newcomer has confirmed."""
    for start in range(0, len(fds), SCM_MAX_FD):
        if await _hear(stream) != saved.NEXT:
            return False
        await stream.send_all(saved.MORE, fds[start : start + SCM_MAX_FD])
    return await _hear(stream) == saved.CONFIRM


def _let_go(durability: Durability, stream: FdStream) -> bool:
    """Say that all of it is the newcomer's; whether that was possible.

    Where we are started again when we die, that has to be known before: the newcomer finds it out
    if we die in between.
    """
    durability.log_handover(True)
    done = False
    try:
        done = stream.send_nowait(saved.DONE) > 0
    finally:
        if not done:
            durability.log_handover(False)
    return done


async def _hear(stream: FdStream) -> bytes:
    """The next byte that the newcomer says; empty once it is gone."""
    while True:
        await stream.wait_readable()
        try:
            return stream.socket.recv(1)
        except BlockingIOError:
            continue
        except ConnectionError:
            return b""


def describe(
    server: Predecessor, sessions: Collection[Session]
) -> tuple[saved.SavedState, list[int]]:
    """The daemon's state, and the numbers of all descriptors that belong to it, in its order."""
    daemon, durability = server.services.shared, server.services.durability
    now = daemon.clock()
    owners = {id(session.context): number for number, session in enumerate(sessions)}
    fds: list[int] = []
    sets = []
    for fdset in daemon.store:
        entries = []
        for number, stored in fdset.fds.items():
            fds.append(number)
            entries.append(_describe_fd(number, stored, now, owners))
        sets.append(saved.SavedSet(fdset.id, entries))
    fds += [listener.socket.fileno() for listener in server.listeners]
    described = []
    parts = SharedParts(list(daemon.logs.values()))
    for session in sessions:
        entry, its_fds = session.describe(now, parts)
        described.append(entry)
        fds += its_fds
    journal = durability.journal
    if journal is not None:
        fds.append(journal.fileno())
    stats = daemon.stats
    state = saved.SavedState(
        pid=os.getpid(),
        sets=sets,
        listeners=[listener.saved for listener in server.listeners],
        connections=len(described),
        connection_fds=sum(session.fd_count for session in described),
        connection_states=msgspec.msgpack.encode(
            SavedConnections(described, parts.texts, [log.save() for log in parts.logs])
        ),
        commands=dict(stats.commands),
        errors=dict(stats.errors),
        accepted=stats.accepted,
        turned_away=stats.turned_away,
        uptime=now - stats.started_at,
        journal=journal is not None,
        store=durability.store,
    )
    return state, fds


def _describe_fd(
    number: int, stored: StoredFd, now: float, owners: dict[int, int]
) -> saved.SavedFd:
    lifetime = stored.lifetime
    return saved.SavedFd(
        number=number,
        opaque=stored.opaque,
        added_by=stored.added_by,
        age=now - stored.added_at,
        # A descriptor of the newcomer's own connection would end with it at once.
        owner=None if lifetime.owner is None else owners.get(id(lifetime.owner), -1),
        expires_in=None if lifetime.expires_at is None else lifetime.expires_at - now,
        watch_hangup=lifetime.watch_hangup,
    )
