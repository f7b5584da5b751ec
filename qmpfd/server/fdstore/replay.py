"""Reads a journal: what was stored, in the end.

It is read frame by frame, where it is: it can be several times as large as what it comes to.
Whatever is wrong with one record, all the others count.
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

#: Frames at the end of a journal whose descriptors may not have been sent yet: of each client one,
#: at most, before the fd store has them and the reply is sent.
_MOST_UNFINISHED = 4096

#: What decoding raises; UnicodeDecodeError is a ValueError.
_UNREADABLE = (msgspec.MsgspecError, ValueError, RecursionError)

_decoder = msgspec.msgpack.Decoder(list[Record])
_one_by_one = msgspec.msgpack.Decoder(list[msgspec.Raw])
_record_decoder: msgspec.msgpack.Decoder[Record] = msgspec.msgpack.Decoder(Record)


class History:
    """What a journal says in the end.

    Args:
        begun: its first record.

    The members are: *entries*, the stored descriptors by number, oldest first; *listeners*, the
    paths of the listening sockets by name; *confirmed*, a takeover is done; *left*, a successor
    has taken over, None where nothing says so or the contrary.
    """

    def __init__(self, begun: SnapshotHeader) -> None:
        self.begun = begun
        self.entries: dict[int, SavedFd] = {}
        self.listeners: dict[str, SavedListener] = {}
        self.confirmed = begun.previous is None
        self.left: bool | None = None
        self._names: Counter[str] = Counter()  # of the entries
        #: By identity, of each entry that is, or may come to be, among the entries.
        self._positions: dict[int, int] = {}
        self._count = 0
        # What each of the last frames added or removed, with the names that were new in it.
        self._changes: deque[tuple[list[tuple[bool, SavedFd]], set[str]]] = deque(
            maxlen=_MOST_UNFINISHED
        )

    def apply_frame(self, records: Sequence[Record]) -> None:
        """Follow one more frame."""
        changes: list[tuple[bool, SavedFd]] = []
        fresh = set()  # the numbers of what the frame has added so far
        names = set()
        for record in records:
            if isinstance(record, SavedFd):
                changes.append((True, record))
                fresh.add(record.number)
                if record.name not in self._names and record.name not in self.listeners:
                    names.add(record.name)
            elif (
                isinstance(record, Removed)
                and record.number in self.entries
                and (record.number not in fresh)
            ):
                changes.append((False, self.entries[record.number]))
            self.apply(record)
        if fresh and not isinstance(records[0], SnapshotHeader):
            self._changes.append((changes, names))

    def forget_unfinished(self, kept: Callable[[str], bool]) -> None:
        """Undo each frame at the end of which a descriptor that was added is not *kept* under its
        name: nobody was told of any of it, and a command adds all or none.

        The fd store gets what is added in the order of the records, and nothing that is removed
        before what was added earlier.  So what was removed behind a descriptor that is missing, as
        what a replacement takes the place of, was not removed there;
        and whatever was added before one that is kept had been sent: what is not kept of that was
        lost later, and takes nothing else along.
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
        # What is there again goes back to its place.  The times do not tell: each is converted from
        # another clock, and differs by what that took.
        in_order = sorted(self.entries.values(), key=lambda entry: self._positions[id(entry)])
        self.entries = {entry.number: entry for entry in in_order}

    def apply(self, record: Record) -> None:
        """Follow one more record."""
        match record:
            case SavedFd():
                self._forget(record.number)
                self.entries[record.number] = record
                self._names[record.name] += 1
                self._positions[id(record)] = self._count
                self._count += 1
            case Removed():
                self._forget(record.number)
            case ListenerAdded():
                self.listeners[record.name] = record.listener
            case ListenerRemoved():
                self.listeners.pop(record.name, None)
            case Confirmed():
                self.confirmed = True
            case HandedOver():
                self.left = record.left
            case SnapshotHeader():
                pass

    def _forget(self, number: int) -> None:
        entry = self.entries.pop(number, None)
        if entry is not None:
            self._names[entry.name] -= 1
            if not self._names[entry.name]:
                del self._names[entry.name]

    def state(self, kept: Callable[[str], bool]) -> SavedState:
        """It as what a takeover would have fetched, of what is *kept* under its name."""
        return SavedState(
            at=time.monotonic(),
            fds=[entry for entry in self.entries.values() if kept(entry.name)],
            listeners=[each for name, each in self.listeners.items() if kept(name)],
        )


def replay(journal: Fd) -> History:
    """What a journal says in the end.

    Raises:
        ValueError: it is no journal, or one of another format.
        OSError: this process is out of descriptors or memory.
    """
    with mmap(journal.fileno(), 0, prot=PROT_READ) as data:  # ValueError if it is empty
        return follow(data)


def follow(data: bytes | mmap) -> History:
    """What a journal says in the end that has these bytes.

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
    """The records of each whole frame.  One that is broken is logged and left out, but for those at
    the end: there, it was being written.
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
    """The records of a frame, without those that cannot be read."""
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
