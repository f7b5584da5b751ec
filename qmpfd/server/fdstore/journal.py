"""What the stored descriptors are, written down where it survives the daemon.

The journal is a file in memory (memfd_create(2)) thin the fd store has a descriptor of from the
start: what is written to it needs no message, and stays when the daemon is killed the next moment.

It is a row of frames, each of a length, a checksum and MessagePack.  What is done in one critical
section is one frame, and so is there whole or not at all; a torn one at the end does not count.
The first frame is a snapshot of everything.  When a journal has grown long, another one is begun.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from mmap import mmap
from struct import Struct as Layout
from typing import TypeAlias
from zlib import crc32

import msgspec
from msgspec import Struct

from ...kernel.fd import Fd
from ...limits import JOURNAL_FORMAT
from ..saved_state import SavedFd, SavedListener, SavedSet, SavedState

#: Length and checksum of what follows.
_HEADER = Layout("<II")

#: The head of a list of records: ``array 32`` of MessagePack's specification.
_ARRAY = Layout(">BI")

#: Bytes that a frame takes beside its records.
FRAME_BYTES = _HEADER.size + _ARRAY.size

#: Bytes that are allocated at a time: writing into what is allocated cannot fail.
_CHUNK = 64 << 10

#: Bytes of a record at most, but for its text; and of a removal, if it has a frame of its own.
RECORD_BYTES = 128
REMOVAL_BYTES = 32


class SnapshotHeader(Struct, array_like=True, tag="b"):
    """The snapshot begins.

    Args:
        format: of this journal.
        generation: of two journals, the higher one counts.
        previous: the daemon that all this is being fetched from is described by a descriptor of
            this name; see :mod:`qmpfd.server.fdstore.recover`.
    """

    format: int
    generation: int
    previous: str | None


class ListenerAdded(Struct, array_like=True, tag="l"):
    """A listening socket of ours is kept.

    Args:
        name: of its descriptor in the fd store.
        listener: what it is.
    """

    name: str
    listener: SavedListener


class ListenerRemoved(Struct, array_like=True, tag="e"):
    """The listening socket of that name is not ours any more."""

    name: str


class Added(Struct, array_like=True, tag="a"):
    """A descriptor was stored.

    Args:
        name: what it is kept as; two may rest on one.
        fdset_id: its fd set.
        number: its number, which it keeps.
        opaque: its opaque text.
        added_by: pid, uid and gid of who added it.
        added_at: when, by CLOCK_MONOTONIC.
        expires_at: when it expires, likewise.
        watch_hangup: whether it is removed when the other end is gone.
    """

    name: str
    fdset_id: int
    number: int
    opaque: str | None
    added_by: tuple[int, int, int] | None
    added_at: float
    expires_at: float | None
    watch_hangup: bool


class Removed(Struct, array_like=True, tag="r"):
    """The descriptor of that number was removed."""

    number: int


class Confirmed(Struct, array_like=True, tag="c"):
    """The takeover is done: all this is ours."""


class HandedOver(Struct, array_like=True, tag="x"):
    """Whether a successor has taken over: nothing of this is ours any more, or it still is."""

    left: bool


Record: TypeAlias = (
    SnapshotHeader | ListenerAdded | ListenerRemoved | Added | Removed | Confirmed | HandedOver
)

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(list[Record])


class History:
    """What a journal says in the end.

    Args:
        begun: its first record.

    The members are: *entries*, the stored descriptors by number, oldest first; *listeners*, the
    paths of the listening sockets by name; *confirmed*, a takeover is done; *left*, a successor
    has taken over.
    """

    def __init__(self, begun: SnapshotHeader) -> None:
        self.begun = begun
        self.entries: dict[int, Added] = {}
        self.listeners: dict[str, SavedListener] = {}
        self.confirmed = begun.previous is None
        self.left = False
        #: What each frame added or removed, where that is all or nothing.
        self._together: list[list[tuple[bool, Added]]] = []

    def apply_frame(self, records: Sequence[Record]) -> None:
        """Follow one more frame."""
        changes: list[tuple[bool, Added]] = []
        fresh = set()  # the numbers of what the frame has added so far
        for record in records:
            if isinstance(record, Added):
                changes.append((True, record))
                fresh.add(record.number)
            elif (
                isinstance(record, Removed)
                and record.number in self.entries
                and (record.number not in fresh)
            ):
                changes.append((False, self.entries[record.number]))
            self.apply(record)
        adds = any(added for added, _ in changes)
        if adds and len(changes) > 1 and not isinstance(records[0], SnapshotHeader):
            self._together.append(changes)

    def forget_unfinished(self, kept: Callable[[str], bool]) -> None:
        """Undo each frame of which a descriptor that was added is not *kept* under its name: nobody
        was told of any of it, and a command adds all or none.

        The fd store gets its messages in the order of the records.  So what was removed behind a
        descriptor that is missing, as what a replacement takes the place of, was not removed there.
        """
        for changes in reversed(self._together):
            there = {
                entry.number: entry
                for _, entry in changes
                if self.entries.get(entry.number) is entry
            }
            if all(kept(entry.name) for entry in there.values()):
                continue
            missing = False
            for added, entry in changes:
                if added:
                    if there.get(entry.number) is entry:
                        missing = missing or not kept(entry.name)
                        del self.entries[entry.number]
                elif missing or kept(entry.name):
                    self.entries.setdefault(entry.number, entry)
        oldest_first = sorted(self.entries.values(), key=lambda entry: entry.added_at)
        self.entries = {entry.number: entry for entry in oldest_first}

    def apply(self, record: Record) -> None:
        """Follow one more record."""
        match record:
            case Added():
                self.entries[record.number] = record
            case Removed():
                self.entries.pop(record.number, None)
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

    def state(self, kept: Callable[[str], bool]) -> SavedState:
        """It as what a takeover would have fetched, of what is *kept* under its name."""
        sets: dict[int, SavedSet] = {}
        now = time.monotonic()
        for entry in self.entries.values():
            if kept(entry.name):
                expires = entry.expires_at
                saved = SavedFd(
                    number=entry.number,
                    opaque=entry.opaque,
                    added_by=entry.added_by,
                    age=now - entry.added_at,
                    owner=None,
                    expires_in=None if expires is None else expires - now,
                    watch_hangup=entry.watch_hangup,
                )
                sets.setdefault(entry.fdset_id, SavedSet(entry.fdset_id, [])).fds.append(saved)
        return SavedState(
            sets=list(sets.values()),
            listeners=[each for name, each in self.listeners.items() if kept(name)],
        )


def encoded(record: Record) -> bytes:
    """*record*, as it stands in a frame."""
    return _encoder.encode(record)


def frame(records: Iterable[Record]) -> bytes:
    """*records*, to be there together or not at all."""
    return frame_encoded([encoded(record) for record in records])


def frame_encoded(records: Sequence[bytes]) -> bytes:
    """The same of records that are :func:`encoded`."""
    data = b"".join([_ARRAY.pack(0xDD, len(records)), *records])
    return _HEADER.pack(len(data), crc32(data)) + data


def frames(data: bytes) -> Iterator[list[Record]]:
    """The whole frames at the beginning of *data*."""
    at = 0
    while at + _HEADER.size <= len(data):
        length, checksum = _HEADER.unpack_from(data, at)
        body = data[at + _HEADER.size : at + _HEADER.size + length]
        if not length or len(body) < length or crc32(body) != checksum:
            return
        yield _decoder.decode(body)
        at += _HEADER.size + length


def replay(data: bytes) -> History:
    """What the journal *data* says in the end.

    Raises:
        ValueError: it is no journal, or one of another format.
    """
    history: History | None = None
    try:
        for records in frames(data):
            if history is None:
                begun = records[0]
                if not isinstance(begun, SnapshotHeader) or not 1 <= begun.format <= JOURNAL_FORMAT:
                    raise ValueError("the journal of the stored descriptors has another format")
                history = History(begun)
            history.apply_frame(records)
    except msgspec.MsgspecError as exc:
        raise ValueError(f"the journal of the stored descriptors cannot be read: {exc}") from None
    if history is None:
        raise ValueError("the journal of the stored descriptors is empty")
    return history


class Journal:
    """A journal that is being written.

    Args:
        records: what it begins with.

    Raises:
        OSError: there is no descriptor or no memory for it.
    """

    def __init__(self, records: Iterable[Record]) -> None:
        self.fd = Fd(os.memfd_create("qmpfd-journal", os.MFD_CLOEXEC))
        self.size = 0
        self._allocated = 0
        # Written to as memory: pwrite(2) meets RLIMIT_FSIZE also where room was made before.
        self._memory: mmap | None = None
        try:
            first = frame(records)
            self.reserve(len(first))
            self.append(first)
        except BaseException:
            self.close()
            raise

    def reserve(self, count: int) -> None:
        """See to it that the next *count* bytes can be written.

        Raises:
            OSError: there is no memory for them.
        """
        wanted = self.size + count - self._allocated
        if wanted > 0:
            wanted += -wanted % _CHUNK
            os.posix_fallocate(self.fd.fileno(), self._allocated, wanted)
            larger = mmap(self.fd.fileno(), self._allocated + wanted)
            self._unmap()
            self._memory = larger
            self._allocated += wanted

    def append(self, data: bytes) -> None:
        """Write one frame.

        Raises:
            OSError: more than was reserved, and no memory for it.
        """
        self.reserve(len(data))
        assert self._memory is not None
        end = self.size + len(data)
        self._memory[self.size : end] = data
        self.size = end

    def close(self) -> None:
        """Write no more to it."""
        self._unmap()
        self.fd.close()

    def _unmap(self) -> None:
        if self._memory is not None:
            self._memory.close()
            self._memory = None


def read(fd: Fd) -> bytes:
    """All that is in the journal behind *fd*."""
    size = os.lseek(fd.fileno(), 0, os.SEEK_END)
    return os.pread(fd.fileno(), size, 0)
