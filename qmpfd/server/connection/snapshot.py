"""A connection as it goes over to another daemon, and as it goes on there."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from itertools import islice

import msgspec
from msgspec import UNSET

from ...commands import Context
from ...commands.events import EventLog
from ...commands.listings import Listing
from ...kernel.fd import Fd
from ...protocol.encode import RawJSON, encode_any
from ...protocol.parser import Parser
from ...protocol.streamed_reply import StreamedReply
from ..saved_state import unpack
from .saved import SavedReply, SavedRest, SavedSession
from .session import Session


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
    send_buffer = session.delivery.send_buffer
    unsent = [*send_buffer.unsent, *send_buffer.uncommitted_queue]
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
    context, delivery = session.context, session.delivery
    context.connection.restore(saved.connection, fds)
    for name in saved.names:
        context.adopt_named(name, next(fds))
    for data, count in saved.unsent:
        delivery.send_buffer.enqueue(data, list(islice(fds, count)))
    if saved.reply is not None:
        context.reply_fds += islice(fds, saved.reply.fds)
    delivery.fd_accounting.update_undelivered()


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
