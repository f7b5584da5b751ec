"""The predecessor's side of a takeover.

First, the daemon sends the successor a description of the store, and goes on serving while the
successor gets ready.  Then the successor requests the rest, and the daemon is paused: no client is
accepted, no session reads, commands under way are finished.  The daemon describes its connections
and the changes made since, and sends all descriptors.  The successor sends CONFIRM once it has
restored everything.

One system call decides who owns everything: the sendmsg(2) of DONE.  Before it, the daemon owns
everything.  If the successor dies, hangs or gives up, DONE cannot be sent, and the daemon goes on,
after it has reported the outcome on the lifeline.  Every process with duplicates of its descriptors
closes the lifeline after them; the daemon waits for that, so a descriptor removed afterwards has no
duplicate left.  After DONE, the daemon serves no client.  The successor serves none until the
daemon has closed all its descriptors: again, a removed descriptor has no duplicate left.
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

import trio

from ...errors import GenericError
from ...fdsets import StoredFd
from ...kernel.fd import Fd
from ...kernel.files import memory_file
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

#: Name of the files in memory that describe the state (memfd_create(2)).
_STATE = "qmpfd-state"

#: Seconds between two checks whether all sessions are quiescent.
_REST_POLL = 0.001

#: Descriptors that are described, at some 10 us each, before other tasks get to run.
_DESCRIBED_AT_ONCE = 64


class Predecessor(Protocol):
    """The daemon that hands over: the part of :class:`..server.DaemonServer` used here."""

    services: Services
    listeners: Sequence[UnixListener]
    sessions: set[Session]
    takeover_scope: trio.CancelScope

    def drop_duplicates(self, quick: Set[Fd]) -> None:
        """Close the descriptors and connections that another daemon owns."""


@contextmanager
def _offered(server: Predecessor) -> Iterator[None]:
    """Be in a state OFFERED while the block runs, for :data:`TAKEOVER_TIMEOUT` at most.

    Raises:
        GenericError: another takeover is under way, or the daemon is ending.
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
async def _paused(server: Predecessor, successor: Session) -> AsyncGenerator[list[Session], None]:
    """Pause the daemon and hold the store's lock while the block runs; resume unless a successor
    has taken over.  Give all sessions but the successor's, once they are quiescent.
    """
    services, scope = server.services, server.takeover_scope
    services.lifecycle.handle(Event.PAUSE)
    pause = min(TAKEOVER_TIMEOUT, MAX_PAUSE)
    scope.deadline = min(scope.deadline, trio.current_time() + pause)
    for session in server.sessions:
        session.processor.pause()
    try:
        while True:
            # Sessions are quiescent within a few passes of the event loop, so polling is cheap.
            # Sleep before the check: a task that sends for a session may have been woken in this
            # pass, and still sends in the next.
            await trio.sleep(_REST_POLL)
            others = [session for session in server.sessions if session is not successor]
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
                session.processor.resume()
            services.shared.on_event()


async def hand_over(server: Predecessor, successor: Session) -> None:
    """Hand everything over to the client of *successor*; its connection has ended then.

    Args:
        server: the daemon.
        successor: its session.

    Raises:
        GenericError: another takeover is under way, or the daemon is ending, or out of descriptors
            or memory.
    """
    services, stream, pid = server.services, successor.stream, successor.peer.pid
    async with AsyncExitStack() as stack:
        stack.enter_context(_offered(server))
        with _as_generic_error():
            memory, known, quick = await _describe_store(server)
            stack.enter_context(memory)
            lifeline, other = map(stack.enter_context, socket.socketpair())
        theirs = stack.enter_context(Fd(other.detach()))
        lifeline.setblocking(False)
        try:
            with _as_generic_error():
                await successor.reply_to_takeover(memory, theirs)
                theirs.close()
                if await _receive(stream) == saved.NEXT:
                    _log.info("pid %d begins a takeover", pid)
                    others = await stack.enter_async_context(_paused(server, successor))
                    if await _hand_over_paused(server, others, known, stream):
                        with suppress(OSError):  # the successor has died just now
                            lifeline.send(saved.DONE)
                        _release_all(server, quick)
                        _log.info("pid %d has taken over", pid)
                        with trio.move_on_after(FORGET_TIMEOUT):
                            await services.durability.sync()  # wait for the fd store's closes too
                            await closed(services.shared.closer.all_closes)
        except trio.BrokenResourceError:
            pass  # the successor has closed the connection
        except GenericError as exc:  # the command was answered: only REFUSED can be sent
            _log.error("%s", exc)
        finally:
            if not services.lifecycle.handed_over:
                services.durability.log_handover(False)
                _log.warning("the takeover by pid %d failed: this daemon goes on", pid)
                with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                    stream.send_nowait(saved.REFUSED)
                theirs.close()
                with suppress(OSError):  # no process has the other end
                    lifeline.send(saved.REFUSED)
        if not services.lifecycle.handed_over:
            with trio.move_on_after(CLOSE_TIMEOUT):
                await trio.lowlevel.wait_readable(lifeline)  # EOF: no duplicates are left


