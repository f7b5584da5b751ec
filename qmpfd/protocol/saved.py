"""What a peer has sent and is not done with, as it goes over to another process.

Named tuples, which msgspec encodes too: a short verb has a receive buffer, and imports no msgspec.
"""

from __future__ import annotations

from typing import NamedTuple

from .pending_fds import SegmentState


class ParserState(NamedTuple):
    """What a parser has of an incomplete value.

    Args:
        text: its tokens so far.
        discarding: the rest of it is dropped.
        braces: how many of them are open, if it is dropped.
        brackets: the same of brackets.
        lexer_state: where the lexer is.
        begun: what it has of the token in progress.
        given_up: it is dropped, and that is still to be told.
    """

    text: bytes
    discarding: bool
    braces: int
    brackets: int
    lexer_state: int
    begun: bytes
    given_up: bool


class ReceiveBufferState(NamedTuple):
    """What has come over a connection and is not done with, but for the descriptors themselves.

    Args:
        parser: the incomplete message, if there is one.
        fds: how many descriptors wait for a command.
        segment: where the segment is that they came with.
        lost: why descriptors of that segment are gone; empty if none are.
        segment_left: bytes of it that are still to come.
    """

    parser: ParserState | None
    fds: int
    segment: SegmentState
    lost: str
    segment_left: int
