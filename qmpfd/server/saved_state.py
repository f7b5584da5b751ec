"""State of the store as its successor reads it: in a takeover, or after a crash.

A takeover has two steps.  While it goes on serving, the predecessor describes the store as
:class:`SavedState`: MessagePack, with a format number.  The successor names the newest format that
it reads, and reads all older ones too: a member that is new in a format has a default.  The
successor gives up at an unknown member and at a newer format.

When the successor is ready, the predecessor pauses and hands over the rest: changes made since, its
connections and all descriptors; see :class:`.connection.snapshot.SavedRest`.
"""

from __future__ import annotations

import os
from typing import TypeVar

import msgspec
from msgspec import Struct

from ..fdsets import StoredFd
from ..limits import TAKEOVER_FORMAT

T = TypeVar("T")

#: Messages of one byte each that follow the state.  The successor sends NEXT for the rest of the
#: state and for each batch of descriptors, and CONFIRM once it has restored everything.  The
#: predecessor answers NEXT with MORE, and CONFIRM with DONE: the successor owns everything.  After
#: DONE it closes all its descriptors, the connection last.  REFUSED: it gives up and goes on.
NEXT, CONFIRM = b"n", b"c"
MORE, DONE, REFUSED = b"f", b"d", b"x"


class SavedFd(Struct, array_like=True, tag="a"):
    """A stored descriptor; as a journal record: the descriptor was stored.

    Args:
        name: its name in the fd store, which two entries may share; empty in a takeover.
        fdset_id: id of its fd set.
        number: its descriptor number, which a restart and a takeover preserve.
        opaque: its opaque text.
        added_by: pid, uid and gid of the client that added it.
        added_at: time of adding, by CLOCK_MONOTONIC.
        expires_at: time of expiry, likewise.
        watch_hangup: whether it is removed when its peer hangs up.
        owner: index of the session with which its lifetime ends; -1 if that session has ended.
    """

    name: str
    fdset_id: int
    number: int
    opaque: str | None
    added_by: tuple[int, int, int] | None
    added_at: float
    expires_at: float | None
    watch_hangup: bool
    owner: int | None = None

    @classmethod
    def of(
        cls, stored: StoredFd, offset: float, name: str = "", owner: int | None = None
    ) -> SavedFd:
        """Describe a stored descriptor.

        Args:
            stored: the descriptor.
            offset: CLOCK_MONOTONIC minus the daemon's clock.
            name: as in :class:`SavedFd`.
            owner: likewise.
        """
        lifetime = stored.lifetime
        expires = lifetime.expires_at
        return cls(
            name,
            stored.fdset.id,
            stored.fd.fileno(),
            stored.opaque,
            stored.added_by,
            stored.added_at + offset,
            None if expires is None else expires + offset,
            lifetime.watch_hangup,
            owner,
        )


class SavedListener(Struct, forbid_unknown_fields=True):
    """A listening socket.

    Args:
        path: path of the socket file, perhaps not UTF-8; None for a service manager's socket.
        file: device and inode of the file that was bound; None for an abstract socket.
    """

    path: bytes | None
    file: tuple[int, int] | None

    @property
    def name(self) -> str:
        """Name of the socket in messages."""
        return "an inherited socket" if self.path is None else os.fsdecode(self.path)


#: A socket of the service manager, which creates and removes the file itself.
NOT_OURS = SavedListener(None, None)


class SavedState(Struct, forbid_unknown_fields=True, omit_defaults=True):
    """State of a daemon's store.

    Args:
        at: time of saving, by CLOCK_MONOTONIC.
        fds: the stored descriptors; those of a set oldest first.
        listeners: the listening sockets.
        store: invocation id of the service whose fd store has the second copy, or None.
        service: invocation id of the service that the daemon runs in, or None.
    """

    at: float
    fds: list[SavedFd]
    listeners: list[SavedListener]
    store: str | None = None
    service: str | None = None

    @property
    def stored_numbers(self) -> list[int]:
        """Numbers of the stored descriptors."""
        return [fd.number for fd in self.fds]


def encode(state: SavedState) -> bytearray:
    """Encode *state* with its format number."""
    return pack((TAKEOVER_FORMAT, state))


def decode(data: bytes | bytearray) -> SavedState:
    """Decode the output of :func:`encode`.

    Raises:
        ValueError: *data* has a newer format, or is invalid.
    """
    number, raw = unpack(data, tuple[int, msgspec.Raw])
    if not 1 <= number <= TAKEOVER_FORMAT:
        raise ValueError(
            f"its state has format {number}, this version reads 1 to {TAKEOVER_FORMAT}"
        )
    return unpack(raw, SavedState)


_encode_into = msgspec.msgpack.Encoder().encode_into


def pack(value: object) -> bytearray:
    """Encode *value* as MessagePack.

    Raises:
        MemoryError: this process is out of memory.  (In msgspec's ``encode``, which enlarges a
            bytes object, it would be a segmentation fault.)
    """
    data = bytearray()
    _encode_into(value, data)
    return data


def unpack(data: bytes | bytearray | msgspec.Raw, what: type[T]) -> T:
    """Decode MessagePack of another process as an object of type *what*.

    Raises:
        ValueError: *data* is invalid, or of another type.
    """
    try:
        return msgspec.msgpack.decode(data, type=what)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        raise ValueError(f"its state cannot be read: {exc}") from None
