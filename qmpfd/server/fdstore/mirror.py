"""Keeps a second copy of what is stored where a crash does not reach it.

That is with whoever started the daemon: systemd's file-descriptor store, or the parent of ``serve
--supervise``, which speaks the same protocol (sd_pid_notify_with_fds(3)).  Each descriptor goes
there under a name of its own; what it is stands in the journal, which is there as well.

The rule is that nobody is told of what a crash would take back.  A change is made, written to the
journal and sent off without waiting; then whoever has something to say waits in :meth:`sync`
until the other side has it, see :mod:`qmpfd.server.fdstore.barrier_link`.

A removed descriptor is closed here after it was closed there.
"""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from enum import Enum, auto
from functools import partial
from typing import NamedTuple

import trio

from ...errors import GenericError
from ...fdsets import FdSet, FdSets, StoredFd
from ...kernel.close_pool import ClosePool
from ...kernel.fd import Fd, InFlightProbe
from ...kernel.file_descriptions import Descriptions
from ...kernel.systemd import Notifier, invocation_id
from ...limits import JOURNAL_FORMAT, KEEPER_SPARE
from ..durability import Unproven
from ..listen.listener import UnixListener
from .barrier_link import BarrierLink
from .journal import (
    RECORD_BYTES,
    REMOVAL_BYTES,
    Confirmed,
    HandedOver,
    Record,
    Removed,
    SnapshotHeader,
)
from .journal_writer import JournalWriter
from .kept import KeptFds
from .listeners import KeptListeners
from .names import LIFELINE, PIPES, PREVIOUS, Names
from .recover import Holdings
from .room import Room
from .sentinel import Evidence

_log = logging.getLogger("qmpfd")

#: Places of the fd store for the lifeline of a takeover, and the old daemon's journal.
_TAKEOVER_PLACES = 2

_DROPPED = (
    "the descriptors are no longer kept safe: the service manager dropped one (either "
    "NotifyAccess= allows main only and this is not the main process of the service, or "
    "FileDescriptorStoreMax= is less than $FDSTORE)"
)


class State(Enum):
    """What becomes of what is stored."""

    KEPT = auto()  #: it is kept
    DISTRUSTED = auto()  #: it may not be: no more is sent, but what is removed is removed there too
    OVER = auto()  #: nobody is there to keep it

    # As of any object: that of Enum is a Python function.
    __hash__ = object.__hash__


#: What the states become when the service manager does not keep what it is sent, and when the link
#: has ended; a state that is not here stays.
_ON_DROPPED = {State.KEPT: State.DISTRUSTED}
_ON_END = dict.fromkeys(State, State.OVER)

_KEPT, _OVER = State.KEPT, State.OVER  # found faster than a member of an enumeration


class FdStoreConfig(NamedTuple):
    """Who keeps a second copy.

    Args:
        notifier: the connection to it; the caller's, until the daemon has ended.
        size: how many descriptors it keeps.
        descriptions: where it keeps one descriptor of each open file description only, what tells
            which are of the same; None where it keeps all.
    """

    notifier: Notifier
    size: int
    descriptions: Descriptions | None


