"""Assignment of received descriptors to commands, without bytes and sockets.

Descriptors arrive with a *segment*, the bytes of one sendmsg(2).  They stay pending for the first
command that takes descriptors and ends after the segment's first byte.  Commands of the same
segment take them in order.  If a command has taken some, the rest is discarded when the segment
ends.
"""

from __future__ import annotations

from enum import Enum, auto

from ..kernel.fd import Fd


class SegmentState(Enum):
    """State of the segment that carried the descriptors; the values are part of the takeover
    protocol.
    """

    SPENT = "spent"  #: ended, and a command has taken some: the rest was discarded
    OPEN = "open"  #: some bytes of the segment are still to be read
    OPEN_TAKEN = "open taken"  #: likewise, and a command in the segment has taken some
    STRADDLED = "straddled"  #: ended inside a message that is not complete yet
    STRADDLED_TAKEN = "straddled taken"  #: likewise, and a command in the segment has taken some
    OVER = "over"  #: ended: the descriptors are pending for the next command that takes some


class _Event(Enum):
    TAKE = auto()  # a command takes descriptors
    END = auto()  # the segment ends between two messages
    END_INSIDE = auto()  # the segment ends inside a message
    MESSAGE_END = auto()


#: An event that is not in the table leaves the state unchanged.
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
    """The descriptors of one segment that no command has taken yet."""

    __slots__ = ("fds", "fds_to_close", "lost", "state")

    def __init__(self) -> None:
        #: Descriptors that no command takes; the caller closes them.
        self.fds_to_close: list[Fd] = []
        #: The pending descriptors.
        self.fds: list[Fd] = []
        #: Why descriptors of this segment were lost; empty if none were.
        self.lost = ""
        self.state = SegmentState.SPENT

    def restore(self, fds: list[Fd], state: SegmentState, lost: str) -> None:
        """Restore the state of another instance; *fds* are owned from here on."""
        self.fds, self.state, self.lost = fds, state, lost

    def begin_segment(self, fds: list[Fd], lost: str) -> None:
        """Begin a new segment, and discard the pending descriptors of an older one.

        Args:
            fds: the descriptors that came with the segment.
            lost: why the kernel dropped some of them, or "": if it did, all are discarded.
        """
        self.discard()
        if lost:
            self.fds_to_close += fds
        else:
            self.fds = fds
        self.lost, self.state = lost, SegmentState.OPEN

    def take(self, limit: int) -> tuple[list[Fd], str]:
        """Pop up to *limit* descriptors for a command; return them, and why some were lost."""
        fds, self.fds = self.fds[:limit], self.fds[limit:]
        lost, self.lost = self.lost, ""
        self._move(_Event.TAKE)
        return fds, lost

    def refuse(self, why: str) -> None:
        """Discard the pending descriptors; the command that would take them fails with *why*."""
        if self.fds:
            self.discard()
            self.lost = why

    def end_segment(self, *, inside_message: bool) -> None:
        """End the segment; *inside_message*: whether its last message is still incomplete."""
        self._move(_Event.END_INSIDE if inside_message else _Event.END)

    def end_message(self) -> None:
        """End a message, whose last byte was read."""
        self._move(_Event.MESSAGE_END)

    def _move(self, event: _Event) -> None:
        self.state = _TRANSITIONS.get((self.state, event), self.state)
        if self.state is SegmentState.SPENT:
            self.discard()

    def discard(self) -> None:
        """Move the pending descriptors to those that the caller closes."""
        if self.fds:
            self.fds_to_close += self.fds
            self.fds = []
        self.lost = ""
