"""The old daemon's side of a takeover.

First, everybody is served as ever, and the newcomer is told what is stored: it gets ready.  Then it
asks for the rest, and the daemon is paused: nobody is accepted, no session reads, all that is under
way comes to rest.  What has changed and what the connections are is described, and all descriptors
are sent.  The newcomer confirms once all of it is in its place.

Who owns it is decided by one system call, that which says DONE.  Before, all of it is ours, and
everybody goes on when the newcomer dies, hangs or gives up: then DONE cannot be sent any more.
Whoever has got descriptors of ours closes the lifeline after them, and we wait for that: so what is
removed here then has really gone.  And we say on the lifeline how it has ended, to whoever has it.
After it, we serve nobody; and until the newcomer hears that all is closed here, neither does it,
so that what it removes for a client has really gone by the time of its reply.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import replace
from typing import NamedTuple, Protocol

import msgspec
import trio

from ...errors import GenericError
from ...fdsets import StoredFd
from ...kernel.fd import Fd
from ...kernel.systemd import invocation_id
from ...limits import CLOSE_TIMEOUT, FORGET_TIMEOUT, MAX_PAUSE, SCM_MAX_FD, TAKEOVER_TIMEOUT
from ...transport import FdStream
from .. import saved_state as saved
from ..closing import all_closed
from ..connection.saved import SavedRest
from ..connection.session import Session
from ..connection.snapshot import describe
from ..durability import Durability
from ..listen.listener import UnixListener
from ..services import Services

_log = logging.getLogger("qmpfd")

#: Descriptors that are described in a row, at some 10 us each, before others are served.
_DESCRIBED_AT_ONCE = 64


class _Described(NamedTuple):
    """What the newcomer was told of before the pause.

    Args:
        entries: the stored descriptors, by number.
        quick: those of which a duplicate is closed without waiting for anybody.
    """

    entries: dict[int, StoredFd]
    quick: set[Fd]


class Predecessor(Protocol):
    """What the sender needs of the daemon that is taken over; see :class:`..server.Server`."""

    services: Services
    listeners: Sequence[UnixListener]

    def offered(self, timeout: float) -> AbstractContextManager[None]:
        """Offer everything to a successor while the block runs, which may take so long."""

    def paused(self, timeout: float) -> AbstractContextManager[None]:
        """Begin nothing while the block runs, which may take so long."""

    async def wait_quiescent(self, newcomer: Session) -> list[Session]:
        """Wait until no other session has anything under way, and acquire the lock."""

    def release_all(self, quick: Set[Fd]) -> None:
        """A successor has taken over: let go of everything."""


async def hand_over(server: Predecessor, newcomer: Session) -> None:
    """Hand everything over to the client of *newcomer*; its connection is over then.

    Args:
        server: the daemon.
        newcomer: the session that asked for it.

    Raises:
        GenericError: it cannot even begin: one is under way already, or the daemon is ending, or
            out of descriptors or memory.
    """
    lifecycle, stream, pid = server.services.lifecycle, newcomer.stream, newcomer.peer.pid
    with server.offered(TAKEOVER_TIMEOUT), ExitStack() as stack:
        described = _Described({}, set())
        with _able():
            memory = stack.enter_context(
                _in_memory(saved.encode(await _describe_store(server, described)))
            )
            lifeline, other = map(stack.enter_context, socket.socketpair())
        theirs = stack.enter_context(Fd(other.detach()))
        lifeline.setblocking(False)
        try:
            with _able():
                await newcomer.reply_to_takeover(memory, theirs)
                theirs.close()
                if await _hear(stream) == saved.NEXT:
                    _log.info("pid %d begins a takeover", pid)
                    stack.enter_context(server.paused(min(TAKEOVER_TIMEOUT, MAX_PAUSE)))
                    await _hand_over_paused(server, newcomer, described, lifeline)
        except trio.BrokenResourceError:
            pass  # the newcomer is gone
        except GenericError as exc:  # it has its reply already: REFUSED has to do
            _log.error("%s", exc)
        finally:
            if not lifecycle.handed_over:
                server.services.durability.log_handover(False)
                _log.warning("the takeover by pid %d failed: this daemon goes on", pid)
                with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                    stream.send_nowait(saved.REFUSED)
                theirs.close()
                with suppress(OSError):  # nobody has it
                    lifeline.send(saved.REFUSED)
        if not lifecycle.handed_over:
            with trio.move_on_after(CLOSE_TIMEOUT):
                await trio.lowlevel.wait_readable(lifeline)  # until nobody has it


async def _hand_over_paused(
    server: Predecessor, newcomer: Session, described: _Described, lifeline: socket.socket
) -> None:
    services, stream = server.services, newcomer.stream
    others = await server.wait_quiescent(newcomer)
    try:
        # Before the newcomer has anything: its own second copy waits for the outcome.
        services.durability.log_handover(None)
        rest, fds = _describe_rest(server, others, described.entries)
        with _in_memory(msgspec.msgpack.encode(rest)) as memory:
            await stream.send_all(saved.MORE, [memory])
        if await _send_all(stream, fds) and _let_go(services.durability, stream):
            with suppress(OSError):  # the newcomer has died just now, and nobody has a duplicate
                lifeline.send(saved.DONE)
            server.release_all(described.quick)
            _log.info("pid %d has taken over", newcomer.peer.pid)
            with trio.move_on_after(FORGET_TIMEOUT):
                await services.durability.sync()  # what was kept of it is closed too
                await all_closed(services.shared.closer)
    finally:
        services.lock.release()


@contextmanager
def _able() -> Iterator[None]:
    """Being out of descriptors or memory in the block is a reason to refuse.

    Raises:
        GenericError: saying why.
    """
    try:
        yield
    except (OSError, MemoryError) as exc:
        reason = getattr(exc, "strerror", None) or os.strerror(errno.ENOMEM)
        raise GenericError(f"The daemon cannot hand over: {reason}") from None


def _in_memory(data: bytes) -> Fd:
    memory = Fd(os.memfd_create("qmpfd-state", os.MFD_CLOEXEC))
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(memory.fileno(), view) :]
    except BaseException:
        memory.close()
        raise
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
    while True:  # noqa: ASYNC913 - each way round has a checkpoint
        try:
            return stream.socket.recv(1)
        except BlockingIOError:
            await stream.wait_readable()
        except ConnectionError:
            return b""


async def _describe_store(server: Predecessor, described: _Described) -> saved.SavedState:
    """What is stored, while it may change.

    Args:
        server: the daemon.
        described: where each stored descriptor goes that is in it.
    """
    daemon = server.services.shared
    at, now = time.monotonic(), daemon.clock()
    fds: list[saved.SavedFd] = []
    for fdset in daemon.store.iter_stable():
        for stored in fdset.iter_stable(now):
            lifetime = stored.lifetime
            # What depends on a connection, or on the descriptor itself, goes over with that.
            if lifetime.owner is None and not lifetime.watch_hangup:
                number = stored.fd.fileno()
                described.entries[number] = stored
                if daemon.closer.is_quick_duplicate(number):
                    described.quick.add(stored.fd)
                fds.append(saved.SavedFd.of(stored, at - now))
                if not len(fds) % _DESCRIBED_AT_ONCE:
                    await trio.lowlevel.checkpoint()
    listeners = [listener.saved for listener in server.listeners]
    return saved.SavedState(at, fds, listeners, server.services.durability.store, invocation_id())


def _describe_rest(
    server: Predecessor, sessions: Sequence[Session], described: Mapping[int, StoredFd]
) -> tuple[SavedRest, list[int]]:
    """The rest of the daemon's state, and the numbers of all descriptors that belong to it."""
    daemon, durability = server.services.shared, server.services.durability
    at, now = time.monotonic(), daemon.clock()
    owners = {id(session.context): number for number, session in enumerate(sessions)}
    removed = [number for number, stored in described.items() if stored.removed]
    fds: list[int] = []
    added: list[saved.SavedFd] = []
    for fdset in daemon.store:
        is_behind = False  # behind one of the set that the newcomer does not know
        for number, stored in fdset.fds.items():
            fds.append(number)
            if described.get(number) is not stored:
                is_behind = True
            elif is_behind:  # stored again, so that it comes behind that one there too
                removed.append(number)
            else:
                continue
            owner = stored.lifetime.owner
            # A descriptor of the newcomer's own connection would end with it at once.
            index = None if owner is None else owners.get(id(owner), -1)
            added.append(saved.SavedFd.of(stored, at - now, owner=index))
    fds.sort()
    stored_count = len(fds)
    fds += [listener.socket.fileno() for listener in server.listeners]
    saved_sessions = []
    logs, texts = list(daemon.logs.values()), dict[str, int]()
    for session in sessions:
        entry, its_fds = describe(session, now, logs, texts)
        saved_sessions.append(entry)
        fds += its_fds
    journal = durability.journal
    if journal is not None:
        fds.append(journal.fileno())
    rest = SavedRest(
        at=at,
        removed=removed,
        added=added,
        sessions=saved_sessions,
        texts=list(texts),
        logs=[list(log.events) for log in logs],
        others=len(fds) - stored_count,
        stats=replace(daemon.stats, started_at=daemon.stats.started_at + at - now),
        journal=journal is not None,
    )
    return rest, fds
