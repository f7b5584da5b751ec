"""State of incomplete input, for the transfer to a successor daemon.

Named tuples, which msgspec can encode: the short verbs use the receive buffer without msgspec.
"""

from __future__ import annotations

from typing import NamedTuple

from .pending_fds import SegmentState


class ParserState(NamedTuple):
    """State of a parser inside an incomplete value.

    Args:
        text: the tokens of the value so far; empty if it is discarded.
        discarding: whether the value is discarded up to its end.
        braces: number of open braces, for a discarded value.
        brackets: number of open brackets, for a discarded value.
        lexer_state: the state of the lexer.
        begun: the bytes of the token in progress.
        given_up: whether the value is discarded and its error was not reported yet.
    """

    text: bytes
    discarding: bool
    braces: int
    brackets: int
    lexer_state: int
    begun: bytes
    given_up: bool


class ReceiveBufferState(NamedTuple):
    """State of a receive buffer, without the descriptors themselves.

    Args:
        parser: state of the parser; None if no message is incomplete.
        fds: number of pending descriptors.
        segment: state of the segment that carried them.
        lost: why descriptors of that segment were lost; empty if none were.
        segment_left: number of bytes of that segment that are still to be read.
    """

    parser: ParserState | None
    fds: int
    segment: SegmentState
    lost: str
    segment_left: int
