"""Bytes and descriptors in, messages with the descriptors that were sent with them out.

The kernel hands over both in chunks: a read ends after the segment that descriptors came with,
and joins whatever plain bytes are queued before it.  So a chunk alone does not tell which of its
messages the descriptors were sent with.  But a read never returns a descriptor before the first
byte that it was sent with: reading up to the end of a message gives that message's descriptors
and no later ones.  Hence the receive buffer is shown the bytes before they are consumed (MSG_PEEK),
plans the reads, and is told afterwards which of them brought descriptors.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, Any, TypeAlias

from ..errors import GenericError
from ..kernel.fd import Fd
from ..limits import READ_BYTES, SLOW_PATH_BYTES
from .pending_fds import PendingFds
from .saved import ReceiveBufferState

if TYPE_CHECKING:
    from .parser import Budget, Parser

#: Decodes a chunk of whole messages at once; None where only the slow path can tell.  A server's
#: gives requests, whose ``takes`` says how many descriptors each takes at most.
ChunkDecoder: TypeAlias = "Callable[[bytes], list[Any] | None]"

#: A value, or its error, and where it ends in the bytes that were seen.
_Found: TypeAlias = "tuple[Any, int]"

_takes = attrgetter("takes")
_WHITESPACE = b" \t\r\n"
#: Where no descriptor came; never changed.
NO_FDS: list[Fd] = []

#: Bytes of lines that are no message each, and are looked at more closely, at 4 us a byte.
_MOST_UNREADABLE = 2 * READ_BYTES

#: Bytes that are decoded in one go where it does not matter with which of them descriptors come.
_STEP = 8 << 10


#: A message that descriptors came with, or should have: a value or typed request, the descriptors
#: that it takes, and if some that it should have had are gone, why.  No other message is a tuple.
Received: TypeAlias = "tuple[Any, list[Fd], str]"


class ReceiveBuffer:
    """What a peer has sent.

    Args:
        decode: the quick way for a chunk of whole messages.
        max_fds: how many descriptors a message takes at most; 0 for one that takes none.
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
        max_fds: Callable[[Any], int],
        *,
        max_bytes: int,
        fds_to_close: list[Fd],
        lines: bool = False,
        budget: Budget | None = None,
        owner: Hashable = None,
    ) -> None:
        self._decode = decode
        self._max_fds = max_fds
        self._budget = budget
        self._owner = owner
        self._parser: Parser | None = None  # made once something is not plain
        self._max_bytes = max_bytes
        #: The descriptors that wait for a command.
        self.pending_fds = PendingFds(fds_to_close)
        #: Complete messages, for whoever asks for them to take from the left: values or typed
        #: requests, or the errors that their texts have; those that have to do with descriptors
        #: are :class:`Received`.
        self.ready: deque[Any] = deque()
        self._reads: list[list[Any]] = []  # planned: the messages that each read completes
        self._whole: list[Any] | None = None  # likewise, of a single read that completes all
        self._behind = 0  # bytes of the segment that are behind the reads planned
        self._segment_left = 0  # of the segment that descriptors came with, the bytes still to see
        self._lines = lines
        self._max_whole = 0 if lines else max_bytes  # bytes that are decoded as whole messages
        self._line = bytearray()  # with lines: an incomplete one

    # -- in ------------------------------------------------------------------------------------

    def plan(self, data: bytes, fds_follow: bool) -> tuple[Sequence[int], int]:
        """Plan how to read *data*, the next bytes of the peer.

        Args:
            data: the bytes, not empty, and not consumed yet.
            fds_follow: whether descriptors come with the last of them.

        Returns:
            The lengths of the reads to make, one after the other until one of them brings
            descriptors; the others bring none.  If *fds_follow*, :meth:`received` is due once they
            are made.  What is behind them is shown again next time; then, how many bytes of that
            are a line end or blanks, which need not be shown if descriptors came before them.
        """
        if self._segment_left:  # newer descriptors come behind it
            data, fds_follow = data[: self._segment_left], False
        elif len(data) > _STEP and not (fds_follow or self._lines):
            data = data[: data.rfind(b"\n", 0, _STEP) + 1 or None]
        size = len(data)
        messages: list[Any] | None = None
        if size <= self._max_whole and (self._parser is None or self._parser.idle):
            messages = self._decode(data)
        if messages is not None and fds_follow:
            if len(messages) < 2 or not any(map(_takes, messages[:-1])):
                # Cut behind the last, the only one that may take descriptors: they may have come
                # with the blank behind it.
                length = len(data.rstrip(_WHITESPACE)) or size
                self._whole = messages
                return (length,), size - length
            messages = None  # it matters where each of them ends
        if messages is None:
            found, size = self._messages(data, fds_follow)
            if fds_follow:
                self._behind = len(data) - size
                return self._cut(found, size), 0
            messages = [value for value, _ in found]
        self._assign_fds(messages)
        if self._segment_left:
            self._segment_left -= size
            self._end_segment()
        return (size,), 0

    def received(self, number: int, fds: list[Fd], lost: str) -> None:
        """The planned reads are made; the messages that they complete are ready.

        Args:
            number: which of them brought descriptors, or should have.
            fds: the descriptors, owned from here on.
            lost: why the kernel dropped some of them; empty if it did not.
        """
        pending = self.pending_fds
        whole, self._whole = self._whole, None
        if whole is not None:
            if whole and fds and not (lost or pending.fds or pending.lost):
                last = whole[-1]
                if len(fds) <= last.takes:  # as nearly always: none waits, and none will
                    whole[-1] = (last, fds, "")
                    self.ready += whole
                    return
            self._reads, self._behind = [whole], 0
        reads, self._reads = self._reads, []
        for index, messages in enumerate(reads):
            if index == number and (fds or lost):
                pending.begin_segment(fds, lost)
                self._segment_left = self._behind
            self._assign_fds(messages)
        if fds or lost:
            self._end_segment()

    def _assign_fds(self, messages: list[Any]) -> None:
        """Have *messages* ready, each with the descriptors that it takes.

        A message whose text is broken takes all descriptors that wait with it: nobody can tell
        any more whom they were for.
        """
        pending = self.pending_fds
        if not (pending.fds or pending.lost):
            self.ready += messages
            return
        for message in messages:
            if type(message) is GenericError:
                pending.discard()
                self.ready.append(message)
            elif most := self._max_fds(message):
                fds, lost = pending.take(most)
                self.ready.append((message, fds, lost))
            else:
                self.ready.append(message)
            pending.end_message()

    def _cut(self, found: list[_Found], size: int) -> list[int]:
        """Cut what was seen behind each message for which it matters: the lengths of the reads."""
        if found and not found[0][1]:
            # It ended before these bytes, and only they tell so: a number, or a bare word.
            self._assign_fds([found.pop(0)[0]])
        sizes: list[int] = []
        at = 0
        messages: list[Any] = []
        for value, end in found:
            messages.append(value)
            if end > at and (type(value) is GenericError or self._max_fds(value)):
                sizes.append(end - at)
                self._reads.append(messages)
                at, messages = end, []
        if at < size:
            sizes.append(size - at)
            self._reads.append(messages)
        else:
            self._reads[-1] += messages
        return sizes

    def _end_segment(self) -> None:
        """If that was all of the segment that descriptors came with, it is over."""
        if not self._segment_left:
            self.pending_fds.end_segment(inside_message=not self._idle or bool(self._line))

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
        values = self._decode(bytes(self._line[: kept + cut])) if cut else None
        if values is not None and (len(values) <= 1 or not fds_follow):
            del self._line[: kept + cut]
            return [(value, cut) for value in values]
        line = bytes(self._line)
        self._line.clear()
        if values is None and len(line) > _MOST_UNREADABLE:
            # A message that is written over several lines begins with a short one.
            return [(GenericError("JSON parse error, no whole message in a long line"), len(data))]
        found: list[_Found] = []
        for value, end in self._feed(line):
            found.append((value, max(end - kept, 0)))
            if type(value) is GenericError:  # that is no server: whatever else it says
                break
        return found

    @property
    def _idle(self) -> bool:
        """Whether what comes next begins a message."""
        return self._parser is None or self._parser.idle

    def _feed(self, data: bytes) -> Iterator[_Found]:
        """Give *data* to the parser."""
        if self._parser is None:
            from .parser import Parser  # noqa: PLC0415 - the short verbs never need it

            self._parser = Parser(self._max_bytes, self._budget, self._owner)
        return (
            (value if error is None else error, end)
            for value, error, end in self._parser.feed(data)
        )

    # -- over ----------------------------------------------------------------------------------

    def snapshot(self) -> tuple[ReceiveBufferState, list[Fd]]:
        """What has come and is not done with, and the descriptors, which stay here; for
        :meth:`restore`.  Complete messages are not in it.
        """
        pending = self.pending_fds
        parser = None if self._idle or self._parser is None else self._parser.snapshot()
        state = ReceiveBufferState(
            parser, len(pending.fds), pending.state, pending.lost, self._segment_left
        )
        return state, pending.fds

    def restore(self, saved: ReceiveBufferState, fds: list[Fd]) -> None:
        """Go on where another was when it gave :meth:`snapshot`; the descriptors are owned here
        from now on.
        """
        if saved.parser is not None:
            self._feed(b"")  # have a parser
            assert self._parser is not None
            self._parser.restore(saved.parser)
        self.pending_fds.restore(fds, saved.segment, saved.lost)
        self._segment_left = saved.segment_left

    def close(self) -> None:
        """The peer is gone: give up what waits."""
        self.pending_fds.discard()
        if self._parser is not None:
            self._parser.close()
