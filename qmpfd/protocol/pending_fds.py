"""Which command gets which descriptor: the rule, apart from bytes and sockets.

Descriptors come with a *segment*, the bytes of one send.  They wait for the first command that
takes some and that ends behind the segment's first byte.  Commands sent in the same segment take
them in order; what is left when the segment is over, and one was taken, belongs to nobody.
"""

from __future__ import annotations

from enum import Enum, auto

from ..kernel.fd import Fd


class SegmentState(Enum):
    """Where the segment is that the descriptors came with; the values go over in a takeover."""

    SPENT = "spent"  #: over, and a command has taken some: whatever else there was is given up
    OPEN = "open"  #: more of its bytes are to come
    OPEN_TAKEN = "open taken"  #: likewise, and a command in it has taken some
    STRADDLED = "straddled"  #: over, but the message that it ended in is not
    STRADDLED_TAKEN = "straddled taken"  #: likewise, and a command in it has taken some
    OVER = "over"  #: the descriptors wait for the next command that takes some


class _Event(Enum):
    TAKE = auto()  # a command takes descriptors
    END = auto()  # the segment ends between two messages
    END_INSIDE = auto()  # the segment ends inside of a message
    MESSAGE_END = auto()


#: What is not here leaves the state as it is.
_TRANSITIONS = {
    (SegmentState.OVER, _Event.TAKE): SegmentState.SPENT,
    (SegmentState.OPEN, _Event.TAKE): SegmentState.OPEN_TAKEN,
    (SegmentState.OPEN, _Event.END): SegmentState.OVER,
    (SegmentState.OPEN, _Event.END_INSIDE): SegmentState.STRADDLED,
    (SegmentState.OPEN_TAKEN, _Event.END): SegmentState.SPENT,
    (SegmentState.OPEN_TAKEN, _Event.END_INSIDE): SegmentState.STRADDLED_TAKEN,
    (SegmentState.STRADDLED, _Event.TAKE): SegmentState.STRADDLED_TAKEN,
    (SegmentState.STRADDLED, _Event.MESSAGE_END): SegmentState.OVER,
    (SegmentState.STRADDLED_TAKEN, _Event.MESSAGE_END): SegmentState.SPENT,
}


class PendingFds:
    """The descriptors of one segment that no command has taken yet.

    Args:
        fds_to_close: where those go that nobody will take; its owner closes them.
    """

    __slots__ = ("_fds_to_close", "fds", "lost", "state")

    def __init__(self, fds_to_close: list[Fd]) -> None:
        self._fds_to_close = fds_to_close
        #: Those that wait.
        self.fds: list[Fd] = []
        #: Why descriptors of this segment are gone; empty if none are.
        self.lost = ""
        self.state = SegmentState.SPENT

    def restore(self, fds: list[Fd], state: SegmentState, lost: str) -> None:
        """Go on where another was; *fds* are owned from here on."""
        self.fds, self.state, self.lost = fds, state, lost

    def begin_segment(self, fds: list[Fd], lost: str) -> None:
        """A new segment begins; what still waits of an older one is given up.

        Args:
            fds: what came with it.
            lost: why the kernel dropped some of them, if it did: then none is kept.
        """
        self.discard()
        if lost:
            self._fds_to_close += fds
        else:
            self.fds = fds
        self.lost, self.state = lost, SegmentState.OPEN

    def take(self, most: int) -> tuple[list[Fd], str]:
        """Those that a command gets which takes up to *most*, and why some are missing, if so."""
        fds, self.fds = self.fds[:most], self.fds[most:]
        lost, self.lost = self.lost, ""
        self._move(_Event.TAKE)
        return fds, lost

    def refuse(self, why: str) -> None:
        """Give up what waits; the command that should have had it is told *why*."""
        if self.fds:
            self.discard()
            self.lost = why

    def end_segment(self, *, inside_message: bool) -> None:
        """The last byte of the segment was seen; *inside_message*: a message goes on after it."""
        self._move(_Event.END_INSIDE if inside_message else _Event.END)

    def end_message(self) -> None:
        """A message is complete."""
        self._move(_Event.MESSAGE_END)

    def _move(self, event: _Event) -> None:
        self.state = _TRANSITIONS.get((self.state, event), self.state)
        if self.state is SegmentState.SPENT:
            self.discard()

    def discard(self) -> None:
        """Give up what waits."""
        if self.fds:
            self._fds_to_close += self.fds
            self.fds = []
        self.lost = ""
