"""What the stored descriptors are, written down where it survives the daemon.

The journal is a file in memory (memfd_create(2)) that the fd store has a descriptor of from the
start: what is written to it needs no message, and stays when the daemon is killed the next moment.

It is a row of frames, each of a length, a checksum and MessagePack.  What is done in one critical
section is one frame, and so is there whole or not at all; a torn one at the end does not count.
The first frames are a snapshot of everything.  When a journal has grown long, another one is begun.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from itertools import islice
from mmap import mmap
from struct import Struct as Layout
from typing import TypeAlias
from zlib import crc32

import msgspec
from msgspec import Struct

from ...kernel.fd import Fd
from ..saved_state import SavedFd, SavedListener

#: Length and checksum of the MessagePack that follows.
HEADER = Layout("<II")

#: Bytes that a frame takes beside its records: the longest head of a list is ``array 32`` of
#: MessagePack's specification.
FRAME_BYTES = HEADER.size + 5

#: Bytes that are allocated at a time: writing into what is allocated cannot fail.
_CHUNK = 64 << 10

#: Bytes of a record at most, but for its text; and of a removal, if it has a frame of its own.
RECORD_BYTES = 128
REMOVAL_BYTES = 32


#: Records of a snapshot in one frame.
SNAPSHOT_RECORDS = 1000


class SnapshotHeader(Struct, array_like=True, tag="b"):
    """A frame of the snapshot begins.

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


class Removed(Struct, array_like=True, tag="r"):
    """The descriptor of that number was removed."""

    number: int


class Confirmed(Struct, array_like=True, tag="c"):
    """The takeover is done: all this is ours."""


class HandedOver(Struct, array_like=True, tag="x"):
    """Whether a successor has taken over: nothing of this is ours any more, or it still is.

    Args:
        left: None while the takeover may still go either way.
    """

    left: bool | None


Record: TypeAlias = (
    SnapshotHeader | ListenerAdded | ListenerRemoved | SavedFd | Removed | Confirmed | HandedOver
)

_encode = msgspec.msgpack.Encoder().encode


def frame(records: list[Record]) -> bytes:
    """*records*, to be there together or not at all."""
    data = _encode(records)
    return HEADER.pack(len(data), crc32(data)) + data


def _snapshot_frames(records: Iterable[Record]) -> Iterator[bytes]:
    """A snapshot, whose first record is its header, in frames that each begin with that: neither
    the writer nor a reader needs memory for all of it at once.
    """
    iterator = iter(records)
    header = next(iterator)
    yield frame([header, *islice(iterator, SNAPSHOT_RECORDS)])
    while chunk := list(islice(iterator, SNAPSHOT_RECORDS)):
        yield frame([header, *chunk])


class Journal:
    """A journal that is being written.

    Args:
        records: what it begins with.

    Raises:
        OSError: there is no descriptor or no memory for it.
    """

    def __init__(self, records: Iterable[Record]) -> None:
        try:
            self.fd = Fd(os.memfd_create("qmpfd-journal", os.MFD_CLOEXEC))
        except OSError as exc:  # a container's seccomp filter may forbid it
            reason = f"{exc.strerror} (memfd_create(2), for the journal of --supervise)"
            raise OSError(exc.errno, reason) from None
        self.size = 0
        #: Bytes that there is memory for.
        self.allocated = 0
        # Written to as memory: pwrite(2) meets RLIMIT_FSIZE also where room was made before.
        self._memory: mmap | None = None
        try:
            for data in _snapshot_frames(records):
                self.append(data)
        except OSError as exc:  # RLIMIT_FSIZE (ulimit -f), or the memory of a container
            self.close()
            raise OSError(exc.errno, f"{exc.strerror} (for the journal of what is kept)") from None
        except BaseException:
            self.close()
            raise

    def reserve(self, count: int) -> None:
        """See to it that the next *count* bytes can be written.

        Raises:
            OSError: there is no memory for them.
        """
        wanted = self.size + count - self.allocated
        if wanted > 0:
            wanted += -wanted % _CHUNK
            os.posix_fallocate(self.fd.fileno(), self.allocated, wanted)
            larger = mmap(self.fd.fileno(), self.allocated + wanted)
            self._unmap()
            self._memory = larger
            self.allocated += wanted

    def append(self, data: bytes) -> None:
        """Write one frame.

        Raises:
            OSError: more than was reserved, and no memory for it.
        """
        end = self.size + len(data)
        if end > self.allocated:
            self.reserve(len(data))
        assert self._memory is not None
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