async def _hand_over_paused(
    server: Predecessor, others: Sequence[Session], known: Mapping[int, StoredFd], stream: FdStream
) -> bool:
    """Send the rest of the state and all descriptors; return whether the successor owns them."""
    durability = server.services.durability
    # Before the successor has descriptors: its own fd store decides by the outcome.
    durability.log_handover(None)
    rest, fds = _describe_rest(server, others, known)
    with memory_file(_STATE, saved.pack(rest)) as memory:
        await stream.send_all(saved.MORE, [memory])
    for start in range(0, len(fds), SCM_MAX_FD):
        if await _receive(stream) != saved.NEXT:
            return False
        await stream.send_all(saved.MORE, fds[start : start + SCM_MAX_FD])
    return await _receive(stream) == saved.CONFIRM and _send_done(durability, stream)


def _send_done(durability: Durability, stream: FdStream) -> bool:
    """Send DONE; return whether that succeeded.

    A daemon with a journal records the handover before: if it dies between the two steps, the
    restarted daemon and the successor read there that the successor owns everything.
    """
    durability.log_handover(True)
    return stream.send_nowait(saved.DONE) > 0


def _release_all(server: Predecessor, quick: Set[Fd]) -> None:
    """Close everything after a takeover, without shutdown(2) and without events, and end."""
    services = server.services
    services.lifecycle.handle(Event.HAND_OVER)
    services.durability.release_all(quick)
    services.shared.audit = None  # no audit lines: the successor still has the descriptors
    server.drop_duplicates(quick)
    for listener in server.listeners:
        listener.abandon()
        listener.close()


@contextmanager
def _as_generic_error() -> Iterator[None]:
    """Convert an error of the block to one for the successor.

    Raises:
        GenericError: the daemon is out of descriptors or memory.
    """
    try:
        yield
    except (OSError, MemoryError) as exc:
        reason = getattr(exc, "strerror", None) or os.strerror(errno.ENOMEM)
        raise GenericError(f"The daemon cannot hand over: {reason}") from None


async def _receive(stream: FdStream) -> bytes:
    """Receive the next byte of the successor; b"" at EOF."""
    while True:  # noqa: ASYNC913 - each way round has a checkpoint
        try:
            return stream.socket.recv(1)
        except BlockingIOError:
            await stream.wait_readable()
        except ConnectionError:
            return b""


async def _describe_store(server: Predecessor) -> tuple[Fd, dict[int, StoredFd], set[Fd]]:
    """Describe the store, while clients are served and it may change.

    Returns:
        A file in memory with the description; the described entries by number; and the descriptors
        whose duplicates can be closed without blocking.
    """
    daemon = server.services.shared
    at, now = time.monotonic(), daemon.clock()
    fds: list[saved.SavedFd] = []
    known: dict[int, StoredFd] = {}
    quick: set[Fd] = set()
    for fdset in daemon.store.iter_stable():
        for stored in fdset.iter_stable(now):
            lifetime = stored.lifetime
            # Lifetimes that depend on a session or on a hang-up are handed over by SavedRest.
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
    return memory_file(_STATE, saved.encode(state)), known, quick


def _describe_rest(
    server: Predecessor, sessions: Sequence[Session], known: Mapping[int, StoredFd]
) -> tuple[SavedRest, list[int]]:
    """Describe the rest of the daemon's state; return it, and the numbers of all descriptors."""
    daemon, durability = server.services.shared, server.services.durability
    at, now = time.monotonic(), daemon.clock()
    owners = {id(session.context): number for number, session in enumerate(sessions)}
    removed = [number for number, stored in known.items() if stored.removed]
    fds: list[int] = []
    added: list[saved.SavedFd] = []
    for fdset in daemon.store:
        is_behind = False  # after an entry of the set that the successor does not know
        for number, stored in fdset.fds.items():
            fds.append(number)
            if known.get(number) is not stored:
                is_behind = True
            elif is_behind:  # the successor stores it again: the order in the set stays the same
                removed.append(number)
            else:
                continue
            owner = stored.lifetime.owner
            # -1: the lifetime of a descriptor of the successor's own session has ended with that.
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
