"""All that a daemon hands over to its successor, but for the descriptors themselves.

It goes over as MessagePack with a format number.  Whoever takes over says the newest format that it
can read, and reads all older ones too: a member that comes in with a new format has a default.  A
member that it does not know makes it give up, and so does a newer format.

The descriptors follow in the order in which the fields here speak of them: those of the sets, then
the listeners', then for each session its connection, what waits for a command, what has a name,
what waits to be sent, what goes with the reply in progress.
"""

from __future__ import annotations

import os

import msgspec
from msgspec import Struct

from ..limits import TAKEOVER_FORMAT

#: What is said once the state has gone over, one byte each.  The newcomer asks for more descriptors
#: and, with all of it in its place, confirms.  The old daemon sends some, then says that all of it
#: is the newcomer's, and closes the connection once it has closed everything else; or it has given
#: up and goes on.
NEXT, CONFIRM = b"n", b"c"
MORE, DONE, REFUSED = b"f", b"d", b"x"


class SavedFd(Struct, forbid_unknown_fields=True):
    """A stored descriptor.

    Args:
        number: the number that it keeps.
        opaque: its opaque text.
        added_by: pid, uid and gid of who added it.
        age: seconds since.
        owner: which session's end it is kept until.
        expires_in: seconds until it expires.
        watch_hangup: whether it is removed when the other end is gone.
    """

    number: int
    opaque: str | None
    added_by: tuple[int, int, int] | None
    age: float
    owner: int | None
    expires_in: float | None
    watch_hangup: bool


class SavedSet(Struct, forbid_unknown_fields=True):
    """An fd set: its descriptors, oldest first."""

    id: int
    fds: list[SavedFd]


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
    """A daemon.

    Args:
        pid: its process; the listening sockets may be of another that was there before.
        sets: its fd sets.
        listeners: its sockets.
        connections: how many connections it has.
        connection_fds: how many descriptors they come with.
        connection_states: what they are: a SavedConnections of :mod:`.connection.saved`, which is
            decoded later than the rest, as it knows more of the program.
        commands: how often each command was carried out.
        errors: how many error replies there were, by class.
        accepted: clients ever served.
        turned_away: clients refused.
        uptime: seconds since the first start.
        journal: whether the daemon's journal comes last: it is kept safe by somebody, who would
            start it again.
        store: which service of the service manager keeps it safe, if that does.
    """

    pid: int
    sets: list[SavedSet]
    listeners: list[SavedListener]
    connections: int
    connection_fds: int
    commands: dict[str, int]
    errors: dict[str, int]
    accepted: int
    turned_away: int
    uptime: float
    connection_states: bytes = b""
    journal: bool = False
    store: str | None = None

    @property
    def stored_numbers(self) -> list[int]:
        """The numbers of the stored descriptors, in the order in which they go over."""
        return [fd.number for fdset in self.sets for fd in fdset.fds]

    @property
    def fd_count(self) -> int:
        """How many descriptors go over in all."""
        return len(self.stored_numbers) + len(self.listeners) + self.connection_fds + self.journal


def encode(state: SavedState) -> bytes:
    """*state* as it goes over."""
    return msgspec.msgpack.encode((TAKEOVER_FORMAT, state))


def decode(data: bytes) -> SavedState:
    """What :func:`encode` has made.

    Raises:
        ValueError: it is of another format, or broken.
    """
    try:
        number, raw = msgspec.msgpack.decode(data, type=tuple[int, msgspec.Raw])
        if not 1 <= number <= TAKEOVER_FORMAT:
            raise ValueError(f"its state has format {number}, this version reads {TAKEOVER_FORMAT}")
        return msgspec.msgpack.decode(raw, type=SavedState)
    except msgspec.MsgspecError as exc:
        raise ValueError(f"its state cannot be read: {exc}") from None
