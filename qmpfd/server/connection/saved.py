"""What a daemon hands over once it is paused, but for the descriptors themselves."""

from __future__ import annotations

from msgspec import Struct

from ...commands import Stats
from ...commands.events import Event, SavedWatch
from ...commands.listings import SavedListing
from ...protocol.server import ConnectionState
from ..saved_state import SavedFd


class SavedReply(Struct, forbid_unknown_fields=True):
    """A reply of which a part was sent; see :class:`qmpfd.protocol.streamed_reply.StreamedReply`.

    Args:
        members: its members, as MessagePack.
        deep_id: its id as JSON, where that is nested too deep for MessagePack; else empty.
        written: bytes that were sent, those of a listing not counted.
        listing: the result, if that is made while it is sent.
        opaque: which of the saved texts the listing is in the middle of.
        fds: how many descriptors go with the next byte.
    """

    members: bytes
    deep_id: bytes
    written: int
    listing: SavedListing | None
    opaque: int | None
    fds: int


class SavedSession(Struct, forbid_unknown_fields=True):
    """A connection.

    Args:
        peer: pid, uid and gid of the client.
        groups: all groups of the client.
        idle: seconds since it connected, or last asked something.
        connection: what has come of it and is not done with.
        names: what its ``getfd`` descriptors are called.
        unsent: what waits to be sent: bytes, and how many descriptors go with the first of them.
        reply: the reply that is to be sent behind that, of which a part was.
        watch: how far it has read the events, if it watches.
    """

    peer: tuple[int, int, int]
    groups: list[int]
    idle: float
    connection: ConnectionState
    names: list[str]
    unsent: list[tuple[bytes, int]]
    reply: SavedReply | None
    watch: SavedWatch | None


class SavedRest(Struct, forbid_unknown_fields=True):
    """What a daemon hands over once it is paused.

    The descriptors follow: all that are stored, by ascending numbers; the listeners'; for each
    session its connection, what waits for a command, what has a name, what waits to be sent, what
    goes with the reply in progress; the journal.

    Args:
        at: when it was so, by CLOCK_MONOTONIC: ages count from then.
        removed: the number of each descriptor that was stored and is no more, or is told of again.
        added: what was stored meanwhile, or is kept until the end of a session, or watched; and all
            that is behind such a one in its set.
        sessions: the connections.
        texts: opaque texts that their listings are in the middle of.
        logs: the events that watchers among them read.
        others: how many descriptors follow those that are stored.
        stats: what has happened so far; *started_at* is by CLOCK_MONOTONIC.
        journal: whether the daemon's journal comes last: it is kept safe by somebody, who would
            start it again.
    """

    at: float
    removed: list[int]
    added: list[SavedFd]
    sessions: list[SavedSession]
    texts: list[str]
    logs: list[list[Event]]
    others: int
    stats: Stats
    journal: bool
