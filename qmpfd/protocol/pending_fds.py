"""Which command gets which descriptor: the rule, apart from bytes and sockets.

Descriptors come with a *segment*, the bytes of one send.  They wait for the first command that
takes some and that ends behind the segment's first byte.  Commands sent in the same segment take
them in order; what is left when the segment is over, and one was taken, belongs to nobody.
"""

from __future__ import annotations

from ..kernel.fd import Fd

#: What the command is told whose descriptors the kernel had to drop (MSG_CTRUNC).
LOST = "File descriptors sent via SCM_RIGHTS were lost: the receiver is out of file descriptors"


class PendingFds:
    """The descriptors of one segment that no command has taken yet.

    Args:
        fds_to_close: where those go that nobody will take; its owner closes them.
    """

    __slots__ = ("_dropped", "_fds_to_close", "_open", "_straddled", "_taken", "fds", "why_dropped")

    def __init__(self, fds_to_close: list[Fd]) -> None:
        self._fds_to_close = fds_to_close
        #: Those that wait.
        self.fds: list[Fd] = []
        self._dropped = False  # descriptors of this segment are gone
        #: Why they are.
        self.why_dropped = LOST
        self._taken = False  # a command of this segment has taken some
        self._open = False  # more of the segment, or of the message it ended in, is to come
        self._straddled = False  # the segment ended inside of a message

    def snapshot(self) -> tuple[list[Fd], bool, bool, bool, bool]:
        """All there is; for :meth:`restore`."""
        return list(self.fds), self._dropped, self._taken, self._open, self._straddled

    def restore(
        self, fds: list[Fd], dropped: bool, taken: bool, is_open: bool, straddled: bool
    ) -> None:
        """Go on where another was when it gave :meth:`snapshot`; *fds* are owned from here on."""
        self.fds = fds
        self._dropped, self._taken = dropped, taken
        self._open, self._straddled = is_open, straddled

    @property
    def waits(self) -> bool:
        """Whether the next command that takes some gets them, or is told that they are lost."""
        return self._dropped or bool(self.fds)

    def arrive(self, fds: list[Fd], dropped: bool) -> None:
        """A new segment begins; what still waits of an older one is given up.

        Args:
            fds: what came with it.
            dropped: whether the kernel dropped some of them (MSG_CTRUNC): then none is kept.
        """
        self.discard()
        if dropped:
            self._fds_to_close += fds
        else:
            self.fds = fds
        self._dropped, self.why_dropped = dropped, LOST
        self._open = True
        self._taken = self._straddled = False

    def claim(self, most: int) -> tuple[list[Fd], bool]:
        """A command that takes up to *most* descriptors: those that it gets, and whether some
        were dropped on the way.
        """
        fds, self.fds = self.fds[:most], self.fds[most:]
        dropped, self._dropped = self._dropped, False
        self._taken = True
        if not self._open:
            self.discard()
        return fds, dropped

    def refuse(self, why: str) -> None:
        """Give up what waits; the command that should have had it is told *why*."""
        if self.fds:
            self.discard()
            self._dropped, self.why_dropped = True, why

    def segment_ended(self, *, inside_message: bool) -> None:
        """The last byte of the segment was seen; *inside_message*: a message goes on after it."""
        if inside_message:
            self._straddled = True
        else:
            self._close()

    def message_ended(self) -> None:
        """A message is complete."""
        if self._straddled:
            self._close()

    def _close(self) -> None:
        self._open = self._straddled = False
        if self._taken:
            self.discard()

    def discard(self) -> None:
        """Give up what waits."""
        if self.fds:
            self._fds_to_close += self.fds
            self.fds = []
        self._dropped = False
