"""A connection as it goes over to another daemon, and as it goes on there."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import islice

import msgspec
from msgspec import UNSET

from ...commands import Context
from ...commands.events import EventLog, SavedEvent
from ...commands.listings import Listing
from ...fdsets import Peer
from ...kernel.fd import Fd
from ...protocol.encode import RawJSON, encode_any
from ...protocol.parser import Parser
from ...protocol.streamed_reply import StreamedReply
from ..saved_state import unpack
from .saved import SavedReply, SavedSession, SharedParts
from .send_buffer import SendBuffer


def describe(
    peer: Peer,
    groups: frozenset[int],
    idle: float,
    context: Context,
    send_buffer: SendBuffer,
    reply: StreamedReply | None,
    parts: SharedParts,
) -> tuple[SavedSession, list[Fd]]:
    """All that a successor needs to go on, and the descriptors but for the connection's own.

    Args:
        peer: who is at the other end.
        groups: all groups of the peer.
        idle: seconds since it last asked something.
        context: the connection as its commands see it.
        send_buffer: what it has not taken yet.
        reply: the reply in progress.
        parts: where that goes which sessions share.
    """
    connection, fds = context.connection.snapshot()
    unsent = [*send_buffer.unsent, *send_buffer.uncommitted_queue]
    saved = SavedSession(
        peer=peer,
        groups=sorted(groups),
        idle=idle,
        connection=connection,
        names=list(context.names),
        unsent=[(bytes(each.data), len(each.fds)) for each in unsent],
        reply=None if reply is None else _describe_reply(reply, context, parts),
        watch=None if context.events is None else context.events.save(parts.logs),
    )
    fds += context.names.values()
    fds += [fd for each in unsent for fd in each.fds]
    fds += context.reply_fds
    return saved, fds


def _describe_reply(reply: StreamedReply, context: Context, parts: SharedParts) -> SavedReply:
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
        listing, text = reply.result.save(context.shared.clock())
        opaque = None if text is None else parts.text(text)
    return SavedReply(packed, deep_id, reply.written, listing, opaque, len(context.reply_fds))


def restore(
    saved: SavedSession, fds: Iterator[Fd], context: Context, send_buffer: SendBuffer
) -> None:
    """Put a new connection into the state that :func:`describe` gave, but for what needs the
    store, see :func:`restore_reply` and :func:`restore_watch`.

    Args:
        saved: the state.
        fds: the descriptors; as many as there are are taken.
        context: the connection as its commands see it.
        send_buffer: what it has not taken yet.
    """
    context.connection.restore(saved.connection, fds)
    for name in saved.names:
        context.adopt_named(name, next(fds))
    for data, count in saved.unsent:
        send_buffer.enqueue(data, list(islice(fds, count)))
    if saved.reply is not None:
        context.reply_fds += islice(fds, saved.reply.fds)


def restore_reply(saved: SavedReply, context: Context, texts: list[str]) -> StreamedReply:
    """The reply in progress.

    Args:
        saved: its state.
        context: the connection as its commands see it.
        texts: the opaque texts that listings are in the middle of.

    Raises:
        ValueError: it makes no sense.
    """
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


class WatchRestorer:
    """Has connections go on with the events where they were.

    Args:
        logs: the events, for each set of rights there was.
    """

    def __init__(self, logs: list[list[SavedEvent]]) -> None:
        self._logs = logs
        self._sources: dict[EventLog, int] = {}  # which of them each log here goes on with

    def restore(self, saved: SavedSession, context: Context) -> None:
        """Have a connection watch, if it did."""
        watch = saved.watch
        if watch is None:
            return
        context.watch(True)
        assert context.events is not None
        log, events = context.events.log, self._logs[watch.log]
        if log not in self._sources:
            self._sources[log] = watch.log
            log.restore(events)
        if self._sources[log] != watch.log:
            # Its rights are those of others now, who had different ones: what waits is lost to it.
            context.events.restore(0, watch.lost + watch.behind)
            return
        known = min(watch.behind, len(events))
        behind = sum(map(log.may_see, events[len(events) - known :]))
        context.events.restore(behind, watch.lost + watch.behind - known)
        context.shared.on_event()
