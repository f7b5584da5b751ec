"""The journal that counts, and for a while the one that it replaces.

A journal only grows.  When it has grown long, another is begun, which says the same in fewer words;
until that is in the fd store, both are written, so either is right.
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

#: Bytes that are reserved for what is neither added nor removed: listeners, a takeover.
_OTHER_BYTES = 4096


class JournalWriter:
    """What is written down for whoever comes after us.

    Args:
        link: the connection to the fd store, which has them too.
        snapshot: all that the journal of a generation begins with.
    """

    def __init__(self, link: BarrierLink, snapshot: Callable[[int], Iterable[Record]]) -> None:
        self._link = link
        self._snapshot = snapshot
        self._journals: list[Journal] = []  # the last one counts
        self._records: list[Record] = []  # not written yet
        self._promised = 0  # bytes of these at most, but for removals
        self._removals = 0  # bytes to be reserved in each journal, for removals
        self._limit = MIN_JOURNAL_BYTES
        self._offset = time.monotonic() - trio.current_time()  # of the clock of its times
        #: The last journal is not known to be there yet.
        self.is_turning = False
        #: Of the last journal.
        self.generation = 0

    @property
    def fd(self) -> Fd:
        """The journal that counts."""
        return self._journals[-1].fd

    def reserve(self, count: int, removals: int) -> None:
        """See to it that the next *count* bytes can be written, and so many bytes of removals.

        Raises:
            OSError: there is no memory for them.
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
        """The record of a stored descriptor that is kept as *name*."""
        return SavedFd.of(stored, self._offset, name)

    def note(self, record: Record) -> None:
        """Have *record* written, in one frame with the others since the last :meth:`write`."""
        self._records.append(record)
        self._link.changed()

    def write(self) -> None:
        """Write what was noted: what was changed in one critical section is one frame.

        Raises:
            OSError: it is more than was reserved, and there is no memory for it.
        """
        if not self._records or not self._journals:  # none could be begun: all is released again
            return
        data = frame(self._records)
        self._records.clear()
        for journal in self._journals:
            journal.append(data)
        if not self.is_turning and self._journals[-1].size > self._limit:
            try:
                self.begin()
            except OSError:  # out of descriptors, or memory: another time
                self._limit += MIN_JOURNAL_BYTES

    def begin(self) -> None:
        """Begin another journal.

        Raises:
            OSError: there is no descriptor or no memory for it.
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
        self.is_turning = True
        self._link.store(f"{JOURNAL}{self.generation}", journal.fd)
        self._link.on_synced(partial(self._end_others, journal))

    def withdraw(self) -> None:
        """The fd store has no room for the journal that was begun: go on with the one before."""
        if self.is_turning:
            self._link.remove(f"{JOURNAL}{self.generation}")
            self._journals.pop().close()
            self.generation -= 1
            self._limit += MIN_JOURNAL_BYTES
            self.is_turning = False

    def _end_others(self, last: Journal) -> None:
        """The last journal is there: the one before is not needed any more."""
        if self._link.is_over or self._journals[-1] is not last:
            return
        self.is_turning = False
        self._link.remove(*self._names()[:-1])
        for journal in self._journals[:-1]:
            journal.close()
        del self._journals[:-1]

    def forget(self) -> None:
        """Have all of them closed in the fd store."""
        self._link.remove(*self._names())

    def close(self) -> None:
        """Write no more."""
        self._records.clear()
        for journal in self._journals:
            journal.close()

    def _names(self) -> list[str]:
        """What they are called in the fd store."""
        first = self.generation - len(self._journals) + 1
        return [f"{JOURNAL}{number}" for number in range(first, self.generation + 1)]
