"""What a paused daemon hands over but for the descriptors: a connection as it goes over to another
daemon, and as it goes on there.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from itertools import islice

import msgspec
from msgspec import UNSET, Struct

from ...commands import Context, Stats
from ...commands.events import Event, EventLog, SavedWatch
from ...commands.listings import Listing, SavedListing
from ...kernel.fd import Fd
from ...protocol.encode import RawJSON, encode_any
from ...protocol.parser import Parser
from ...protocol.server import ConnectionState
from ...protocol.streamed_reply import StreamedReply
from ..saved_state import SavedFd, unpack
from .session import Session


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


def describe(
    session: Session, now: float, logs: Sequence[EventLog], texts: dict[str, int]
) -> tuple[SavedSession, list[int]]:
    """All that a successor needs to go on, and the numbers of the descriptors.

    Args:
        session: the connection.
        now: the time, by the daemon's clock.
        logs: the events that watchers read.
        texts: the opaque texts that listings are in the middle of, which go over once: each with
            its index.
    """
    context, reply = session.context, session.processor.streamed_reply
    connection, fds = context.connection.snapshot()
    unsent = session.processor.unsent
    saved = SavedSession(
        peer=session.peer,
        groups=sorted(session.groups),
        idle=session.idle(now),
        connection=connection,
        names=list(context.names),
        unsent=[(bytes(each.data), len(each.fds)) for each in unsent],
        reply=None if reply is None else _describe_reply(reply, context, now, texts),
        watch=None if context.events is None else context.events.save(logs),
    )
    fds += context.names.values()
    fds += [fd for each in unsent for fd in each.fds]
    fds += context.reply_fds
    return saved, [session.stream.socket.fileno(), *(fd.fileno() for fd in fds)]


def _describe_reply(
    reply: StreamedReply, context: Context, now: float, texts: dict[str, int]
) -> SavedReply:
    members, deep_id = dict(reply.members), b""
    if isinstance(members.get("return"), RawJSON):
        members["return"] = bytes(members["return"])
    try:
        packed = msgspec.msgpack.encode(members)
    except RecursionError:  # an id may be nested as deep as a request
        deep_id = encode_any(members["id"])
        packed = msgspec.msgpack.encode({**members, "id": None})
    listing, opaque = None, None
    if isinstance(reply.result, Listing):
        listing, text = reply.result.save(now)
        opaque = None if text is None else texts.setdefault(text, len(texts))
    return SavedReply(packed, deep_id, reply.written, listing, opaque, len(context.reply_fds))


def restore(session: Session, saved: SavedSession, fds: Iterator[Fd]) -> None:
    """Put a new session into the state that :func:`describe` gave, but for what needs the store,
    see :func:`resume`.

    Args:
        session: the session.
        saved: the state.
        fds: the descriptors; as many as there are are taken.
    """
    context = session.context
    context.connection.restore(saved.connection, fds)
    for name in saved.names:
        context.adopt_named(name, next(fds))
    for data, count in saved.unsent:
        session.send_buffer.enqueue(data, list(islice(fds, count)))
    if saved.reply is not None:
        context.reply_fds += islice(fds, saved.reply.fds)
    session.fd_accounting.update_undelivered()


def resume(
    session: Session, saved: SavedSession, rest: SavedRest, logs: dict[EventLog, int]
) -> None:
    """Go on with the reply in progress and with the events, once all is stored.

    Args:
        session: the session.
        saved: its state.
        rest: what sessions refer to.
        logs: which of the saved ones each log of events here goes on with.

    Raises:
        ValueError: it makes no sense.
    """
    context = session.context
    if saved.reply is not None:
        session.processor.streamed_reply = _restored_reply(saved.reply, context, rest.texts)
    watch = saved.watch
    if watch is None:
        return
    context.watch(True)
    assert context.events is not None
    log, events = context.events.log, rest.logs[watch.log]
    if log not in logs:
        logs[log] = watch.log
        log.restore(events)
    if logs[log] != watch.log:
        # Its rights are those of others now, who had different ones: what waits is lost to it.
        context.events.restore(0, watch.lost + watch.behind)
        return
    known = min(watch.behind, len(events))
    behind = sum(map(log.may_see, events[len(events) - known :]))
    context.events.restore(behind, watch.lost + watch.behind - known)
    context.shared.on_event()


def _restored_reply(saved: SavedReply, context: Context, texts: list[str]) -> StreamedReply:
    members = unpack(saved.members, dict[str, object])
    if saved.deep_id:
        (found,) = Parser(sys.maxsize).feed(saved.deep_id + b"\n")
        members["id"] = found[0]
    returned = members.get("return", UNSET)
    if isinstance(returned, bytes):
        members["return"] = RawJSON(returned)
    if saved.listing is None:
        return StreamedReply(members, None, saved.written)
    shared = context.shared
    listing = Listing(context, saved.listing.query, shared.clock() - saved.listing.age)
    listing.restore(saved.listing, None if saved.opaque is None else texts[saved.opaque])
    return StreamedReply(members, listing, saved.written)
