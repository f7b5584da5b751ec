"""A connection as it goes over to another daemon, and as it goes on there."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from msgspec import structs

from ...commands import Context
from ...fdsets import Peer
from ...kernel.fd import Fd
from ...protocol.parser import ParserState
from ...protocol.receive_buffer import ReceiveBufferState
from ...protocol.server import ConnectionState
from ..saved_state import SavedParser, SavedSession
from .send_buffer import SendBuffer


def describe(
    peer: Peer, groups: frozenset[int], idle: float, context: Context, send_buffer: SendBuffer
) -> tuple[SavedSession, list[Fd]]:
    """All that a successor needs to go on, and the descriptors but for the connection's own.

    Args:
        peer: who is at the other end.
        groups: all groups of the peer.
        idle: seconds since it last asked something.
        context: the connection as its commands see it.
        send_buffer: what it has not taken yet.
    """
    connection = context.connection.snapshot()
    receive_buffer, parser = connection.receive_buffer, connection.receive_buffer.parser
    events = context.events
    while events is not None and (waiting := events.next_batch()):
        send_buffer.put(waiting)  # sent by us, if nobody takes over
    unsent = [(bytes(data), fds) for data, fds in [*send_buffer.unsent, *send_buffer.held]]
    saved = SavedSession(
        peer=peer,
        groups=sorted(groups),
        idle=idle,
        state=connection.state,
        oob_enabled=connection.oob_enabled,
        errors_in_a_row=connection.errors_in_a_row,
        parser=None if parser is None else SavedParser(*parser),
        unclaimed=len(receive_buffer.fds),
        segment=receive_buffer.segment,
        lost=receive_buffer.lost,
        segment_left=receive_buffer.segment_left,
        names=list(context.names),
        watching=events is not None,
        unsent=[(data, len(fds)) for data, fds in unsent],
    )
    fds = [*receive_buffer.fds, *context.names.values()]
    fds += [fd for _, those in unsent for fd in those]
    return saved, fds


def restore(
    saved: SavedSession, fds: Iterator[Fd], context: Context, send_buffer: SendBuffer
) -> None:
    """Put a new connection into the state that :func:`describe` gave.

    Args:
        saved: the state.
        fds: the descriptors; as many as there are are taken.
        context: the connection as its commands see it.
        send_buffer: what it has not taken yet.
    """
    parser = None if saved.parser is None else ParserState(*structs.astuple(saved.parser))
    receive_buffer = ReceiveBufferState(
        parser, list(islice(fds, saved.unclaimed)), saved.segment, saved.lost, saved.segment_left
    )
    context.connection.restore(
        ConnectionState(saved.state, saved.oob_enabled, saved.errors_in_a_row, receive_buffer)
    )
    for name in saved.names:
        context.adopt_named(name, next(fds))
    for data, count in saved.unsent:
        send_buffer.put(data, list(islice(fds, count)))
