"""Bytes and descriptors in, messages with the descriptors that were sent with them out.

The kernel hands over both in chunks: a read ends after the segment that descriptors came with,
and joins whatever plain bytes are queued before it.  So a chunk alone does not tell which of its
messages the descriptors were sent with.  But a read never returns a descriptor before the first
byte that it was sent with: reading up to the end of a message gives that message's descriptors
and no later ones.  Hence the receive buffer is shown the bytes before they are consumed (MSG_PEEK),
and says in which pieces to consume them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from ..errors import GenericError
from ..kernel.fd import Fd
from ..limits import SLOW_PATH_BYTES
from .pending_fds import PendingFds

if TYPE_CHECKING:
    from .parser import Budget, Parser, ParserState

#: Decodes a chunk of whole messages at once; None where only the careful parser can tell.  A
#: server's gives requests, whose ``takes`` says how many descriptors each takes at most.
ChunkDecoder: TypeAlias = "Callable[[bytes], list[Any] | None]"

#: Consumes so many bytes: these, the descriptors that came with them, and whether the kernel had
#: to drop some.
Read: TypeAlias = "Callable[[int], tuple[bytes, list[Fd], bool]]"

#: A value, or its error, and where it ends in the bytes that were seen.
_Found: TypeAlias = "tuple[Any, int]"

_WHITESPACE = b" \t\r\n"
#: Where no descriptor came; never changed.
NO_FDS: list[Fd] = []

#: Bytes that are decoded in one go where it does not matter with which of them descriptors come.
_A_STEP = 8 << 10


class Received(tuple[Any, list[Fd], str]):
    """A message that descriptors came with, or should have: a value or typed request, the
    descriptors that it takes, and if some that it should have had are gone, why.  No named tuple:
    it takes two calls to make one.
    """

    __slots__ = ()


class ReceiveBufferState(NamedTuple):
    """What has come over a connection and is not done with.

    Args:
        parser: the incomplete message, if there is one.
        fds: the descriptors that wait for a command.
        flags: of those: dropped, taken, open, straddled; see :class:`PendingFds`.
        segment_left: bytes of their segment that are still to come.
    """

    parser: ParserState | None
    fds: list[Fd]
    flags: list[bool]
    segment_left: int


class _Piece:
    """What one read gives: messages, and the descriptors that came with it."""

    fds = NO_FDS
    dropped = False
    ends_segment = False  # the segment that descriptors came with ends with this piece
    inside_message = False  # and does so in the middle of a message

    def __init__(self, messages: list[Any]) -> None:
        self.messages = messages


class ReceiveBuffer:
    """What a peer has sent.

    Args:
        decode: the quick way for a chunk of whole messages.
        wanted: how many descriptors a message takes at most; 0 for one that takes none.
        max_bytes: bytes of one message.
        fds_to_close: where descriptors go that nobody takes; its owner closes them.
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
        fds_to_close: list[Fd],
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
        #: The descriptors that wait for a command.
        self.unclaimed = PendingFds(fds_to_close)
        self._fds_to_close = fds_to_close
        #: Complete messages, for whoever asks for them to take from the left.
        self.ready: deque[Any] = deque()
        #: What was read behind those, and :meth:`look` has to look at.
        self.pieces: list[_Piece] = []
        self._segment_left = 0  # of the segment that descriptors came with, the bytes still to see
        self._lines = lines
        self._line = bytearray()  # with lines: an incomplete one

    # -- in ------------------------------------------------------------------------------------

    def receive(self, data: bytes) -> int:
        """See *data*, the next bytes of the peer, with which no descriptors come.

        Args:
            data: the bytes, not empty, and not consumed yet.

        Returns:
            How many of them to consume; the rest is looked at again next time.
        """
        in_segment = self._segment_left
        if len(data) > _A_STEP and not (in_segment or self._lines):
            data = data[: data.rfind(b"\n", 0, _A_STEP) + 1 or None]
        values = self._decode_whole(data)
        size = len(data)
        if values is None:
            if in_segment:
                data = data[:in_segment]
            found, size = self._messages(data, False)
            values = [value for value, _ in found]
        if self.pieces or self.unclaimed.waits:
            self.pieces.append(_Piece(values))
        else:  # as nearly always: nothing waits, and so nothing can be whose
            self.ready += values
        if in_segment:
            self._segment_left = len(data) - size
            if not self._segment_left:
                self._end_segment()
        return size

    def receive_with_fds(self, data: bytes, read: Read) -> tuple[int, int]:
        """See *data*, the next bytes of the peer, with the last of which descriptors come; consume
        it in pieces, by which it can be told whose they are.

        Args:
            data: the bytes, not empty, and not consumed yet.
            read: consumes so many bytes, and gives what came with them.

        Returns:
            How many bytes were consumed: the rest is looked at again next time.  And how many
            descriptors came: 0 if the kernel had to drop some of them.
        """
        messages = self._decode_whole(data)
        if messages is None:
            return self._receive_carefully(data, read)
        for message in messages[:-1]:
            if message.takes:
                return self._receive_carefully(data, read)
        # Cut behind the last, the only one that may take descriptors: they may have come with the
        # blank behind it.  That is left to be read with what follows.
        size = len(data.rstrip(_WHITESPACE)) or len(data)
        _, fds, dropped = read(size)
        takes = messages[-1].takes if messages else 0
        if len(fds) <= takes and not (dropped or self.pieces or self.unclaimed.waits):
            # As nearly always: nothing waits, and nothing will.
            if fds:
                messages[-1] = Received((messages[-1], fds, ""))
            self.ready += messages
            return size, len(fds)
        piece = _Piece(messages)
        piece.fds, piece.dropped, piece.ends_segment = fds, dropped, size == len(data)
        self.pieces.append(piece)
        if fds or dropped:
            self._segment_left = len(data) - size
        return self._with_blank(data, size, piece, read)

    def _receive_carefully(self, data: bytes, read: Read) -> tuple[int, int]:
        """The same, in as many pieces as it takes."""
        in_segment = self._segment_left
        seen = data[:in_segment] if in_segment else data
        found, size = self._messages(seen, True)
        left = len(seen) - size
        if in_segment:
            self._segment_left = left
        with_fds: _Piece | None = None  # they come all at once, with one of the pieces
        for messages, length in self._cut(found, size):
            piece = _Piece(messages)
            self.pieces.append(piece)
            if length:
                _, piece.fds, piece.dropped = read(length)
                if piece.fds or piece.dropped:
                    self._segment_left = left
                    with_fds = piece
        if not left:
            self._end_segment()
        if with_fds is None:
            return size, 0
        return self._with_blank(data, size, with_fds, read)

    def _with_blank(self, data: bytes, size: int, piece: _Piece, read: Read) -> tuple[int, int]:
        """What :meth:`receive_with_fds` returns, once *size* bytes were consumed, and with *piece*
        the descriptors came.
        """
        if len(piece.fds) > 1 and data[size:].isspace():
            # Some may be too many: that they are nobody's is known with the end of what they were
            # sent with.
            blank = self.receive(data[size:])
            read(blank)
            size += blank
        return size, 0 if piece.dropped else len(piece.fds)

    def _cut(self, found: list[_Found], size: int) -> list[tuple[list[Any], int]]:
        """Cut what was seen behind each message for which it matters: the messages of each piece,
        and its length.
        """
        pieces: list[tuple[list[Any], int]] = []
        if found and not found[0][1]:
            # It ended before these bytes, and only they tell so: a number, or a bare word.
            pieces.append(([found.pop(0)[0]], 0))
        at, gathered = 0, []
        for value, end in found:
            gathered.append(value)
            if end > at and (type(value) is GenericError or self._wanted(value)):
                pieces.append((gathered, end - at))
                at, gathered = end, []
        if at < size:
            pieces.append((gathered, size - at))
        elif gathered:
            pieces[-1][0].extend(gathered)
        return pieces

    def _end_segment(self) -> None:
        """The segment that descriptors came with ends with the last piece."""
        if self.pieces:
            self.pieces[-1].ends_segment = True
            self.pieces[-1].inside_message = not self._idle or bool(self._line)

    def _decode_whole(self, data: bytes) -> list[Any] | None:
        """The messages that *data* is, the quick way; None where it matters where each ends, or
        only the careful parser can tell.
        """
        between = self._parser is None or self._parser.idle
        if not between or self._segment_left or self._lines or len(data) > self._max_bytes:
            return None
        return self._decode(data)

    def _messages(self, data: bytes, fds_follow: bool) -> tuple[list[_Found], int]:
        """The messages that *data* completes, and how far was read."""
        if self._lines and self._idle:
            return self._by_lines(data, fds_follow), len(data)
        data = data[:SLOW_PATH_BYTES]
        return list(self._feed(data)), len(data)

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

    def look(self) -> None:
        """Have all complete messages in :attr:`ready`, in the order in which they came: values or
        typed requests, or the errors that their texts have.  Those that have to do with descriptors
        are :class:`Received`.

        A message whose text is broken takes all descriptors that wait with it: nobody can tell
        any more whom they were for.
        """
        unclaimed, wanted = self.unclaimed, self._wanted
        pieces, self.pieces = self.pieces, []
        found = self.ready
        for piece in pieces:
            if piece.fds or piece.dropped:
                unclaimed.arrive(piece.fds, piece.dropped)
            for value in piece.messages:
                if type(value) is GenericError:
                    unclaimed.discard()
                    found.append(value)
                elif most := wanted(value):
                    fds, dropped = unclaimed.claim(most)
                    lost = unclaimed.why_dropped if dropped else ""
                    found.append(Received((value, fds, lost)))
                else:
                    found.append(value)
                unclaimed.message_ended()
            if piece.ends_segment:
                unclaimed.segment_ended(inside_message=piece.inside_message)

    def snapshot(self) -> ReceiveBufferState:
        """What has come and is not done with; for :meth:`restore`.  The descriptors stay here.

        Only between two chunks: all complete messages have been taken.
        """
        assert not self.pieces
        assert not self.ready
        fds, *flags = self.unclaimed.snapshot()
        parser = None if self._idle or self._parser is None else self._parser.snapshot()
        return ReceiveBufferState(parser, fds, flags, self._segment_left)

    def restore(self, saved: ReceiveBufferState) -> None:
        """Go on where another was when it gave :meth:`snapshot`; the descriptors are owned here
        from now on.
        """
        if saved.parser is not None:
            self._feed(b"")  # have a parser
            assert self._parser is not None
            self._parser.restore(saved.parser)
        dropped, taken, is_open, straddled = saved.flags
        self.unclaimed.restore(saved.fds, dropped, taken, is_open, straddled)
        self._segment_left = saved.segment_left

    def close(self) -> None:
        """The peer is gone: give up what waits."""
        for piece in self.pieces:
            self._fds_to_close += piece.fds
        self.pieces = []
        self.unclaimed.discard()
        if self._parser is not None:
            self._parser.close()
