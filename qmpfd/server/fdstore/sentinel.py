"""Evidence of what systemd's fd store keeps.

The acknowledgement of a barrier says that messages were read, not that descriptors were stored.
systemd drops a descriptor silently if NotifyAccess= does not allow this process to send, if a
wrapper is the main process of a Type=simple service, and beyond FileDescriptorStoreMax=, which may
be less than $FDSTORE and may be lowered at any time.  Two kinds of descriptors show what it does:

* The write end of a pipe, which only the fd store has: the read end hangs up (POLLHUP) when it is
  dropped.  But from version 254 on, systemd closes in the background what it drops.
* An epoll instance: systemd watches each descriptor that it stores (FDPOLL=1), from before it reads
  the next message until it drops the descriptor.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from select import epoll
from typing import Protocol

import trio

from ...fdsets import StoredFd
from ...kernel.fd import Fd, HasFileno, close_all, pipe, poll
from ...kernel.watches import WatchDetector
from ...limits import MAX_PROBES
from ..durability import Unproven
from .barrier_link import BarrierLink
from .journal_writer import JournalWriter
from .kept import KeptFds
from .names import PROBE, SENTINEL

_log = logging.getLogger("qmpfd")

_FEWER = (
    "the service manager stores %d descriptors, fewer than $FDSTORE: more are refused "
    "(FileDescriptorStoreMax=)"
)
_NO_ROOM = (
    "the service manager has no room for more than %d descriptors (FileDescriptorStoreMax= was "
    "lowered, or is less than $FDSTORE): they are refused"
)

#: Seconds until systemd has closed what it drops, and between two looks.
_PATIENCE, _INTERVAL = 0.5, 0.01

#: Maximum number of probes stored after added descriptors, before one barrier.
_MOST_PROBES = 2


class Probe(Protocol):
    """A descriptor that is stored for a moment."""

    @property
    def fd(self) -> HasFileno:
        """The descriptor."""

    def is_stored(self) -> bool:
        """Return whether the fd store has the descriptor, once a barrier has covered it."""

    def close(self) -> None:
        """Close the probe in this process."""


class EpollProbe:
    """An epoll instance, for a fd store that watches what it stores.

    Args:
        detector: detects whether it is watched.

    Raises:
        OSError: this process is out of descriptors.
    """

    def __init__(self, detector: WatchDetector) -> None:
        self._detector = detector
        self.fd = epoll()

    def is_stored(self) -> bool:
        return self._detector.is_watched(self.fd)

    def close(self) -> None:
        self.fd.close()


class Sentinel:
    """A pipe whose write end is stored in the fd store.

    Args:
        reader: the read end; owned from here on.
        writer: the write end, likewise.
    """

    def __init__(self, reader: Fd, writer: Fd) -> None:
        self._reader, self.fd = reader, writer

    @classmethod
    def create(cls) -> Sentinel:
        """Create a new pipe.

        Raises:
            OSError: this process is out of descriptors.
        """
        return cls(*pipe())

    @classmethod
    def reopen(cls, writer: Fd) -> Sentinel:
        """Open a new read end for a write end from the fd store (proc(5), /proc/pid/fd): the
        crashed process had the old one.

        Args:
            writer: the write end; owned from here on.

        Raises:
            OSError: /proc is not mounted, or this process is out of descriptors.
        """
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
        reader = os.open(f"/proc/self/fd/{writer.fileno()}", flags)
        return cls(Fd(reader), writer)

    def is_stored(self) -> bool:
        """Close the write end here, so that only the fd store has it; return whether it does."""
        self.fd.close()
        return not poll(self._reader)

    async def wait_dropped(self) -> None:
        """Wait until the fd store has dropped the write end.

        Raises:
            trio.ClosedResourceError: :meth:`close` was called.
        """
        await trio.lowlevel.wait_readable(self._reader)

    def close(self) -> None:
        """Close both ends; wake :meth:`wait_dropped`."""
        if not self._reader.closed:
            trio.lowlevel.notify_closing(self._reader)
        close_all([self._reader, self.fd])


class Evidence:
    """Evidence of what systemd's fd store keeps.

    One sentinel is stored first: systemd drops it before any descriptor sent later.  Probes are
    stored for a moment, after added descriptors: if a probe was stored, so were these.

    Descriptors for which room is not proven yet are in batches: those behind which probes were
    queued for the next barrier, or sent before the barrier under way; and one for all later ones.

    Args:
        link: connection to the fd store.
        kept: the descriptors sent to the fd store.
        journals: the journals, which are sent as well.
        returned: write end of the sentinel of the crashed daemon, which is older than all other
            entries; or None.
        dropped: called when systemd has dropped the first sentinel.
        refused: called with stored descriptors for which the fd store has no room.

    Raises:
        OSError: this process is out of descriptors.
    """

    def __init__(
        self,
        link: BarrierLink,
        kept: KeptFds,
        journals: JournalWriter,
        returned: Fd | None,
        dropped: Callable[[], object],
        refused: Callable[[list[StoredFd]], object],
    ) -> None:
        self._link = link
        self._kept = kept
        self._journals = journals
        self._dropped = dropped
        self._refused = refused
        self._probes: list[Probe] = []  # probes before the barrier under way
        self._spare: list[Probe] = []  # probes for the next barrier
        self._batches: list[Unproven] = []
        self._proven = 0  # number of descriptors for which find_size has proven room
        self._full_at: int | None = None  # number of descriptors when room last ran out
        self._detector = WatchDetector()
        self._create: Callable[[], Probe] = partial(EpollProbe, self._detector)
        if returned is not None:
            try:
                self._first = Sentinel.reopen(returned)
                return
            except OSError:  # /proc is not mounted
                link.remove(SENTINEL)
        try:
            self._first = Sentinel.create()
        except OSError:
            self._detector.close()
            raise
        link.store(SENTINEL, self._first.fd)

    async def find_size(self, size: int, others: int) -> int | None:
        """Probe how many places the fd store has, and return that number; None if it does not have
        every descriptor sent so far.  From here on, room for added descriptors has to be proven by
        probes.

        Args:
            size: number of places by $FDSTORE.
            others: number of entries beside stored descriptors and listening sockets.

        Raises:
            OSError: this process is out of descriptors.
        """
        taken = self._kept.names + others
        count = max(1, min(size - taken, MAX_PROBES))
        sent, stored = await self._count_stored(count)
        if not stored:  # nothing is stored, or this service manager does not watch it
            self._create = Sentinel.create
            sent, stored = await self._count_stored(count, _PATIENCE)
        if not stored or not self._first.is_stored():
            return None
        self._proven = self._kept.names + stored
        self._batches.append(Unproven())
        if stored == sent:
            return size
        _log.warning(_FEWER, taken + stored)
        return taken + stored

    async def _count_stored(self, count: int, patience: float = 0) -> tuple[int, int]:
        """Send *count* probes; return how many were sent, and how many of them are stored after
        *patience* seconds.
        """
        self.prepare(1)
        with suppress(OSError):  # out of descriptors: use fewer probes
            self.prepare(count)
        probes = self._store_probes(len(self._spare))
        await self._link.sync()
        with trio.move_on_after(patience):  # noqa: ASYNC912 - none if nothing is stored
            while any(probe.is_stored() for probe in probes):  # noqa: ASYNC110 - at a start only
                await trio.sleep(_INTERVAL)
        stored = self._remove_probes(probes)
        self._link.changed()  # wait for the removal of the probes
        await self._link.sync()
        return len(probes), stored

    def _store_probes(self, count: int, first: int = 0) -> list[Probe]:
        probes = [self._spare.pop() for _ in range(count)]
        for number, probe in enumerate(probes, first):
            self._link.store(f"{PROBE}{number}", probe.fd)
        return probes

    def _remove_probes(self, probes: Sequence[Probe]) -> int:
        """Remove *probes* after their barrier was acknowledged; return how many were stored."""
        stored = sum(probe.is_stored() for probe in probes)
        for number, probe in enumerate(probes):
            self._link.discard(f"{PROBE}{number}")
            probe.close()
        return stored

    def prepare(self, count: int = _MOST_PROBES) -> None:
        """Create the next *count* probes.

        Raises:
            OSError: this process is out of descriptors.
        """
        while len(self._spare) < count:
            self._spare.append(self._create())

    def added(self, stored: StoredFd) -> Unproven | None:
        """Add a stored descriptor to the last batch and return the batch; None before
        :meth:`find_size`.
        """
        if not self._batches:
            return None
        self._batches[-1].entries.append(stored)
        return self._batches[-1]

    def queue_probes(self) -> None:
        """Queue probes before the next barrier, if it covers added descriptors.  The probes are
        checked before all other actions that wait for the barrier.
        """
        last = self._link.last_queued
        is_covered = last is None or last.startswith(PROBE)
        if not self._batches or (is_covered and not self._batches[-1].entries):
            return
        try:
            self.prepare()
        except OSError:  # nothing was added: check_quota would have created the probes
            self._journals.withdraw()
            return
        # Beyond the proven number, a second probe proves room for another journal as well.
        is_beyond = self._kept.names > self._proven and not self._journals.is_replacing
        if not self._probes:
            self._link.on_synced(self._check_probes, first=True)
        self._probes += self._store_probes(1 + is_beyond, len(self._probes))
        self._batches.append(Unproven())

    def _check_probes(self) -> None:
        """Check the probes before the barrier under way: if all were stored, so were all batches
        but the last.  If not, refuse these batches.
        """
        probes, self._probes = self._probes, []
        sent, self._batches = self._batches[:-1], self._batches[-1:]
        if self._remove_probes(probes) == len(probes):
            return
        refused = [stored for batch in sent for stored in batch.entries]
        for batch in sent:
            batch.is_refused = True
        self._journals.withdraw()
        unsent = sum(len(batch.entries) for batch in self._batches)
        if self._full_at != (full_at := self._kept.names - len(refused) - unsent):
            self._full_at = full_at
            _log.error(_NO_ROOM, full_at)
        self._refused([stored for stored in refused if not stored.removed])

    async def watch(self) -> None:
        """Wait until systemd has dropped the first sentinel, and call *dropped*."""
        with suppress(trio.ClosedResourceError):
            await self._first.wait_dropped()
            self._dropped()

    def forget(self) -> None:
        """Close the sentinel and all probes, and remove them from the fd store."""
        self._link.remove(SENTINEL, *(f"{PROBE}{each}" for each in range(len(self._probes))))
        self.close()

    def close(self) -> None:
        """Close the sentinel and all probes; prove nothing any more."""
        for each in (self._first, *self._probes, *self._spare):
            each.close()
        self._detector.close()
        self._probes, self._spare, self._batches = [], [], []
