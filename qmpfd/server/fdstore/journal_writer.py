"""Writes the valid journal, and during a replacement its predecessor as well.

A journal only grows.  When it has become long, a new one is begun with a snapshot of the store.
Until the fd store has acknowledged the new journal, every record is written to both.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from functools import partial

import trio

from ...fdsets import StoredFd
from ...kernel.fd import Fd
from ...limits import MIN_JOURNAL_BYTES
from ..saved_state import SavedFd
from .barrier_link import BarrierLink
from .journal import FRAME_BYTES, REMOVAL_BYTES, Journal, Record, frame
from .names import JOURNAL

#: Bytes reserved for records of listeners and of a takeover.
_OTHER_BYTES = 4096


class JournalWriter:
    """Writes the journals of this daemon.

    Args:
        link: connection to the fd store, which keeps the journals.
        snapshot: returns the records of a snapshot; called with the journal's generation.
    """

    def __init__(self, link: BarrierLink, snapshot: Callable[[int], Iterable[Record]]) -> None:
        self._link = link
        self._snapshot = snapshot
        self._journals: list[Journal] = []  # the last one is valid
        self._records: list[Record] = []  # not written yet
        self._promised = 0  # maximum bytes of these records, without removals
        self._removals = 0  # bytes that must stay reserved in each journal for removals
        self._limit = MIN_JOURNAL_BYTES
        self._offset = time.monotonic() - trio.current_time()  # CLOCK_MONOTONIC minus Trio's clock
        #: Generation of the last journal.
        self.generation = 0

    @property
    def is_replacing(self) -> bool:
        """Whether a new journal is written beside the former one, until the fd store has it."""
        return len(self._journals) > 1

    @property
    def fd(self) -> Fd:
        """Descriptor of the valid journal."""
        return self._journals[-1].fd

    def reserve(self, count: int, removals: int) -> None:
        """Reserve *count* bytes for the next records, and *removals* bytes for removals.

        Raises:
            OSError: out of memory.
        """
        records = self._records
        self._promised = self._promised + count if records else count
        self._removals = removals + _OTHER_BYTES
        unwritten = FRAME_BYTES + self._promised + len(records) * REMOVAL_BYTES
        wanted = unwritten + self._removals
        for journal in self._journals:
            if journal.size + wanted > journal.allocated:
                journal.reserve(wanted)

    def added(self, name: str, stored: StoredFd) -> SavedFd:
        """Make the record of a stored descriptor that the fd store has as *name*."""
        return SavedFd.of(stored, self._offset, name)

    def note(self, record: Record) -> None:
        """Queue *record* for the frame that the next :meth:`write` writes."""
        self._records.append(record)
        self._link.changed()

    def write(self) -> None:
        """Write the queued records, of one critical section, as one frame.

        Raises:
            OSError: the frame is longer than reserved, and out of memory.
        """
        if not self._records or not self._journals:  # no journal: the start of the daemon failed
            return
        data = frame(self._records)
        self._records.clear()
        for journal in self._journals:
            journal.append(data)
        if not self.is_replacing and self._journals[-1].size > self._limit:
            try:
                self.begin()
            except OSError:  # out of descriptors or memory: try again when it has grown further
                self._limit += MIN_JOURNAL_BYTES

    def begin(self) -> None:
        """Begin a new journal, and send it to the fd store.

        Raises:
            OSError: the process is out of descriptors or memory.
        """
        journal = Journal(self._snapshot(self.generation + 1))
        try:
            journal.reserve(self._removals + _OTHER_BYTES)
        except OSError:
            journal.close()
            raise
        self.generation += 1
        self._journals.append(journal)
        self._limit = max(MIN_JOURNAL_BYTES, 4 * journal.size)
        self._link.store(f"{JOURNAL}{self.generation}", journal.fd)
        if self.is_replacing:
            self._link.on_synced(partial(self._end_former, journal))

    def withdraw(self) -> None:
        """Drop a new journal for which the fd store has no room; its predecessor stays valid."""
        if self.is_replacing:
            self._link.remove(f"{JOURNAL}{self.generation}")
            self._journals.pop().close()
            self.generation -= 1
            self._limit += MIN_JOURNAL_BYTES

    def _end_former(self, last: Journal) -> None:
        """Remove the replaced journal, once the fd store has acknowledged *last*."""
        if not self._link.is_over and self._journals[-1] is last:
            self._link.remove(f"{JOURNAL}{self.generation - 1}")
            self._journals.pop(0).close()

    def forget(self) -> None:
        """Remove all journals from the fd store."""
        last = self.generation
        for number in range(last - len(self._journals) + 1, last + 1):
            self._link.remove(f"{JOURNAL}{number}")

    def close(self) -> None:
        """Discard queued records and close the journals; the fd store keeps them."""
        self._records.clear()
        for journal in self._journals:
            journal.close()
