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
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence, Set
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import replace
from typing import Protocol

import msgspec
import trio

from ...errors import GenericError
from ...fdsets import StoredFd
from ...kernel.fd import Fd
from ...kernel.systemd import invocation_id
from ...limits import CLOSE_TIMEOUT, FORGET_TIMEOUT, MAX_PAUSE, SCM_MAX_FD, TAKEOVER_TIMEOUT
from ...transport import FdStream
from .. import saved_state as saved
from ..closing import closed
from ..connection.session import Session
from ..connection.snapshot import SavedRest, describe
from ..durability import Durability
from ..lifecycle import Event
from ..listen.listener import UnixListener
from ..services import Services

_log = logging.getLogger("qmpfd")

#: Seconds between two looks at whether all sessions have come to rest.
_REST_POLL = 0.001

#: Descriptors that are described in a row, at some 10 us each, before others are served.
_DESCRIBED_AT_ONCE = 64


class Predecessor(Protocol):
    """What the sender needs of the daemon that is taken over, a :class:`..server.DaemonServer`."""

    services: Services
    listeners: Sequence[UnixListener]
    sessions: set[Session]
    takeover_scope: trio.CancelScope

    def drop_duplicates(self, quick: Set[Fd]) -> None:
        """Close what another daemon goes on with."""


@contextmanager
def _offered(server: Predecessor) -> Iterator[None]:
    """Offer everything to a successor while the block runs, for :data:`TAKEOVER_TIMEOUT` at most.

    Raises:
        GenericError: that is done already, or the daemon is ending.
    """
    lifecycle = server.services.lifecycle
    if not lifecycle.can(Event.OFFER):
        raise GenericError("The daemon is being taken over, or is ending")
    lifecycle.handle(Event.OFFER)
    try:
        with trio.move_on_after(TAKEOVER_TIMEOUT) as server.takeover_scope:
            yield
    finally:
        if lifecycle.can(Event.WITHDRAW):
            lifecycle.handle(Event.WITHDRAW)


@asynccontextmanager
async def _paused(server: Predecessor, newcomer: Session) -> AsyncGenerator[list[Session], None]:
    """Begin nothing while the block runs, and hold the lock; then go on, unless a successor has
    taken over.  Gives the sessions but for the newcomer's, of which nothing is under way.
    """
    services, scope = server.services, server.takeover_scope
    services.lifecycle.handle(Event.PAUSE)
    pause = min(TAKEOVER_TIMEOUT, MAX_PAUSE)
    scope.deadline = min(scope.deadline, trio.current_time() + pause)
    for session in server.sessions:
        session.pause()
    try:
        while True:
            # They come to rest within a few passes of the loop, and there is nothing else to do.
            # Nor does it show before that all have: a task that sends for one of them may have been
            # woken by its client in this pass, and then sends something still.
            await trio.sleep(_REST_POLL)
            others = [session for session in server.sessions if session is not newcomer]
            if all(session.is_quiescent for session in others):
                with suppress(trio.WouldBlock):
                    services.lock.acquire_nowait()
                    break
        try:
            yield others
        finally:
            services.lock.release()
    finally:
        if services.lifecycle.can(Event.RESUME):
            services.lifecycle.handle(Event.RESUME)
            for session in server.sessions:
                session.resume()
            services.shared.on_event()


async def hand_over(server: Predecessor, newcomer: Session) -> None:
    """Hand everything over to the client of *newcomer*; its connection is over then.

    Args:
        server: the daemon.
        newcomer: the session that asked for it.

    Raises:
        GenericError: it cannot even begin: one is under way already, or the daemon is ending, or
            out of descriptors or memory.
    """
    services, stream, pid = server.services, newcomer.stream, newcomer.peer.pid
    async with AsyncExitStack() as stack:
        stack.enter_context(_offered(server))
        with _able():
            memory, known, quick = await _describe_store(server)
            stack.enter_context(memory)
            lifeline, other = map(stack.enter_context, socket.socketpair())
        theirs = stack.enter_context(Fd(other.detach()))
        lifeline.setblocking(False)
        try:
            with _able():
                await newcomer.reply_to_takeover(memory, theirs)
                theirs.close()
                if await _hear(stream) == saved.NEXT:
                    _log.info("pid %d begins a takeover", pid)
                    others = await stack.enter_async_context(_paused(server, newcomer))
                    if await _hand_over_paused(server, others, known, stream):
                        with suppress(OSError):  # the newcomer has died just now
                            lifeline.send(saved.DONE)
                        _release_all(server, quick)
                        _log.info("pid %d has taken over", pid)
                        with trio.move_on_after(FORGET_TIMEOUT):
                            await services.durability.sync()  # what was kept of it is closed too
                            await closed(services.shared.closer)
        except trio.BrokenResourceError:
            pass  # the newcomer is gone
        except GenericError as exc:  # it has its reply already: REFUSED has to do
            _log.error("%s", exc)
        finally:
            if not services.lifecycle.handed_over:
                services.durability.log_handover(False)
                _log.warning("the takeover by pid %d failed: this daemon goes on", pid)
                with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                    stream.send_nowait(saved.REFUSED)
                theirs.close()
                with suppress(OSError):  # nobody has it
                    lifeline.send(saved.REFUSED)
        if not services.lifecycle.handed_over:
            with trio.move_on_after(CLOSE_TIMEOUT):
                await trio.lowlevel.wait_readable(lifeline)  # until nobody has it


