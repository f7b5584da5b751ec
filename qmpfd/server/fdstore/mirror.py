"""Mirror of the store in the fd store, a second copy that survives a crash of this process.

The fd store is systemd's, or that of the parent of ``serve --supervise``, which speaks the same
protocol (sd_pid_notify_with_fds(3)).  Each descriptor is stored there under a name of its own.  The
journal, which is stored there as well, describes them.

No client is told of a change that a crash would take back.  A change is made, written to the
journal and sent without waiting.  Replies and events then wait in :meth:`sync` until the fd store
has acknowledged the change, see :mod:`qmpfd.server.fdstore.barrier_link`.

A removed descriptor is closed here after the fd store has removed its duplicate.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from typing import NamedTuple

import trio

from ...errors import GenericError
from ...fdsets import FdSets, StoredFd
from ...kernel.close_pool import ClosePool
from ...kernel.fd import Fd
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

#: Places of the fd store for the lifeline of a takeover, and the predecessor's journal.
_TAKEOVER_PLACES = 2

_DROPPED = (
    "the service manager dropped one (either NotifyAccess= allows main only and this is not the "
    "main process of the service, or FileDescriptorStoreMax= is less than $FDSTORE)"
)


class FdStoreConfig(NamedTuple):
    """An fd store: systemd's, or the supervising parent's.

    Args:
        notifier: socket to the fd store; the caller keeps it open until the daemon has ended.
        size: number of descriptors that the fd store keeps at most.
        descriptions: finds descriptors of the same open file description (kcmp(2)), of which
            systemd's fd store keeps one only; None with a parent, which keeps all.
    """

    notifier: Notifier
    size: int
    descriptions: Descriptions | None


class FdStoreMirror:
    """Mirror of the store in the fd store: systemd's, or the supervising parent's.

    Args:
        fd_store: the fd store.
        closer: closes removed descriptors.
    """

    def __init__(self, fd_store: FdStoreConfig, closer: ClosePool) -> None:
        self._link = BarrierLink(fd_store.notifier, self._write, self._ended)
        # Methods of Durability that are the link's.
        self.sync = self._link.sync
        self.on_synced = self._link.on_synced
        self.push = self._link.start
        self._journals = JournalWriter(self._link, self._snapshot)
        #: Whether the fd store is the supervising parent's, not systemd's.
        self.is_parent = fd_store.notifier.is_parent
        self._closer = closer
        self._size = fd_store.size
        self._refusal = ""  # why the fd store is unusable, and stored descriptors may be lost
        self._kept = KeptFds(self._link, fd_store.descriptions)
        # Evidence of what systemd's fd store keeps; None with a parent, and before the start.
        self._evidence: Evidence | None = None
        #: Called with stored descriptors for which systemd's fd store has no room.
        self.on_refused: Callable[[list[StoredFd]], object] = lambda _: None
        self.unproven: Unproven | None = None
        self._listeners = KeptListeners(self._link, self._kept, self._journals, self.is_parent)
        self._store = FdSets()
        self._lifeline: Fd | None = None  # of the takeover by this daemon, until it is confirmed

    @property
    def is_over(self) -> bool:
        """Whether the fd store is unusable, and stored descriptors may be lost."""
        return bool(self._refusal)

    @property
    def is_ours(self) -> bool:
        """Whether this daemon owns the store: not before a takeover by it is confirmed."""
        return self._lifeline is None

    @property
    def _capacity(self) -> int:
        """Number of descriptors that can be stored.  A parent has extra places for a takeover."""
        spare = RESERVED_PLACES + (0 if self.is_parent or self.is_ours else _TAKEOVER_PLACES)
        return min(self._size - spare, Names.MOST)

    def _distrust(self, reason: str) -> None:
        """Log that the fd store does not keep descriptors, and refuse new ones from here on.
        Removals are still sent.
        """
        if not self._refusal:
            _log.error("the descriptors are no longer kept safe: %s; more are refused", reason)
            self._refusal = reason

    # -- called by the commands ----------------------------------------------------------------

    def check_quota(self, count: int, opaque: str | None) -> None:
        """Check that the fd store and the journal have room for *count* more descriptors, each with
        that opaque text.

        Raises:
            GenericError: they have not; the text says why.
        """
        if self._refusal:
            raise GenericError(f"The file descriptor cannot be kept safe: {self._refusal}")
        capacity = self._capacity
        if self._kept.names + count > capacity:
            raise GenericError(
                f"Too many file descriptors: the limit of those kept safe is {capacity}"
            )
        # Reserve the records of removal of all stored descriptors too: a removal must not fail.
        size = count * (4 * len(opaque or "") + RECORD_BYTES)
        try:
            self._journals.reserve(size, (len(self._kept.by_number) + count) * REMOVAL_BYTES)
            if self._evidence is not None:
                self._evidence.prepare()
        except OSError as exc:
            raise GenericError(f"The file descriptor cannot be kept safe: {exc.strerror}") from None

    def added(self, stored: StoredFd) -> None:
        """Mirror a stored descriptor, unless its lifetime ends with its connection."""
        if not self._refusal and stored.lifetime.owner is None:
            name = self._kept.keep(stored.fd.number, stored.fd)
            self._journals.note(self._journals.added(name, stored))
            if self._evidence is not None:
                self.unproven = self._evidence.added(stored)

    def removed(self, stored: StoredFd) -> None:
        """Remove a descriptor, which is still open here, from the fd store."""
        number = stored.fd.number
        if number not in self._kept.by_number:
            return
        self._journals.note(Removed(number))
        name = self._kept.discard(number)
        if name is not None:
            # systemd closes in a thread.  The parent has to be told if the close may block; such a
            # descriptor is closed here only after the parent has closed its duplicate.
            if self.is_parent and self._closer.may_block(stored.fd):
                lane = self._closer.lane(stored.fd, stored.fd.uid)
                self._closer.close_after(stored.fd, self._link.remove_slowly(name, lane))
            else:
                self._link.remove(name)

    # -- waiting for acknowledgement -----------------------------------------------------------

    @property
    def is_synced(self) -> bool:
        """Whether the fd store has acknowledged every change."""
        return self._link.is_synced

    def close_after_sync(self, fds: list[Fd], uid: int | None = None) -> None:
        """Close removed descriptors, once the fd store has removed its duplicates.

        Args:
            fds: the descriptors; owned from here on.
            uid: the user whose quota they are charged to until they are closed.
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
            self._evidence.queue_probes()

    @property
    def store(self) -> str | None:
        """Invocation id of the service that systemd's fd store belongs to (systemd.exec(5))."""
        return None if self.is_parent else invocation_id()

    @property
    def journal(self) -> Fd | None:
        """The journal, in which a successor reads whether the takeover was completed."""
        return None if self._link.is_over else self._journals.fd

    # -- its life ------------------------------------------------------------------------------

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[None, None]:
        """Run the tasks of the mirror while the block runs."""
        async with trio.open_nursery() as nursery, self._link.running():
            self._nursery = nursery
            yield
            nursery.cancel_scope.cancel()

    def claim(self, store: FdSets, recovered: Recovered, lifeline: Fd | None) -> None:
        """Adopt the entries in the fd store from before this start.  :meth:`start` sends them.

        With a parent, the whole store is queued here: in a takeover, while the predecessor still
        serves, these are placeholders.  With systemd that waits for :meth:`start`, as each open
        file description has to be compared with all others.

        Args:
            store: the store to mirror.
            recovered: state and descriptors from the fd store.
            lifeline: the lifeline of a takeover that is not confirmed yet, or None.

        Raises:
            OSError: the process is out of descriptors or memory for the journal.
        """
        self._store, self._lifeline = store, lifeline
        self._journals.generation = recovered.generation
        self._kept.claim(recovered)
        if self.is_parent:
            self._keep_all(recovered)

    def _keep_all(self, recovered: Recovered) -> None:
        if self._lifeline is not None:  # stored first, as a store that is dropped closes it last
            self._link.store(LIFELINE, self._lifeline)
        for fdset in self._store:
            for number, stored in fdset.fds.items():
                if stored.lifetime.owner is None:
                    self._kept.keep(number, stored.fd, recovered.names.get(number))
        self._journals.begin()  # sent last: entries without a valid journal are ignored

    async def start(
        self, listeners: Iterable[UnixListener], recovered: Recovered, previous: Fd | None
    ) -> None:
        """Send the whole store to the fd store, before any client is served.

        Args:
            listeners: listening sockets to store as well.
            recovered: state and descriptors from the fd store.
            previous: the predecessor's journal in a takeover, or None.

        Raises:
            GenericError: in a takeover, the fd store has no room for all descriptors.
            OSError: the process is out of descriptors or memory for the journal.
        """
        self._link.open()
        if previous is not None:
            self._link.store(PREVIOUS, previous)
        if not self.is_parent:
            await self.sync()  # wait until stale entries have made room
            self._evidence = Evidence(  # stores its sentinel first: systemd drops the oldest first
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
            ):  # a socket for which there is no room can be bound again after a crash
                self._listeners.add(listener, recovered.names.get(number))
        if self._kept.names > self._capacity:
            too_many = (
                f"{self._kept.names} descriptors are more than the {self._capacity} that can be "
                "kept safe"
            )
            if not self.is_ours:  # the takeover fails, and the predecessor goes on
                raise GenericError(too_many)
            # Recovered descriptors stay in the fd store and in this process.
            self._distrust(too_many)
        if self.is_ours:
            self._listeners.send_files()
        if self._evidence is not None:
            # 2: journal and sentinel
            others = 2 + (not self.is_ours) + (previous is not None) + self._kept.unnumbered
            size = await self._evidence.find_size(self._size, others)
            if size is None:
                self._distrust(_DROPPED)
            else:
                self._size = size
                self._nursery.start_soon(self._evidence.watch)
        await self.sync()
        if self.is_over:  # remove nothing: the old entries may be the only copy
            return
        self._kept.remove_former()
        await self.sync()

    def confirm(self) -> None:
        """Record that the takeover by this daemon is complete."""
        self._lifeline = None
        self._listeners.send_files()
        self._note(Confirmed(), PREVIOUS, LIFELINE)

    def log_handover(self, handed_over: bool | None) -> None:
        """Record the outcome of a takeover by a successor: it reads the journal if we die now."""
        self._listeners.send_files(ours=not handed_over)
        self._note(HandedOver(handed_over))

    def release_all(self, quick: Iterable[Fd] = ()) -> None:
        """Remove everything from the fd store, and record no more changes.  If this process dies
        halfway, the journal, which is removed last, says that the rest is not to be restored.

        Args:
            quick: descriptors whose close(2) cannot block.
        """
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
        if not self.is_ours:  # the lifeline last: the predecessor waits for its EOF to go on
            self._link.remove(PREVIOUS, LIFELINE)
        self._link.push()

    def finish(self) -> None:
        """Remove the listening sockets at the daemon's end.  Stored descriptors stay in systemd's
        fd store: the service may be started again.
        """
        self._listeners.remove_former()

    def _note(self, record: Record, *removed: str) -> None:
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
