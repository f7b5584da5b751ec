"""What a daemon stores, as its successor gets it: in a takeover, or after a crash.

A takeover has two steps.  While it goes on serving, the old daemon says what is stored, as
:class:`SavedState`: MessagePack, with a format number.  Whoever takes over says the newest format
that it can read, and reads all older ones too: a member that comes in with a new format has a
default.  A member that it does not know makes it give up, and so does a newer format.

When the newcomer is ready, the old daemon pauses, and hands over what is left: what has changed
since, its connections, and all descriptors; see :class:`.connection.snapshot.SavedRest`.
"""

from __future__ import annotations

import os
from typing import TypeVar

import msgspec
from msgspec import Struct

from ..fdsets import StoredFd
from ..limits import TAKEOVER_FORMAT

T = TypeVar("T")

#: What is said once the state has gone over, one byte each.  The newcomer asks for more, first for
#: the rest of the state and then for descriptors; with all of it in its place, it confirms.  The
#: old daemon sends some, then says that all of it is the newcomer's, and closes the connection once
#: it has closed everything else; or it has given up and goes on.
NEXT, CONFIRM = b"n", b"c"
MORE, DONE, REFUSED = b"f", b"d", b"x"


class SavedFd(Struct, array_like=True, tag="a"):
    """A stored descriptor; in a journal: it was stored.

    Args:
        name: what the fd store keeps it as, where two may rest on one; empty in a takeover.
        fdset_id: its fd set.
        number: the number that it keeps.
        opaque: its opaque text.
        added_by: pid, uid and gid of who added it.
        added_at: when, by CLOCK_MONOTONIC.
        expires_at: when it expires, likewise.
        watch_hangup: whether it is removed when its other end is closed.
        owner: which session's end it is kept until; -1 if that is over.
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
        """What there is to know of a stored descriptor.

        Args:
            stored: the descriptor.
            offset: CLOCK_MONOTONIC minus the daemon's clock.
            name: see above.
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
        path: of its file, which need not be UTF-8; None if that is somebody else's.
        file: device and inode of the file that was bound; None if there was none.
    """

    path: bytes | None
    file: tuple[int, int] | None

    @property
    def name(self) -> str:
        """What people know it by."""
        return "an inherited socket" if self.path is None else os.fsdecode(self.path)


#: A socket of a service manager, which sees to the file.
NOT_OURS = SavedListener(None, None)


class SavedState(Struct, forbid_unknown_fields=True, omit_defaults=True):
    """What a daemon stores.

    Args:
        at: when it was so, by CLOCK_MONOTONIC.
        fds: its descriptors; those of a set oldest first.
        listeners: its sockets.
        store: which service of the service manager keeps it safe, if that does.
        service: which service the daemon is, if a service manager has started it.
    """

    at: float
    fds: list[SavedFd]
    listeners: list[SavedListener]
    store: str | None = None
    service: str | None = None

    @property
    def stored_numbers(self) -> list[int]:
        """The numbers of the stored descriptors."""
        return [fd.number for fd in self.fds]


def encode(state: SavedState) -> bytes:
    """*state* as it goes over."""
    return msgspec.msgpack.encode((TAKEOVER_FORMAT, state))


def decode(data: bytes) -> SavedState:
    """What :func:`encode` has made.

    Raises:
        ValueError: it is of another format, or broken.
    """
    number, raw = unpack(data, tuple[int, msgspec.Raw])
    if not 1 <= number <= TAKEOVER_FORMAT:
        raise ValueError(
            f"its state has format {number}, this version reads 1 to {TAKEOVER_FORMAT}"
        )
    return unpack(raw, SavedState)


def unpack(data: bytes | msgspec.Raw, what: type[T]) -> T:
    """MessagePack of another process as an object of that type.

    Raises:
        ValueError: it is something else, or broken.
    """
    try:
        return msgspec.msgpack.decode(data, type=what)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        raise ValueError(f"its state cannot be read: {exc}") from None
