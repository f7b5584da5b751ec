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
from functools import partial
from typing import NamedTuple

import trio

from ...errors import GenericError
from ...fdsets import FdSet, FdSets, StoredFd
from ...kernel.close_pool import ClosePool
from ...kernel.fd import Fd, InFlightProbe
from ...kernel.file_descriptions import Descriptions
from ...kernel.systemd import Notifier, invocation_id
from ...limits import JOURNAL_FORMAT, RESERVED_PLACES
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
from .names import LIFELINE, PREVIOUS, Names
from .recover import Recovered
from .sentinel import Evidence

_log = logging.getLogger("qmpfd")

#: Places of the fd store for the lifeline of a takeover, and the old daemon's journal.
_TAKEOVER_PLACES = 2

_DROPPED = (
    "the service manager dropped one (either NotifyAccess= allows main only and this is not the "
    "main process of the service, or FileDescriptorStoreMax= is less than $FDSTORE)"
)


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
        #: Whether the parent of ``serve --supervise`` has it, and no service manager.
        self.is_parent = keeping.notifier.is_parent
        self._closer = closer
        self._size = keeping.size
        self._refusal = ""  # why nothing more is kept, and what was kept may be lost
        self._kept = KeptFds(self._link, keeping.descriptions)
        # Where it is a service manager, what shows what it keeps.
        self._evidence: Evidence | None = None
        #: Told what a service manager has no room for.
        self.on_refused: Callable[[list[StoredFd]], object] = lambda _: None
        self.unproven: Unproven | None = None
        self._listeners = KeptListeners(self._link, self._kept, self._journals, self.is_parent)
        self._store = FdSets()
        self._lifeline: Fd | None = None  # of the takeover under way
        #: Tells whether descriptors can be sent at all, where that is not sure.
        self.in_flight_probe: InFlightProbe | None = None

    @property
    def is_over(self) -> bool:
        """Whether nothing more is kept, and what was kept may be lost."""
        return bool(self._refusal)

    @property
    def is_ours(self) -> bool:
        """Whether what is kept is not that of an old daemon which may go on."""
        return self._lifeline is None

    @property
    def _capacity(self) -> int:
        """How many descriptors can be kept.  The parent has places to spare for a takeover's."""
        spare = RESERVED_PLACES + (0 if self.is_parent or self.is_ours else _TAKEOVER_PLACES)
        return min(self._size - spare, Names.MOST)

    def _distrust(self, reason: str) -> None:
        """Say that what is sent is not kept: no more is sent, but what is removed is removed there
        too, if somebody is there.
        """
        if not self._refusal:
            _log.error("the descriptors are no longer kept safe: %s; more are refused", reason)
            self._refusal = reason

    # -- what the commands see -----------------------------------------------------------------

    def check_quota(self, count: int, opaque: str | None) -> None:
        """Refuse to add *count* more descriptors, each with that opaque text, if they cannot be
        kept.

        Raises:
            GenericError: saying why.
        """
        if self._refusal:
            raise GenericError(f"The file descriptor cannot be kept safe: {self._refusal}")
        capacity = self._capacity
        if self._kept.names + count > capacity:
            raise GenericError(
                f"Too many file descriptors: the limit of those kept safe is {capacity}"
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
        if not self._refusal and stored.lifetime.owner is None:
            name = self._kept.keep(stored.fd.number, stored.fd)
            self._journals.note(self._journals.added(name, stored))
            if self._evidence is not None:
                self.unproven = self._evidence.added(stored)

    def removed(self, stored: StoredFd) -> None:
        """A descriptor was taken out of the store; it is still open."""
        number = stored.fd.number
        if number not in self._kept.by_number:
            return
        self._journals.note(Removed(number))
        name = self._kept.discard(number)
        if name is not None:
            # A service manager closes in a thread anyway; the parent has to be told if the close
            # may block, and the descriptor is closed here after it was closed there.
            if self.is_parent and self._closer.may_block(stored.fd):
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
            self._evidence.show()

    @property
    def store(self) -> str | None:
        """Which service's it is, where it is a service manager's store (systemd.exec(5))."""
        return None if self.is_parent else invocation_id()

    @property
    def journal(self) -> Fd | None:
        """The journal, for a successor: it tells whether the takeover was done."""
        return None if self._link.is_over else self._journals.fd

    # -- its life ------------------------------------------------------------------------------

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[None, None]:
        """Talk to the fd store while the block runs."""
        async with trio.open_nursery() as nursery, self._link.running():
            self._nursery = nursery
            yield
            nursery.cancel_scope.cancel()

    def claim(self, store: FdSets, recovered: Recovered, lifeline: Fd | None) -> None:
        """Go on with what is there.  Nothing is sent before :meth:`start`.

        With a parent, all that is stored is written down: it may be the places of what a takeover
        brings, while the old daemon serves, and changes count from here on.  Of a service manager's
        store, each open file description has to be compared with all others, so that waits for
        :meth:`start`.

        Args:
            store: where the changes come from, from here on.
            recovered: what is there from before.
            lifeline: of a takeover, before it is confirmed; None if all this is ours.

        Raises:
            OSError: there is no descriptor, or no memory, for the journal.
        """
        self._store, self._lifeline = store, lifeline
        self._journals.generation = recovered.generation
        self._kept.claim(recovered)
        if self.is_parent:
            self._keep_all(recovered)

    def _keep_all(self, recovered: Recovered) -> None:
        if self._lifeline is not None:  # first, as it is closed last
            self._link.store(LIFELINE, self._lifeline)
        for fdset in self._store:
            for number, stored in fdset.fds.items():
                if stored.lifetime.owner is None:
                    self._kept.keep(number, stored.fd, recovered.names.get(number))
        self._journals.begin()  # behind them: without it, they count for nothing

    async def start(
        self, listeners: Iterable[UnixListener], recovered: Recovered, previous: Fd | None
    ) -> None:
        """Have all of it kept, before anybody is served.

        Args:
            listeners: the sockets that are to be kept.
            recovered: what is there from before.
            previous: the journal of the daemon that all this is of, if there is one.

        Raises:
            GenericError: it is more than can be kept.
            OSError: there is no descriptor, or no memory, for the journal.
        """
        self._link.open()
        if previous is not None:
            self._link.store(PREVIOUS, previous)
        if not self.is_parent:
            await self.sync()  # the places of what is stale are needed
            self._evidence = Evidence(  # the oldest, which is dropped first
                self._link,
                self._kept,
                self._journals,
                recovered.sentinel,
                partial(self._distrust, _DROPPED),
                self.on_refused,
            )
            self._keep_all(recovered)
        for listener in listeners:
            number = listener.socket.fileno()
            if (
                number in recovered.names or self._kept.names < self._capacity
            ):  # it can be made anew
                self._listeners.add(listener, recovered.names.get(number))
        if self._kept.names > self._capacity:
            too_many = (
                f"{self._kept.names} descriptors are more than the {self._capacity} that can be "
                "kept safe"
            )
            if not self.is_ours:  # whose the descriptors are goes on
                raise GenericError(too_many)
            # What came back stays where it is, and here, until there are fewer, or more room.
            self._distrust(too_many)
        if self.is_ours:
            self._listeners.tell_files()
        if self._evidence is not None and not await self._evidence.is_stored():
            self._distrust(_DROPPED)
        await self.sync()
        if self.is_over:  # remove nothing: what is there may be all there is
            return
        self._kept.remove_former()
        await self.sync()
        if self._evidence is not None:
            self._nursery.start_soon(self._evidence.watch)
            others = 2 + (not self.is_ours) + (previous is not None)  # with journal and sentinel
            self._size = await self._evidence.find_size(self._size, others)

    def confirm(self) -> None:
        """A takeover is done: all this is ours."""
        self._lifeline = None
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
        if self._link.is_over:
            return
        self._journals.note(HandedOver(True))
        if self._evidence is not None:
            self._evidence.forget()
        known = {fd.number for fd in quick}
        names = []
        for name, number in self._kept.by_name().items():
            if self.is_parent and number not in known and self._closer.may_block(number):
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
        if not self._link.is_over:
            self._listeners.remove_former()

    def _note(self, record: Record, *removed: str) -> None:
        if not self._link.is_over:
            self._journals.note(record)
            self._link.remove(*removed)
            self._link.push()

    def _ended(self, reason: str) -> None:
        if reason:
            self._distrust(reason)
        if self._evidence is not None:
            self._evidence.close()
        self._kept.clear()
        self._journals.close()