class FdStoreMirror:
    """Whoever keeps the second copy, as seen from here.

    Args:
        keeping: how it is reached, and what it does.
        closer: closes what was removed.
    """

    def __init__(self, keeping: FdStoreConfig, closer: ClosePool) -> None:
        self._link = BarrierLink(keeping.notifier, self._write, self._ended)
        self._journals = JournalWriter(self._link, self._snapshot)
        self._is_parent = keeping.notifier.is_parent
        self._closer = closer
        self._size = keeping.size
        self._capacity = min(keeping.size - KEEPER_SPARE, Names.MOST)
        self._state = State.KEPT
        self._kept = KeptFds(self._link, keeping.descriptions)
        # Where it is a service manager, what shows what it keeps.
        self._evidence: Evidence | None = None
        self.room = Room(self._kept, self._journals)
        self.unproven: Unproven | None = None
        self._listeners = KeptListeners(self._link, self._kept, self._journals, self._is_parent)
        self._store = FdSets()
        self._lifeline: Fd | None = None  # of the takeover under way
        #: Tells whether descriptors can be sent at all, where that is not sure.
        self.in_flight_probe: InFlightProbe | None = None

    @property
    def is_over(self) -> bool:
        """Whether nothing more is kept, and what was kept may be lost."""
        return self._state is not State.KEPT

    def _distrust(self, reason: str) -> None:
        """Say that what is sent is not kept."""
        if self._state is State.KEPT:
            _log.error("%s; more are refused", reason)
        self._state = _ON_DROPPED.get(self._state, self._state)

    # -- what the commands see -----------------------------------------------------------------

    def check_quota(self, count: int, opaque: str | None) -> None:
        """Refuse to add *count* more descriptors, each with that opaque text, if they cannot be
        kept.

        Raises:
            GenericError: saying why.
        """
        if self._state is not _KEPT:
            raise GenericError(
                "The file descriptor cannot be kept safe: the parent of this daemon is gone "
                "(qmpfd serve --takeover --supervise starts a new one)"
                if self._is_parent
                else "The file descriptor cannot be kept safe: the service manager drops it"
            )
        if self._kept.names + count > self._capacity:
            raise GenericError(
                f"Too many file descriptors: the limit of those kept safe is {self._capacity}"
            )
        if self.in_flight_probe is not None and self.in_flight_probe.exhausted():
            # It would wait for whoever hoards them, and every later change would wait behind it.
            raise GenericError(
                "The file descriptor cannot be kept safe: too many that processes of "
                f"uid {os.geteuid()} have sent wait to be received"
            )
        # Of each that is there, the removal can be written too.
        size = count * (4 * len(opaque or "") + RECORD_BYTES)
        try:
            self._journals.reserve(size, (len(self._kept.by_number) + count) * REMOVAL_BYTES)
            if self._evidence is not None:
                self._evidence.prepare()
        except OSError as exc:
            raise GenericError(f"The file descriptor cannot be kept safe: {exc.strerror}") from None

    def added(self, fdset: FdSet, stored: StoredFd) -> None:
        """A descriptor was stored: keep it too, unless it ends with its connection anyway."""
        if self._state is _KEPT and stored.lifetime.owner is None:
            name = self._kept.keep(stored.fd.number, stored.fd)
            self._journals.note(self._journals.added(name, stored))
            if self._evidence is not None:
                self.unproven = self.room.put(stored)

    def removed(self, stored: StoredFd) -> None:
        """A descriptor was taken out of the store; it is still open."""
        number = stored.fd.number
        if self._state is _OVER or number not in self._kept.by_number:
            return
        self._journals.note(Removed(number))
        name = self._kept.discard(number)
        if name is not None:
            # A service manager closes in a thread anyway; the parent has to be told if the close
            # may block, and the descriptor is closed here after it was closed there.
            if self._is_parent and self._closer.may_block(stored.fd):
                lane = self._closer.lane(stored.fd, stored.fd.uid)
                self._closer.close_after(stored.fd, self._link.remove_slowly(name, lane))
            else:
                self._link.remove(name)

    # -- waiting until it is safe --------------------------------------------------------------

    @property
    def is_synced(self) -> bool:
        """Whether all that was changed is safe."""
        return self._link.is_synced

    async def sync(self) -> None:
        """Wait until all that was changed so far is safe; without a checkpoint if it is."""
        await self._link.sync()

    def on_synced(self, action: Callable[[], object]) -> None:
        """Call *action* once all that was changed so far is safe, or this has ended."""
        self._link.on_synced(action)

    def push(self) -> None:
        """See to it that all that was changed so far gets safe."""
        self._link.start()

    def close_after_sync(self, fds: list[Fd], uid: int | None = None) -> None:
        """Close what was removed, once it is gone from the fd store.

        Args:
            fds: the descriptors; owned from here on.
            uid: the user whom they count for until they are closed.
        """
        if self.is_synced:
            self._closer.close(fds, uid)
        else:
            self._link.on_synced(partial(self._closer.close, fds, uid))
            self._link.push()

    # -- the journal ---------------------------------------------------------------------------

    def _snapshot(self, generation: int) -> Iterator[Record]:
        yield SnapshotHeader(JOURNAL_FORMAT, generation, None if self.is_ours else LIFELINE)
        yield from self._listeners.records()
        for fdset in self._store:
            for number, stored in fdset.fds.items():
                if number in self._kept.by_number:
                    yield self._journals.added(self._kept.by_number[number], stored)

    def _write(self, barrier: bool) -> None:
        self._journals.write()
        if barrier and self._evidence is not None:
            self.room.show(self._evidence)

    @property
    def store(self) -> str | None:
        """Which service's it is, where it is a service manager's store (systemd.exec(5))."""
        return None if self._is_parent else invocation_id()

    @property
    def journal(self) -> Fd | None:
        """The journal, for a successor: it tells whether the takeover was done."""
        return None if self._state is State.OVER else self._journals.fd

    # -- its life ------------------------------------------------------------------------------

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[None, None]:
        """Talk to the fd store while the block runs."""
        async with trio.open_nursery() as nursery, self._link.running():
            self._nursery = nursery
            yield
            nursery.cancel_scope.cancel()

    async def _find_size(self, evidence: Evidence, taken: int) -> None:
        """Find out whether it takes as many descriptors as $FDSTORE says, beside those *taken*."""
        room, is_all = await evidence.count_room(self._size - taken)
        self.room.begin(self._kept.names + room)
        if is_all:
            self._size = taken + room
            self._capacity = min(self._capacity, self._size - KEEPER_SPARE)
            _log.warning(
                "the service manager stores %d descriptors, fewer than $FDSTORE: more are "
                "refused (FileDescriptorStoreMax=)",
                self._size,
            )

    def prepare(self, store: FdSets, holdings: Holdings, lifeline: Fd) -> bool:
        """Write down what a takeover brings, before it has come: while the old daemon serves.
        Nothing is sent before :meth:`start`, and changes until then count.

        Args:
            store: where the changes come from, from here on.
            holdings: what is there from before.
            lifeline: of the takeover.  The parent gets it first, and closes it last.

        Returns:
            Whether that is possible: of a service manager's store, each open file description has
            to be compared with all others, and what is stored here are placeholders.

        Raises:
            OSError: there is no descriptor, or no memory, for the journal.
        """
        if not self._is_parent:
            return False
        self._claim(store, holdings)
        self._begin_takeover(lifeline)
        self._keep_all(holdings)
        self._journals.begin()
        return True

    def _begin_takeover(self, lifeline: Fd) -> None:
        self._lifeline = lifeline
        if not self._is_parent:  # which has places to spare for two pipes, and gets none
            self._capacity -= _TAKEOVER_PLACES
        self._link.store(LIFELINE, lifeline)

    def _claim(self, store: FdSets, holdings: Holdings) -> None:
        self._store = store
        self._journals.generation = holdings.generation
        self._kept.claim({*holdings.names.values(), *holdings.others})
        if not holdings.valid:  # before anything new could have the same names
            self._link.remove(*holdings.others)
        pipes = [name for name in holdings.others if name.startswith(PIPES)]
        self._link.remove(*pipes)  # the journal needs the place

    def _keep_all(self, holdings: Holdings) -> None:
        for fdset in self._store:
            for number, stored in fdset.fds.items():
                if stored.lifetime.owner is None:
                    self._kept.keep(number, stored.fd, holdings.names.get(number))

    async def start(
        self,
        store: FdSets,
        listeners: Iterable[UnixListener],
        holdings: Holdings,
        lifeline: Fd | None,
        previous: Fd | None,
    ) -> None:
        """Have all of it kept, before anybody is served.

        Args:
            store: where the changes come from, from here on.
            listeners: the sockets that are to be kept.
            holdings: what is there from before.
            lifeline: of the takeover, before it is confirmed; None if all this is ours.
            previous: the journal of the daemon that all this is of, if there is one.

        Raises:
            GenericError: it is more than can be kept.
            OSError: there is no descriptor, or no memory, for the journal.
        """
        prepared = not self.is_ours
        self._link.open()
        if not prepared:
            self._claim(store, holdings)
            await self.sync()  # the places are needed
        if not self._is_parent:  # the oldest, which is dropped first
            drop, generation = partial(self._distrust, _DROPPED), holdings.generation + 1
            self._evidence = Evidence(
                self._link, generation, holdings.sentinel, drop, self.room.on_shown
            )
        if lifeline is not None and not prepared:  # before all that it is about
            self._begin_takeover(lifeline)
        if previous is not None:
            self._link.store(PREVIOUS, previous)
        if not prepared:
            self._keep_all(holdings)
        for listener in listeners:
            number = listener.socket.fileno()
            if number in holdings.names or self._kept.names < self._capacity:  # it can be made anew
                self._listeners.add(listener, holdings.names.get(number))
        if self._kept.names > self._capacity:
            too_many = (
                f"{self._kept.names} descriptors are more than the {self._capacity} that can be "
                "kept safe"
            )
            if not self.is_ours:  # whose the descriptors are goes on
                raise GenericError(too_many)
            # What came back stays where it is, and here, until there are fewer, or more room.
            self._distrust(too_many)
        if prepared:  # it has begun, and does not count before the takeover is confirmed
            for record in self._listeners.records():
                self._journals.note(record)
        else:  # the journal comes last: without it, the others count for nothing
            self._journals.begin()
        if self.is_ours:
            self._listeners.tell_files()
        if self._evidence is not None and not await self._evidence.is_stored():
            self._distrust(_DROPPED)
        await self.sync()
        if self.is_over:  # remove nothing: what is there may be all there is
            return
        if holdings.valid:
            self._link.remove(*(name for name in holdings.others if not name.startswith(PIPES)))
        self._link.remove(*(set(holdings.names.values()) - self._kept.by_name().keys()))
        await self.sync()
        if self._evidence is not None:
            self._nursery.start_soon(self._evidence.watch)
            taken = self._kept.names + 2 + (not self.is_ours) + (previous is not None)
            await self._find_size(self._evidence, taken)

    @property
    def is_ours(self) -> bool:
        """Whether what is kept is not that of an old daemon which may go on."""
        return self._lifeline is None

    def confirm(self) -> None:
        """A takeover is done: all this is ours."""
        self._lifeline = None
        if not self._is_parent:
            self._capacity += _TAKEOVER_PLACES
        self._listeners.tell_files()
        self._note(Confirmed(), PREVIOUS, LIFELINE)

    def log_handover(self, handed_over: bool | None) -> None:
        """A successor is about to have it all, or will not: for whoever asks if we die now."""
        self._listeners.tell_files(ours=not handed_over)
        self._note(HandedOver(handed_over))

    def release_all(self, quick: Iterable[Fd] = ()) -> None:
        """What is kept is to be let go, also if we die this moment; note no more changes.  The
        journal is closed last: it says that the rest is nobody's.

        Args:
            quick: descriptors that are closed without waiting for anybody.
        """
        if self._state is State.OVER:
            return
        self._journals.note(HandedOver(True))
        if self._evidence is not None:
            self._evidence.forget()
        known = {fd.number for fd in quick}
        names = []
        for name, number in self._kept.by_name().items():
            if self._is_parent and number not in known and self._closer.may_block(number):
                self._link.remove_slowly(name, self._closer.lane(number))
            else:
                names.append(name)
        self._link.remove(*names)
        self._kept.clear()
        self._journals.forget()
        if not self.is_ours:  # the lifeline comes last: then the old daemon goes on
            self._link.remove(PREVIOUS, LIFELINE)
        self._link.push()

    def finish(self) -> None:
        """The daemon ends.  What is stored stays with a service manager, which may start another
        daemon; the listening sockets do not.
        """
        if self._state is not State.OVER:
            self._listeners.finish()

    def _note(self, record: Record, *removed: str) -> None:
        if self._state is not State.OVER:
            self._journals.note(record)
            self._link.remove(*removed)
            self._link.push()

    def _ended(self) -> None:
        self._state = _ON_END[self._state]
        if self._evidence is not None:
            self._evidence.close()
        self._kept.clear()
        self._journals.close()
