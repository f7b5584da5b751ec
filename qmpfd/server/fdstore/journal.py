"""Journal of the store: describes the stored descriptors, and survives the daemon.

The journal is a file in memory (memfd_create(2)); the fd store has a descriptor of it.  A record
needs no message once it is written, and survives a SIGKILL of the daemon the next moment.

A journal is a sequence of frames: length, checksum, MessagePack.  The changes of one critical
section are one frame, and so are read all or none; a torn frame at the end is ignored.  The first
frames are a snapshot of the store.  A journal that has become long is replaced by a new one.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from itertools import islice
from mmap import mmap
from struct import Struct as Layout
from typing import TypeAlias
from zlib import crc32

from msgspec import Struct

from ...kernel.fd import Fd
from ..saved_state import SavedFd, SavedListener, pack

#: Length and checksum of the MessagePack that follows.
HEADER = Layout("<II")

#: Bytes of a frame without its records; the longest header of a list is ``array 32`` of
#: MessagePack's specification.
FRAME_BYTES = HEADER.size + 5

#: Bytes allocated at a time: a write to allocated memory cannot fail.
_CHUNK = 64 << 10

#: Maximum bytes of a record without its text; and of a removal in a frame of its own.
RECORD_BYTES = 128
REMOVAL_BYTES = 32


#: Records in one frame of a snapshot.
SNAPSHOT_RECORDS = 1000


class SnapshotHeader(Struct, array_like=True, tag="b"):
    """First record of each frame of the snapshot.

    Args:
        format: the journal's format.
        generation: the journal's number: of several journals, the highest is valid.
        previous: in an unconfirmed takeover, the name of the lifeline in the fd store; else None.
            See :mod:`qmpfd.server.fdstore.recover`.
    """

    format: int
    generation: int
    previous: str | None


class ListenerAdded(Struct, array_like=True, tag="l"):
    """A listening socket of the daemon was sent to the fd store.

    Args:
        name: its name in the fd store.
        listener: its description.
    """

    name: str
    listener: SavedListener


class ListenerRemoved(Struct, array_like=True, tag="e"):
    """The listening socket *name* was closed."""

    name: str


class Removed(Struct, array_like=True, tag="r"):
    """The stored descriptor with this number was removed."""

    number: int


class Confirmed(Struct, array_like=True, tag="c"):
    """The takeover by this daemon is complete: everything in the journal is its own."""


class HandedOver(Struct, array_like=True, tag="x"):
    """Outcome of a takeover by a successor.

    Args:
        left: whether the successor owns everything; None while undecided.
    """

    left: bool | None


Record: TypeAlias = (
    SnapshotHeader | ListenerAdded | ListenerRemoved | SavedFd | Removed | Confirmed | HandedOver
)


def frame(records: list[Record]) -> bytes:
    """Encode *records* as one frame, which a reader applies as a whole or not at all."""
    data = pack(records)
    return HEADER.pack(len(data), crc32(data)) + data


def _snapshot_frames(records: Iterable[Record]) -> Iterator[bytes]:
    """Encode a snapshot, whose first record is its header, in frames that each begin with the
    header: neither writer nor reader needs memory for the whole snapshot.
    """
    iterator = iter(records)
    header = next(iterator)
    yield frame([header, *islice(iterator, SNAPSHOT_RECORDS)])
    while chunk := list(islice(iterator, SNAPSHOT_RECORDS)):
        yield frame([header, *chunk])


class Journal:
    """A journal that this daemon writes.

    Args:
        records: the snapshot.

    Raises:
        OSError: the process is out of descriptors or memory.
    """

    def __init__(self, records: Iterable[Record]) -> None:
        try:
            self.fd = Fd(os.memfd_create("qmpfd-journal", os.MFD_CLOEXEC))
        except OSError as exc:  # a container's seccomp filter may forbid it
            reason = f"{exc.strerror} (memfd_create(2), for the journal of --supervise)"
            raise OSError(exc.errno, reason) from None
        self.size = 0
        #: Bytes of the file that have memory allocated.
        self.allocated = 0
        # Mapped: pwrite(2) would fail beyond RLIMIT_FSIZE even into allocated memory.
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
        """Allocate memory for the next *count* bytes.

        Raises:
            OSError: out of memory.
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
            OSError: the frame is longer than reserved, and out of memory.
        """
        end = self.size + len(data)
        if end > self.allocated:
            self.reserve(len(data))
        assert self._memory is not None
        self._memory[self.size : end] = data
        self.size = end

    def close(self) -> None:
        """Close this process's descriptor and mapping; the fd store keeps the journal."""
        self._unmap()
        self.fd.close()

    def _unmap(self) -> None:
        if self._memory is not None:
            self._memory.close()
            self._memory = None
