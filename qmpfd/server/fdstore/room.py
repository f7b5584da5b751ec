"""Which descriptors a service manager has had no room for, as its store shows."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress

from ...fdsets import StoredFd
from ..durability import Unproven
from .journal_writer import JournalWriter
from .kept import KeptFds
from .sentinel import Evidence

_log = logging.getLogger("qmpfd")

_NO_ROOM = (
    "the service manager has no room for more than %d descriptors (FileDescriptorStoreMax= was "
    "lowered, or is less than $FDSTORE): they are refused"
)


class Room:
    """What was stored since it was last shown that there is room, in batches: one for each barrier
    whose probes have no answer yet, and one for what no probe was sent behind.

    Args:
        kept: the descriptors that were sent to be kept.
        journals: the journal, which is sent as well.
    """

    def __init__(self, kept: KeptFds, journals: JournalWriter) -> None:
        self._kept = kept
        self._journals = journals
        #: Told what there is no room for.
        self.on_refused: Callable[[list[StoredFd]], object] = lambda _: None
        self._batches: list[Unproven] = []
        self._shown = 0  # how many there is room for, as was tried out at the start
        self._full_at: int | None = None  # how many there were when there was no room for more

    def begin(self, shown: int) -> None:
        """It was tried out that there is room for so many: from here on, what is stored counts."""
        self._shown = shown
        self._batches.append(Unproven())

    def put(self, stored: StoredFd) -> Unproven | None:
        """A descriptor was stored: what tells whether there is room for it; None before
        :meth:`begin`.
        """
        if not self._batches:
            return None
        self._batches[-1].entries.append(stored)
        return self._batches[-1]

    def show(self, evidence: Evidence) -> None:
        """A barrier is about to be sent: have *evidence* show whether there is room for all that
        was stored before it.
        """
        if self._batches and (self._batches[-1].entries or self._journals.is_turning):
            with suppress(OSError):  # out of descriptors, and nothing was added: the next one shows
                # Beyond what was tried out, the place for another journal is shown as well.
                is_beyond = self._kept.names > self._shown and not self._journals.is_turning
                evidence.show_room(int(is_beyond))
                self._batches.append(Unproven())

    def on_shown(self, enough: bool) -> None:
        """There was room for all batches but the last, or not for all of them: then none of these
        is kept, nor of what was sent since, which has the places of others.
        """
        if enough:
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
        self.on_refused([stored for stored in refused if not stored.removed])