async def _hand_over_paused(
    server: Predecessor, others: Sequence[Session], known: Mapping[int, StoredFd], stream: FdStream
) -> bool:
    """Hand over what is left; whether all of it is the newcomer's."""
    durability = server.services.durability
    # Before the newcomer has anything: its own second copy waits for the outcome.
    durability.log_handover(None)
    rest, fds = _describe_rest(server, others, known)
    with _in_memory(msgspec.msgpack.encode(rest)) as memory:
        await stream.send_all(saved.MORE, [memory])
    for start in range(0, len(fds), SCM_MAX_FD):
        if await _hear(stream) != saved.NEXT:
            return False
        await stream.send_all(saved.MORE, fds[start : start + SCM_MAX_FD])
    return await _hear(stream) == saved.CONFIRM and _let_go(durability, stream)


def _let_go(durability: Durability, stream: FdStream) -> bool:
    """Say that all of it is the newcomer's; whether that was possible.

    Where we are started again when we die, that has to be known before: the newcomer finds it out
    if we die in between.
    """
    durability.log_handover(True)
    return stream.send_nowait(saved.DONE) > 0


def _release_all(server: Predecessor, quick: Set[Fd]) -> None:
    """A successor has taken over: let go of everything, without a word to anybody, and end."""
    services = server.services
    services.lifecycle.handle(Event.HAND_OVER)
    services.durability.release_all(quick)
    services.shared.audit = None  # nothing goes: the successor has it
    server.drop_duplicates(quick)
    for listener in server.listeners:
        listener.abandon()
        listener.close()


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


async def _hear(stream: FdStream) -> bytes:
    """The next byte that the newcomer says; empty once it is gone."""
    while True:  # noqa: ASYNC913 - each way round has a checkpoint
        try:
            return stream.socket.recv(1)
        except BlockingIOError:
            await stream.wait_readable()
        except ConnectionError:
            return b""


async def _describe_store(server: Predecessor) -> tuple[Fd, dict[int, StoredFd], set[Fd]]:
    """What is stored, while it may change: in a file in memory; the entries of it by number; and
    those of which a duplicate is closed without waiting for anybody.
    """
    daemon = server.services.shared
    at, now = time.monotonic(), daemon.clock()
    fds: list[saved.SavedFd] = []
    known: dict[int, StoredFd] = {}
    quick: set[Fd] = set()
    for fdset in daemon.store.iter_stable():
        for stored in fdset.iter_stable(now):
            lifetime = stored.lifetime
            # What depends on a connection, or on the descriptor itself, goes over with that.
            if lifetime.owner is None and not lifetime.watch_hangup:
                number = stored.fd.fileno()
                known[number] = stored
                if daemon.closer.is_quick_duplicate(number):
                    quick.add(stored.fd)
                fds.append(saved.SavedFd.of(stored, at - now))
                if not len(fds) % _DESCRIBED_AT_ONCE:
                    await trio.lowlevel.checkpoint()
    listeners = [listener.saved for listener in server.listeners]
    store = server.services.durability.store
    state = saved.SavedState(at, fds, listeners, store, invocation_id())
    return _in_memory(saved.encode(state)), known, quick


def _describe_rest(
    server: Predecessor, sessions: Sequence[Session], known: Mapping[int, StoredFd]
) -> tuple[SavedRest, list[int]]:
    """The rest of the daemon's state, and the numbers of all descriptors that belong to it."""
    daemon, durability = server.services.shared, server.services.durability
    at, now = time.monotonic(), daemon.clock()
    owners = {id(session.context): number for number, session in enumerate(sessions)}
    removed = [number for number, stored in known.items() if stored.removed]
    fds: list[int] = []
    added: list[saved.SavedFd] = []
    for fdset in daemon.store:
        is_behind = False  # behind one of the set that the newcomer does not know
        for number, stored in fdset.fds.items():
            fds.append(number)
            if known.get(number) is not stored:
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
