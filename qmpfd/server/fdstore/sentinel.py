"""Whether the service manager really keeps what it is sent.

A barrier says that messages were read, not that anything was stored: systemd drops a descriptor
without a word where NotifyAccess= does not allow this process to speak, where a wrapper is the main
process of a Type=simple service, and beyond FileDescriptorStoreMax=, which may be less than
$FDSTORE says, and may be lowered at any time.  So a pipe's write end is stored as well, and open
nowhere else: the read end hangs up as soon as that was dropped.
"""

from __future__ import annotations

import logging
import os
import select
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial

import trio

from ...fdsets import StoredFd
from ...kernel.fd import Fd, close_all, pipe
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

#: Probes that are stored at a time behind what was added.
_MOST_PROBES = 2


class Sentinel:
    """A pipe whose write end is to be stored, or is.

    Args:
        reader: the read end; owned from here on.
        writer: the write end, likewise.
    """

    def __init__(self, reader: Fd, writer: Fd) -> None:
        self._reader, self.writer = reader, writer

    @classmethod
    def create(cls) -> Sentinel:
        """A new one.

        Raises:
            OSError: this process is out of descriptors.
        """
        return cls(*pipe())

    @classmethod
    def reopen(cls, writer: Fd) -> Sentinel:
        """The one whose write end has come back from the fd store: its read end went with the
        process that had it, and is opened anew (proc(5), /proc/pid/fd).

        Args:
            writer: the write end; owned from here on.

        Raises:
            OSError: there is no /proc, or this process is out of descriptors.
        """
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
        reader = os.open(f"/proc/self/fd/{writer.fileno()}", flags)
        return cls(Fd(reader), writer)

    def sent(self) -> None:
        """The write end is on its way, or dropped: only the store has it from here on."""
        self.writer.close()

    @property
    def is_stored(self) -> bool:
        """Whether somebody has the write end."""
        poll = select.poll()
        poll.register(self._reader, 0)
        return not poll.poll(0)

    async def wait_dropped(self) -> None:
        """Wait until nobody has the write end.

        Raises:
            trio.ClosedResourceError: :meth:`close` was called.
        """
        await trio.lowlevel.wait_readable(self._reader)

    def close(self) -> None:
        """Take no more notice."""
        if not self._reader.closed:
            trio.lowlevel.notify_closing(self._reader)
        close_all([self._reader, self.writer])


