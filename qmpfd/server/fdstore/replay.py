"""Replays a journal: computes the final state of the store.

The journal is mapped and read frame by frame: it can be several times as large as that state.  An
invalid record is skipped; all others are applied.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from mmap import PROT_READ, mmap
from zlib import crc32

import msgspec

from ...kernel.fd import Fd
from ...limits import JOURNAL_FORMAT
from ..saved_state import SavedFd, SavedListener, SavedState
from .journal import (
    HEADER,
    Confirmed,
    HandedOver,
    ListenerAdded,
    ListenerRemoved,
    Record,
    Removed,
    SnapshotHeader,
)

_log = logging.getLogger("qmpfd")

#: Maximum number of frames at the end of a journal whose descriptors were not sent before a crash:
#: one per client, as a reply waits until the fd store has the descriptors.
_MOST_UNFINISHED = 4096

#: Exceptions of decoding; UnicodeDecodeError is a ValueError.
_UNREADABLE = (msgspec.MsgspecError, ValueError, RecursionError)

_decoder = msgspec.msgpack.Decoder(list[Record])
_one_by_one = msgspec.msgpack.Decoder(list[msgspec.Raw])
_record_decoder: msgspec.msgpack.Decoder[Record] = msgspec.msgpack.Decoder(Record)


class History:
    """Final state of a journal.

    Args:
        begun: its first record.

    The members are: *entries*, the stored descriptors by number, oldest first; *listeners*, the
    listening sockets by name; *confirmed*, whether the writer owned the store (not in an
    unfinished takeover by it); *left*, whether a successor owns everything, None if unknown.
    """

    def __init__(self, begun: SnapshotHeader) -> None:
        self.begun = begun
        self.entries: dict[int, SavedFd] = {}
        self.listeners: dict[str, SavedListener] = {}
        self.confirmed = begun.previous is None
        self.left: bool | None = None
        self._names: Counter[str] = Counter()  # names of the entries
        #: Order of adding, by id() of each entry that is, or may be again, among the entries.
        self._positions: dict[int, int] = {}
        self._count = 0
        # The additions and removals in each of the last frames, and the names that were new in it.
        self._changes: deque[tuple[list[tuple[bool, SavedFd]], set[str]]] = deque(
            maxlen=_MOST_UNFINISHED
        )

    def apply_frame(self, records: Sequence[Record]) -> None:
        """Apply one more frame."""
        changes: list[tuple[bool, SavedFd]] = []
        fresh = set()  # the numbers that the frame has added so far
        names = set()
        for record in records:
            match record:
                case SavedFd():
                    changes.append((True, record))
                    fresh.add(record.number)
                    if record.name not in self._names and record.name not in self.listeners:
                        names.add(record.name)
                    self._remove(record.number)
                    self.entries[record.number] = record
                    self._names[record.name] += 1
                    self._positions[id(record)] = self._count
                    self._count += 1
                case Removed():
                    former = self._remove(record.number)
                    if former is not None and record.number not in fresh:
                        changes.append((False, former))
                case ListenerAdded():
                    self.listeners[record.name] = record.listener
                case ListenerRemoved():
                    self.listeners.pop(record.name, None)
                case Confirmed():
                    self.confirmed = True
                case HandedOver():
                    self.left = record.left
        if fresh and not isinstance(records[0], SnapshotHeader):
            self._changes.append((changes, names))

    def forget_unfinished(self, kept: Callable[[str], bool]) -> None:
        """Undo each frame at the end of the journal with an added descriptor that is not *kept*: no
        client had its reply, and a command adds all of its descriptors or none.

        The fd store gets added descriptors in the order of the records, and no removal before an
        earlier addition.  So a removal recorded after the addition of a missing descriptor, as of
        a replaced descriptor, was not sent either.  And all descriptors added before one that is
        kept were sent: a missing one among them was lost later, and its frame is not undone.

        Args:
            kept: returns whether the fd store has returned a descriptor of that name.
        """
        for changes, names in reversed(self._changes):
            there = {
                entry.number: entry
                for _, entry in changes
                if self.entries.get(entry.number) is entry
            }
            if len(changes) > 1 and not all(kept(entry.name) for entry in there.values()):
                missing = False
                for added, entry in changes:
                    if added:
                        if there.get(entry.number) is entry:
                            missing = missing or not kept(entry.name)
                            del self.entries[entry.number]
                    elif missing or kept(entry.name):
                        self.entries.setdefault(entry.number, entry)
            if any(kept(entry.name) for entry in there.values() if entry.name in names):
                break
        # Restore the order of adding.  The times of adding do not have it: each is converted from
        # another clock, with the error of that conversion.
        in_order = sorted(self.entries.values(), key=lambda entry: self._positions[id(entry)])
        self.entries = {entry.number: entry for entry in in_order}

    def _remove(self, number: int) -> SavedFd | None:
        entry = self.entries.pop(number, None)
        if entry is not None:
            self._names[entry.name] -= 1
            if not self._names[entry.name]:
                del self._names[entry.name]
        return entry

    def state(self, kept: Callable[[str], bool]) -> SavedState:
        """Convert to a SavedState with the entries and listeners that are *kept*."""
        return SavedState(
            at=time.monotonic(),
            fds=[entry for entry in self.entries.values() if kept(entry.name)],
            listeners=[each for name, each in self.listeners.items() if kept(name)],
        )


def replay(journal: Fd) -> History:
    """Replay a journal.

    Raises:
        ValueError: the file is no journal, or has another format.
        OSError: this process is out of descriptors or memory.
    """
    with mmap(journal.fileno(), 0, prot=PROT_READ) as data:  # ValueError if it is empty
        return follow(data)


def follow(data: bytes | mmap) -> History:
    """Replay the bytes of a journal.

    Raises:
        ValueError: as :func:`replay`.
    """
    history: History | None = None
    for records in frames(data):
        begun = records[0] if records else None
        if isinstance(begun, SnapshotHeader):
            if not 1 <= begun.format <= JOURNAL_FORMAT:
                raise ValueError("the journal of the stored descriptors has another format")
            history = history or History(begun)
        if history is None:
            raise ValueError("the journal of the stored descriptors has no beginning")
        history.apply_frame(records)
    if history is None:
        raise ValueError("the journal of the stored descriptors is empty")
    return history


def frames(data: bytes | mmap) -> Iterator[list[Record]]:
    """Iterate over the records of each complete frame.  A frame with a wrong checksum is logged and
    skipped; at the end, where a crash has interrupted a write, it is not logged.
    """
    at, broken = 0, 0
    while at + HEADER.size <= len(data):
        length, checksum = HEADER.unpack_from(data, at)
        at += HEADER.size
        if not length or at + length > len(data):
            return
        body = data[at : at + length]
        if crc32(body) == checksum:
            if broken:
                _log.error("%d changes in the journal cannot be read and are lost", broken)
            broken = 0
            yield _decode(body, at)
        else:
            broken += 1
        at += length


def _decode(body: bytes, at: int) -> list[Record]:
    """Decode the records of a frame; log and skip invalid ones."""
    try:
        return _decoder.decode(body)
    except _UNREADABLE:
        pass
    records: list[Record] = []
    try:
        raw = _one_by_one.decode(body)
    except _UNREADABLE as exc:
        _log.error("changes in the journal cannot be read and are lost: %s (byte %d)", exc, at)
        return records
    for each in raw:
        try:
            records.append(_record_decoder.decode(each))
        except _UNREADABLE as exc:
            _log.error("a change in the journal cannot be read and is lost: %s (byte %d)", exc, at)
    return records
