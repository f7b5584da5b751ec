"""Bytes and descriptors in, messages with the descriptors that were sent with them out.

The kernel hands over both in chunks: a read ends after the segment that descriptors came with,
and joins whatever plain bytes are queued before it.  So a chunk alone does not tell which of its
messages the descriptors were sent with.  But a read never returns a descriptor before the first
byte that it was sent with: reading up to the end of a message gives that message's descriptors
and no later ones.  Hence the two steps here: :meth:`Inbox.receive` is shown the bytes before they
are consumed (MSG_PEEK) and says in which pieces to consume them; :meth:`Inbox.attach` takes the
descriptors that came with a piece.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from ..errors import GenericError
from ..fd import Fd
from ..limits import CAREFUL_BYTES
from .claims import Unclaimed

if TYPE_CHECKING:
    from .parser import Budget, Parser, ParserState

#: A value or typed request, or the error that its text has; the descriptors it takes; if some that
#: it should have had are gone, why.
Message: TypeAlias = "tuple[Any, list[Fd], str]"

#: Decodes a chunk of whole messages at once; None where only the careful parser can tell.
ChunkDecoder: TypeAlias = "Callable[[bytes], list[Any] | None]"

#: A value, or its error, and where it ends in the bytes that were seen.
_Found: TypeAlias = "tuple[Any, int]"

_WHITESPACE = b" \t\r\n"
#: Where no descriptor came; never changed.
_NO_FDS: list[Fd] = []


class InboxState(NamedTuple):
    """What has come over a connection and is not done with.

    Args:
        parser: the incomplete message, if there is one.
        fds: the descriptors that wait for a command.
        flags: of those: dropped, taken, open, straddled; see :class:`Unclaimed`.
        segment_left: bytes of their segment that are still to come.
    """

    parser: ParserState | None
    fds: list[Fd]
    flags: list[bool]
    segment_left: int


class _Piece:
    """What one read gives."""

    __slots__ = ("dropped", "ends_segment", "fds", "inside_message", "messages")

    def __init__(self, messages: list[Any]) -> None:
        self.messages = messages
        self.fds = _NO_FDS
        self.dropped = False
        self.ends_segment = False  # the segment that descriptors came with ends with this piece
        self.inside_message = False  # and does so in the middle of a message


class Inbox:
    """What a peer has sent.

    Args:
        decode: the quick way for a chunk of whole messages.
        wanted: how many descriptors a message takes at most; 0 for one that takes none.
        max_bytes: bytes of one message.
        garbage: where descriptors go that nobody takes; its owner closes them.
        lines: every message ends with a line end, so that an incomplete line can wait for the
            rest of it: so do replies, but not requests.
        budget: the memory that incomplete messages share with other connections.
        owner: for whom it is.
    """

    def __init__(
        self,
        decode: ChunkDecoder,
        wanted: Callable[[Any], int],
        *,
        max_bytes: int,
        garbage: list[Fd],
        lines: bool = False,
        budget: Budget | None = None,
        owner: Hashable = None,
    ) -> None:
        self._decode = decode
        self._wanted = wanted
        self._budget = budget
        self._owner = owner
        self._parser: Parser | None = None  # made once something is not plain
        self._max_bytes = max_bytes
        self._unclaimed = Unclaimed(garbage)
        self._garbage = garbage
        self._pieces: list[_Piece] = []
        self._attached = 0
        self._unread = 0  # of what was seen last, the bytes that are looked at again
        self._segment_left = 0  # of the segment that descriptors came with, the bytes still to see
        self._lines = lines
        self._line = bytearray()  # with lines: an incomplete one

    # -- in ------------------------------------------------------------------------------------

    def receive(self, data: bytes, fds_follow: bool) -> list[int]:
        """See *data*, the next bytes of the peer, not consumed yet.

        Args:
            data: the bytes, not empty.
            fds_follow: whether descriptors come with the last of them.

        Returns:
            The lengths of the pieces in which to consume them: one :meth:`attach` for each.  They
            can come to less than *data*: the rest is looked at again next time.
        """
        in_segment = self._segment_left
        if in_segment:
            data = data[:in_segment]
        size = len(data)
        quick = self._by_chunk(data, fds_follow)
        if quick is not None:
            lengths = self._cut_last(quick, data) if fds_follow else self._whole(quick, size)
        else:
            found, size = self._messages(data, fds_follow)
            if fds_follow:
                lengths = self._cut(found, size)
            else:
                lengths = self._whole([value for value, _ in found], size)
        self._unread = len(data) - size
        if in_segment:
            self._segment_left = self._unread
        if (in_segment or fds_follow) and not self._unread:
            self._pieces[-1].ends_segment = True
            self._pieces[-1].inside_message = not self._idle or bool(self._line)
        return lengths

    def _whole(self, values: list[Any], size: int) -> list[int]:
        """All that was read is one piece: no descriptors come with it."""
        self._pieces.append(_Piece(values))
        self._attached = len(self._pieces)
        return [size]

    def _cut_last(self, values: list[Any], data: bytes) -> list[int]:
        """Cut what was read behind the last message, the only one that may take descriptors: they
        may have come with the blank behind it.
        """
        self._attached = len(self._pieces)
        self._pieces.append(_Piece(values))
        end = len(data.rstrip(_WHITESPACE))
        if end in (0, len(data)) or not values:
            return [len(data)]
        self._pieces.append(_Piece([]))
        return [end, len(data) - end]

    def _cut(self, messages: list[_Found], size: int) -> list[int]:
        """Cut what was read behind each message for which it matters; the pieces' lengths."""
        if messages and not messages[0][1]:
            # It ended before these bytes, and only they tell so: a number, or a bare word.
            value, _ = messages.pop(0)
            self._pieces.append(_Piece([value]))
        self._attached = len(self._pieces)
        lengths = []
        at, gathered = 0, []
        for value, end in messages:
            gathered.append(value)
            if end > at and (type(value) is GenericError or self._wanted(value)):
                self._pieces.append(_Piece(gathered))
                lengths.append(end - at)
                at, gathered = end, []
        if gathered or at < size:
            if at < size:
                lengths.append(size - at)
                self._pieces.append(_Piece(gathered))
            else:
                self._pieces[-1].messages += gathered
        return lengths

    def attach(self, fds: list[Fd], dropped: bool) -> None:
        """The next piece was consumed; *fds* came with it, and some were *dropped* or not."""
        piece = self._pieces[self._attached]
        self._attached += 1
        piece.fds, piece.dropped = fds, dropped
        if fds or dropped:
            self._segment_left = self._unread

    def _messages(self, data: bytes, fds_follow: bool) -> tuple[list[_Found], int]:
        """The messages that *data* completes, and how far was read."""
        if self._lines and self._idle:
            return self._by_lines(data, fds_follow), len(data)
        data = data[:CAREFUL_BYTES]
        return list(self._feed(data)), len(data)

    def _by_chunk(self, data: bytes, fds_follow: bool) -> list[Any] | None:
        """All messages of a chunk that holds nothing but whole ones; None where it does not, or
        where it matters where each of them ends: descriptors come, and not just the last takes one.
        """
        if self._lines or not self._idle or len(data) > self._max_bytes:
            return None
        values = self._decode(data)
        if values is None or (fds_follow and any(map(self._wanted, values[:-1]))):
            return None
        return values

    def _by_lines(self, data: bytes, fds_follow: bool) -> list[_Found]:
        """The messages of whole lines; an incomplete one is kept until the rest of it comes."""
        kept = len(self._line)
        cut = data.rfind(b"\n") + 1
        self._line += data
        if not cut and len(self._line) <= self._max_bytes:
            return []
        values = self._decode(bytes(self._line[: kept + cut]))
        if values is not None and (len(values) <= 1 or not fds_follow):
            del self._line[: kept + cut]
            return [(value, cut) for value in values]
        line = bytes(self._line)
        self._line.clear()
        return [(value, max(end - kept, 0)) for value, end in self._feed(line)]

    @property
    def _idle(self) -> bool:
        """Whether what comes next begins a message."""
        return self._parser is None or self._parser.idle

    def _feed(self, data: bytes) -> Iterator[_Found]:
        """Give *data* to the careful parser."""
        if self._parser is None:
            # Loaded when first needed: the short verbs never need it.
            from .parser import Parser  # noqa: PLC0415

            self._parser = Parser(self._max_bytes, self._budget, self._owner)
        return (
            (value if error is None else error, end)
            for value, error, end in self._parser.feed(data)
        )

    # -- out -----------------------------------------------------------------------------------

    def messages(self) -> list[Message]:
        """The complete messages, each with its descriptors, in the order in which they came.

        A message whose text is broken takes all descriptors that wait with it: nobody can tell
        any more whom they were for.
        """
        unclaimed, wanted = self._unclaimed, self._wanted
        found: list[Message] = []
        for piece in self._pieces:
            if piece.fds or piece.dropped:
                unclaimed.arrive(piece.fds, piece.dropped)
            for value in piece.messages:
                if type(value) is GenericError:
                    unclaimed.discard()
                    found.append((value, [], ""))
                elif most := wanted(value):
                    fds, dropped = unclaimed.claim(most)
                    found.append((value, fds, unclaimed.why_dropped if dropped else ""))
                else:
                    found.append((value, [], ""))
                unclaimed.message_ended()
            if piece.ends_segment:
                unclaimed.segment_ended(inside_message=piece.inside_message)
        self._pieces, self._attached = [], 0
        return found

    @property
    def unclaimed_fds(self) -> int:
        """How many descriptors wait for a command."""
        return len(self._unclaimed)

    def refuse_fds(self, why: str) -> None:
        """Give up the descriptors that wait: the command that should have had them is told why."""
        self._unclaimed.refuse(why)

    def snapshot(self) -> InboxState:
        """What has come and is not done with; for :meth:`restore`.  The descriptors stay here.

        Only between two chunks: all complete messages have been asked for.
        """
        assert not self._pieces
        fds, *flags = self._unclaimed.snapshot()
        parser = None if self._idle or self._parser is None else self._parser.snapshot()
        return InboxState(parser, fds, flags, self._segment_left)

    def restore(self, saved: InboxState) -> None:
        """Go on where another was when it gave :meth:`snapshot`; the descriptors are owned here
        from now on.
        """
        if saved.parser is not None:
            self._feed(b"")  # have a parser
            assert self._parser is not None
            self._parser.restore(saved.parser)
        dropped, taken, is_open, straddled = saved.flags
        self._unclaimed.restore(saved.fds, dropped, taken, is_open, straddled)
        self._segment_left = saved.segment_left

    def close(self) -> None:
        """The peer is gone: give up what waits."""
        for piece in self._pieces:
            self._garbage += piece.fds
        self._pieces = []
        self._unclaimed.discard()
        if self._parser is not None:
            self._parser.close()
