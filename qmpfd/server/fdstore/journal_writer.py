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
from .journal import FRAME_BYTES, Journal, Record, encoded, frame_encoded
from .names import journal_name

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
        self._records: list[bytes] = []  # not written yet
        self._noted = 0  # bytes of these
        self._removals = 0  # bytes to be reserved in each journal, for removals
        self._limit = MIN_JOURNAL_BYTES
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
        self._removals = removals + _OTHER_BYTES
        wanted = self._noted + FRAME_BYTES + count + self._removals
        for journal in self._journals:
            if journal.size + wanted > journal.allocated:
                journal.reserve(wanted)

    def note(self, record: Record) -> None:
        """Have *record* written, in one frame with the others since the last :meth:`write`."""
        data = encoded(record)
        self._records.append(data)
        self._noted += len(data)
        self._link.changed()

    def write(self) -> None:
        """Write what was noted: what was changed in one critical section is one frame.

        Raises:
            OSError: it is more than was reserved, and there is no memory for it.
        """
        if not self._records:
            return
        data = frame_encoded(self._records)
        self._records.clear()
        self._noted = 0
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
        self._link.store(journal_name(self.generation), journal.fd)
        self._link.on_synced(partial(self._end_others, journal))

    def withdraw(self) -> None:
        """The fd store has no room for the journal that was begun: go on with the one before."""
        if self.is_turning:
            self._link.remove(journal_name(self.generation))
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
        return [journal_name(number) for number in range(first, self.generation + 1)]


def added_record(name: str, stored: StoredFd) -> SavedFd:
    """The record of a stored descriptor that is kept as *name*."""
    return SavedFd.of(stored, time.monotonic() - trio.current_time(), name)