class Evidence:
    """Of what the service manager stores: the first sentinel, which is dropped before what is sent
    later; and probes, sentinels that are stored for a moment, behind what is to be shown.

    What was stored since a barrier last showed that there is room is in batches: one for each
    barrier whose probes have no answer yet, and one for what no probe was sent behind.

    Args:
        link: the connection to it.
        kept: the descriptors that were sent to be kept.
        journals: the journal, which is sent as well.
        returned: name and write end of the first sentinel of the daemon before, which has come back
            and is older than all that is sent now; None if there is none.
        dropped: called when what was kept is found to be kept no longer.
        refused: called with what there is no room for.

    Raises:
        OSError: this process is out of descriptors.
    """

    def __init__(
        self,
        link: BarrierLink,
        kept: KeptFds,
        journals: JournalWriter,
        returned: tuple[str, Fd] | None,
        dropped: Callable[[], object],
        refused: Callable[[list[StoredFd]], object],
    ) -> None:
        self._link = link
        self._kept = kept
        self._journals = journals
        self._dropped = dropped
        self._refused = refused
        self._probes: list[Sentinel] = []  # under way
        self._spare: list[Sentinel] = []  # for the next time
        self._batches: list[Unproven] = []
        self._shown = 0  # how many there is room for, as was tried out at the start
        self._full_at: int | None = None  # how many there were when there was no room for more
        if returned is not None:
            self._name, writer = returned
            try:
                self._first = Sentinel.reopen(writer)
                return
            except OSError:  # there is no /proc
                link.remove(self._name)
        self._name = f"{SENTINEL}{journals.generation + 1}"
        self._first = Sentinel.create()
        link.store(self._name, self._first.writer)

    async def is_stored(self) -> bool:
        """Whether all is stored that was sent so far: the first of it, and the last."""
        self.prepare()
        probes = self._store_probes(1)
        await self._link.sync()
        self._first.sent()
        are_stored = self._take_back(probes) == 1 and self._first.is_stored
        self._link.changed()  # they are waited for
        await self._link.sync()
        return are_stored

    async def find_size(self, size: int, others: int) -> int:
        """Find out how many descriptors it takes.  From here on, what is added has to be shown to
        have room.

        Args:
            size: how many it takes as it says.
            others: how many it has beside stored descriptors and sockets.
        """
        taken = self._kept.names + others
        with suppress(OSError):  # out of descriptors: fewer are tried
            self.prepare(min(size - taken, MAX_PROBES))
        probes = self._store_probes(len(self._spare))
        await self._link.sync()
        stored = self._take_back(probes)
        self._link.changed()  # they are waited for
        await self._link.sync()
        self._shown = self._kept.names + stored
        self._batches.append(Unproven())
        if stored == len(probes):
            return size
        _log.warning(_FEWER, taken + stored)
        return taken + stored

    def _store_probes(self, count: int) -> list[Sentinel]:
        probes = [self._spare.pop() for _ in range(count)]
        for number, probe in enumerate(probes):
            self._link.store(f"{PROBE}{number}", probe.writer)
        return probes

    def _take_back(self, probes: Sequence[Sentinel]) -> int:
        """The barrier behind *probes* is answered: how many of them are stored."""
        for probe in probes:
            probe.sent()
        stored = sum(probe.is_stored for probe in probes)
        for number, probe in enumerate(probes):
            self._link.discard(f"{PROBE}{number}")
            probe.close()
        return stored

    def prepare(self, count: int = _MOST_PROBES) -> None:
        """Take what the next *count* probes need.

        Raises:
            OSError: this process is out of descriptors.
        """
        while len(self._spare) < count:
            self._spare.append(Sentinel.create())

    def added(self, stored: StoredFd) -> Unproven | None:
        """A descriptor was stored: what tells whether there is room for it; None before
        :meth:`count_room`.
        """
        if not self._batches:
            return None
        self._batches[-1].entries.append(stored)
        return self._batches[-1]

    def show(self) -> None:
        """A barrier is sent next: have it show whether there was room for all before it, before
        anybody is told that the barrier has passed.
        """
        is_turning = self._journals.is_turning
        if not self._batches or not (self._batches[-1].entries or is_turning):
            return
        if self._probes:  # not everything could be sent the last time, and there is more by now
            for number, probe in enumerate(self._probes):
                self._link.remove(f"{PROBE}{number}")
                self._link.store(f"{PROBE}{number}", probe.writer)
        else:
            try:
                self.prepare()
            except OSError:  # out of descriptors, and nothing was added: the next barrier shows
                return
            # Beyond what was tried out, the place for another journal is shown as well.
            is_beyond = self._kept.names > self._shown and not is_turning
            self._probes = self._store_probes(1 + is_beyond)
            self._link.on_synced(partial(self._shown_by, self._probes), first=True)
        self._batches.append(Unproven())

    def _shown_by(self, probes: list[Sentinel]) -> None:
        """There was room for all batches but the last, or not for all of them: then none of these
        is kept, nor of what was sent since, which has the places of others.
        """
        if self._probes is not probes:  # all is over
            return
        self._probes = []
        if self._take_back(probes) == len(probes):
            del self._batches[:-1]
            return
        refused = [stored for batch in self._batches for stored in batch.entries]
        for batch in self._batches:
            batch.is_refused = True
        self._batches = [Unproven()]
        self._journals.withdraw()
        if self._full_at != (full_at := self._kept.names - len(refused)):
            self._full_at = full_at
            _log.error(_NO_ROOM, full_at)
        self._refused([stored for stored in refused if not stored.removed])

    async def watch(self) -> None:
        """Find out when the first is dropped: what is sent later is dropped later."""
        with suppress(trio.ClosedResourceError):
            await self._first.wait_dropped()
            self._dropped()

    def forget(self) -> None:
        """Have the first one closed there as well."""
        self.close()
        self._link.remove(self._name)

    def close(self) -> None:
        """Take no more notice."""
        for sentinel in (self._first, *self._probes, *self._spare):
            sentinel.close()
        self._probes, self._spare = [], []
