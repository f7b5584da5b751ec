"""Receive buffer: turns bytes and descriptors into messages, each with its own descriptors.

A recvmsg(2) returns the plain bytes that are queued before a segment with descriptors, joined to
that segment, and ends there.  So one read does not show which of its messages the descriptors were
sent with.  But no read returns a descriptor without the first byte that it was sent with: a read up
to the end of a message returns the descriptors of that message and no later ones.  Therefore
the transport peeks at the bytes (MSG_PEEK), the buffer plans the lengths of the reads, and the
transport reports which of them returned descriptors.
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
    from .budget import Budget
    from .parser import Parser

#: Decodes a chunk of complete messages at once; returns None if the parser has to do it.  The
#: server's returns requests, whose ``takes`` is the maximum number of descriptors.
ChunkDecoder: TypeAlias = "Callable[[bytes], list[Any] | None]"

#: A value or a parse error, and the offset of its end in the peeked bytes.
_Found: TypeAlias = "tuple[Any, int]"

_takes = attrgetter("takes")
_WHITESPACE = b" \t\r\n"
#: The descriptors of a message that has none; never modified.
NO_FDS: list[Fd] = []

#: Maximum bytes of undecodable lines that are passed to the parser, which takes 4 us a byte.
_MAX_PARSED_LINES = 2 * READ_BYTES

#: Bytes that are decoded in one step if no descriptors follow.
_STEP = 8 << 10


#: A message with descriptors, or whose descriptors were lost: a value or typed request, the
#: descriptors, and why some were lost, or "".  No other message is a tuple.
Received: TypeAlias = "tuple[Any, list[Fd], str]"


class ReceiveBuffer:
    """Received input of a connection: complete messages, and the incomplete rest.

    Args:
        decode: the fast path, for a chunk of complete messages.
        max_fds: returns the maximum number of descriptors that a message takes; 0 for none.
        max_bytes: maximum size of a message.
        lines: whether every message ends with a line end, so that an incomplete line is kept
            unparsed: true of replies, not of requests.
        budget: limit of the memory for incomplete messages, shared with other connections.
        owner: the user whom that memory counts for.
    """

    def __init__(
        self,
        decode: ChunkDecoder,
        max_fds: Callable[[Any], int],
        *,
        max_bytes: int,
        lines: bool = False,
        budget: Budget | None = None,
        owner: Hashable = None,
    ) -> None:
        self._decode = decode
        self._max_fds = max_fds
        self._budget = budget
        self._owner = owner
        self._parser: Parser | None = None  # created for the first chunk that *decode* refuses
        self._max_bytes = max_bytes
        #: The received descriptors that no command has taken yet.
        self.pending_fds = PendingFds()
        #: Complete messages, oldest first, for the caller to pop: values, typed requests or parse
        #: errors; those with descriptors, or whose descriptors were lost, are :class:`Received`.
        self.ready: deque[Any] = deque()
        self._reads: list[list[Any]] = []  # the messages that each planned read completes
        self._single_read: list[Any] | None = (
            None  # the same for a plan of one read that completes all
        )
        self._segment_rest = 0  # bytes of the segment that the planned reads leave queued
        self._segment_left = 0  # unread bytes of the segment that carried the pending descriptors
        self._lines = lines
        self._fast_limit = 0 if lines else max_bytes  # size of the largest chunk for the fast path
        self._line = bytearray()  # if lines: the incomplete line

    # -- input ---------------------------------------------------------------------------------

    def plan(self, data: bytes, fds_follow: bool) -> tuple[Sequence[int], int]:
        """Plan the reads of *data*, the bytes at the head of the socket's receive queue.

        Args:
            data: the peeked bytes, not empty.
            fds_follow: whether descriptors come with the last segment of them.

        Returns:
            The lengths of the reads, to be made one by one until one returns descriptors; the bytes
            of the remaining ones are to be discarded.  If *fds_follow*, the caller has to report
            the result to :meth:`received`.  Bytes after the planned reads are peeked at again.
            Second, how many of those bytes are white space: they may be discarded unseen if the
            planned read returns descriptors.
        """
        if self._segment_left:  # read the segment to its end: newer descriptors come after it
            data, fds_follow = data[: self._segment_left], False
        elif len(data) > _STEP and not (fds_follow or self._lines):
            data = data[: data.rfind(b"\n", 0, _STEP) + 1 or None]
        size = len(data)
        messages: list[Any] | None = None
        if size <= self._fast_limit and (self._parser is None or self._parser.idle):
            messages = self._decode(data)
        if messages is not None and fds_follow:
            if len(messages) < 2 or not any(map(_takes, messages[:-1])):
                # Read up to the end of the last message, the only one that may take descriptors:
                # white space after it may belong to a later segment, which carries them instead.
                length = len(data.rstrip(_WHITESPACE)) or size
                self._single_read = messages
                return (length,), size - length
            messages = None  # only the parser shows where each message ends
        if messages is None:
            found, size = self._messages(data, fds_follow)
            if fds_follow:
                self._segment_rest = len(data) - size
                return self._plan_reads(found, size), 0
            messages = [value for value, _ in found]
        self._assign_fds(messages)
        if self._segment_left:
            self._segment_left -= size
            self._end_segment()
        return (size,), 0

    def received(self, number: int, fds: list[Fd], lost: str) -> None:
        """Append the messages that the planned reads complete to :attr:`ready`.

        Args:
            number: index of the read that returned descriptors or lost some.
            fds: the descriptors, owned from here on.
            lost: why the kernel dropped some of them; empty if it did not.
        """
        pending = self.pending_fds
        whole, self._single_read = self._single_read, None
        if whole is not None:
            if whole and fds and not (lost or pending.fds or pending.lost):
                last = whole[-1]
                if len(fds) <= last.takes:  # the usual case: no descriptor is or stays pending
                    whole[-1] = (last, fds, "")
                    self.ready += whole
                    return
            self._reads, self._segment_rest = [whole], 0
        reads, self._reads = self._reads, []
        for index, messages in enumerate(reads):
            if index == number and (fds or lost):
                pending.begin_segment(fds, lost)
                self._segment_left = self._segment_rest
            self._assign_fds(messages)
        if fds or lost:
            self._end_segment()

    def _assign_fds(self, messages: list[Any]) -> None:
        """Append *messages* to :attr:`ready`, each with the pending descriptors that it takes.

        A message with a parse error discards all pending descriptors: which command they were
        sent with can no longer be known.
        """
        pending = self.pending_fds
        if not (pending.fds or pending.lost):
            self.ready += messages
            return
        for message in messages:
            if type(message) is GenericError:
                pending.discard()
                self.ready.append(message)
            elif limit := self._max_fds(message):
                fds, lost = pending.take(limit)
                self.ready.append((message, fds, lost))
            else:
                self.ready.append(message)
            pending.end_message()

    def _plan_reads(self, found: list[_Found], size: int) -> list[int]:
        """Plan a read up to the end of each message that takes or discards descriptors.

        Return the lengths of the reads.
        """
        if found and not found[0][1]:
            # A number or a bare word that ended before these bytes: only the next byte ends it.
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
        """End the segment that carried descriptors, if all of its bytes were read."""
        if not self._segment_left:
            self.pending_fds.end_segment(inside_message=not self._idle or bool(self._line))

    def _messages(self, data: bytes, fds_follow: bool) -> tuple[list[_Found], int]:
        """Return the messages that *data* completes, and the number of bytes examined."""
        if self._lines and self._idle:
            return self._by_lines(data, fds_follow), len(data)
        data = data[:SLOW_PATH_BYTES]
        return list(self._feed(data)), len(data)

    def _by_lines(self, data: bytes, fds_follow: bool) -> list[_Found]:
        """Return the messages of complete lines; keep an incomplete line for the next call."""
        earlier = len(self._line)
        cut = data.rfind(b"\n") + 1
        self._line += data
        if not cut and len(self._line) <= self._max_bytes:
            return []
        values = self._decode(bytes(self._line[: earlier + cut])) if cut else None
        if values is not None and (len(values) <= 1 or not fds_follow):
            del self._line[: earlier + cut]
            return [(value, cut) for value in values]
        line = bytes(self._line)
        self._line.clear()
        if values is None and len(line) > _MAX_PARSED_LINES:
            # A message written over several lines begins with a short line: this one is broken.
            return [(GenericError("JSON parse error, no whole message in a long line"), len(data))]
        found: list[_Found] = []
        for value, end in self._feed(line):
            found.append((value, max(end - earlier, 0)))
            if type(value) is GenericError:  # the peer is no QMP server: ignore the rest
                break
        return found

    @property
    def _idle(self) -> bool:
        """Whether no message is incomplete: the next token begins one."""
        return self._parser is None or self._parser.idle

    def _feed(self, data: bytes) -> Iterator[_Found]:
        """Pass *data* to the parser, which is created if there is none."""
        if self._parser is None:
            from .parser import Parser  # noqa: PLC0415 - the short verbs never need it

            self._parser = Parser(self._max_bytes, self._budget, self._owner)
        return (
            (value if error is None else error, end)
            for value, error, end in self._parser.feed(data)
        )

    # -- takeover and end ----------------------------------------------------------------------

    def snapshot(self) -> tuple[ReceiveBufferState, list[Fd]]:
        """Return the incomplete input and the pending descriptors, for :meth:`restore`.

        The descriptors stay owned by this buffer.  Complete messages are not part of the state.
        """
        pending = self.pending_fds
        parser = None if self._idle or self._parser is None else self._parser.snapshot()
        state = ReceiveBufferState(
            parser, len(pending.fds), pending.state, pending.lost, self._segment_left
        )
        return state, pending.fds

    def restore(self, saved: ReceiveBufferState, fds: list[Fd]) -> None:
        """Restore the state of another buffer's :meth:`snapshot`; own *fds* from here on."""
        if saved.parser is not None:
            self._feed(b"")  # creates the parser
            assert self._parser is not None
            self._parser.restore(saved.parser)
        self.pending_fds.restore(fds, saved.segment, saved.lost)
        self._segment_left = saved.segment_left

    def close(self) -> None:
        """Discard the pending descriptors and the incomplete message."""
        self.pending_fds.discard()
        if self._parser is not None:
            self._parser.close()
