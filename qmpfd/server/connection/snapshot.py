"""Takeover: the saved state of a session, written by the paused predecessor and restored by the
successor.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from itertools import islice

from msgspec import UNSET, Struct

from ...commands import Context, Stats
from ...commands.events import Event, EventLog, SavedWatch
from ...commands.listings import Listing, SavedListing
from ...kernel.fd import Fd
from ...protocol.encode import RawJSON, encode_any
from ...protocol.parser import Parser
from ...protocol.server import ConnectionState
from ...protocol.streamed_reply import StreamedReply
from ..saved_state import SavedFd, pack, unpack
from .send_buffer import Unsent
from .session import Session


class SavedReply(Struct, forbid_unknown_fields=True):
    """A partly sent reply, see :class:`qmpfd.protocol.streamed_reply.StreamedReply`.

    Args:
        members: the members of the reply, as MessagePack.
        deep_id: the id as JSON, if it is nested too deep for MessagePack; else empty.
        written: number of bytes sent, without those of a listing.
        listing: the position in the listing, if the result is one.
        opaque: index of the saved opaque text that the listing has sent a part of.
        fds: number of descriptors to attach to the next byte.
    """

    members: bytes
    deep_id: bytes
    written: int
    listing: SavedListing | None
    opaque: int | None
    fds: int


class SavedSession(Struct, forbid_unknown_fields=True):
    """A session.

    Args:
        peer: pid, uid and gid of the client.
        groups: all groups of the client.
        idle: seconds since the last request, or since the client connected.
        connection: the protocol state: half-read input, complete requests, unclaimed descriptors.
        names: the names of the ``getfd`` descriptors.
        unsent: the send buffer: bytes, and the number of descriptors to attach to their first one.
        reply: the reply in progress, to be continued behind *unsent*.
        watch: the position in the events, if the client watches.
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
    """The second half of a takeover, sent once the predecessor is paused.

    The descriptors follow in this order: all stored ones by ascending numbers; the listeners'; for
    each session its socket, its unclaimed descriptors, its named ones, those of its send buffer,
    those of the reply in progress; the journal.

    Args:
        at: the time of this snapshot, by CLOCK_MONOTONIC: ages count from then.
        removed: numbers of descriptors in the first half that are removed, or repeated in *added*.
        added: descriptors stored since the first half, with lifetime "connection" or watched for
            hang-up, and all that are behind one of these in its set.
        sessions: the sessions.
        texts: opaque texts that listings have sent a part of.
        logs: the events that the watching sessions read.
        others: number of descriptors that follow the stored ones.
        stats: the counters; *started_at* is by CLOCK_MONOTONIC.
        journal: whether the daemon's journal is the last descriptor: it has an fd store.
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
    """Return the saved state of *session*, and the numbers of the descriptors that go with it.

    Args:
        session: the session.
        now: the time, by the daemon's clock.
        logs: the events that watchers read.
        texts: the index of each opaque text that a listing has sent a part of; each is saved once.
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
        packed = bytes(pack(members))
    except RecursionError:  # an id may be nested as deep as a request
        deep_id = encode_any(members["id"])
        packed = bytes(pack({**members, "id": None}))
    listing, opaque = None, None
    if isinstance(reply.result, Listing):
        listing, text = reply.result.save(now)
        opaque = None if text is None else texts.setdefault(text, len(texts))
    return SavedReply(packed, deep_id, reply.written, listing, opaque, len(context.reply_fds))


def restore(session: Session, saved: SavedSession, fds: Iterator[Fd]) -> None:
    """Restore what :func:`describe` has saved, without what needs the store, see :func:`resume`.

    Args:
        session: the new session.
        saved: the state.
        fds: the descriptors; those of the session are taken off.
    """
    context = session.context
    context.connection.restore(saved.connection, fds)
    for name in saved.names:
        context.adopt_named(name, next(fds))
    for data, count in saved.unsent:
        session.send_buffer.enqueue(Unsent(data, list(islice(fds, count))))
    if saved.reply is not None:
        context.reply_fds += islice(fds, saved.reply.fds)
    session.fd_accounting.update_undelivered()


def resume(
    session: Session, saved: SavedSession, rest: SavedRest, logs: dict[EventLog, int]
) -> None:
    """Restore the reply in progress and the watch; the store is complete by now.

    Args:
        session: the session.
        saved: its state.
        rest: the texts and logs that *saved* refers to by index.
        logs: the index of the saved log that each event log here continues.

    Raises:
        ValueError: the saved state is inconsistent.
    """
    context = session.context
    if saved.reply is not None:
        reply = _restored_reply(saved.reply, context, rest.texts)
        session.processor.streamed_reply = reply
        session.processor.unfinished_request = None, reply.members.get("id", UNSET)
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
        # Under the new policy the client shares the log of clients that had other rights: its
        # pending events are counted as lost.
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
