"""Receive queue of a Unix stream socket: the kernel's, and a fake.

Both pass the same tests (``test_receive_buffer.py``), which verify the fake.
"""

from __future__ import annotations

import os
import socket
from collections import deque
from collections.abc import Sequence
from typing import Protocol

from qmpfd.kernel import fd as fd_module
from qmpfd.kernel.fd import Fd, close_all
from qmpfd.limits import READ_BYTES, SEGMENT_BYTES
from qmpfd.protocol.connection import Connection

#: Most bytes of a send in one buffer of Linux (sk_buff) with pages of 4 KiB; descriptors are on the
#: first buffer of a send (``unix_stream_sendmsg``: SKB_MAX_HEAD(0) + UNIX_SKB_FRAGS_SZ).
BUFFER_BYTES = 36544


class Queue(Protocol):
    """Unread data and descriptors of a socket."""

    def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Queue *data*, with duplicates of *fds* on its first byte."""

    def peek(self) -> tuple[bytes, bool]:
        """As :func:`qmpfd.kernel.fd.peek`."""

    def receive(self, count: int) -> tuple[bytes, list[Fd], str]:
        """As :func:`qmpfd.kernel.fd.receive`."""

    def unread_bytes(self) -> int:
        """As :func:`qmpfd.kernel.fd.unread_bytes`."""

    def close(self) -> None:
        """Close the queue, and all descriptors in it."""


class Segment:
    def __init__(self, data: bytes, fds: list[Fd]) -> None:
        self.data = data
        self.fds = fds


class FakeQueue:
    """Fake queue with the rules of ``unix_stream_read_generic``.

    A read joins segments, and ends after a segment that carries descriptors; the read of the
    segment's first byte returns them.
    """

    def __init__(self) -> None:
        self._segments: deque[Segment] = deque()
        #: Number of descriptors that the process may still receive; None: no limit.
        self.room: int | None = None

    def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        assert data
        passed = [Fd(os.dup(number)) for number in fds]
        for at in range(0, len(data), BUFFER_BYTES):
            self._segments.append(Segment(data[at : at + BUFFER_BYTES], passed))
            passed = []

    def peek(self) -> tuple[bytes, bool]:
        if not self._segments:
            raise BlockingIOError
        seen = bytearray()
        for segment in self._segments:
            # The kernel continues when the buffer is full, and reports descriptors further behind.
            seen += segment.data[: READ_BYTES - len(seen)]
            if segment.fds:
                # As kernel.fd.peek: the next peek shows a segment that may continue behind these.
                shown = len(seen) if len(seen) < READ_BYTES else READ_BYTES - SEGMENT_BYTES
                return bytes(seen[:shown]), True
        return bytes(seen), False

    def receive(self, count: int) -> tuple[bytes, list[Fd], str]:
        if not self._segments:
            raise BlockingIOError
        data = bytearray()
        while self._segments and len(data) < count:
            segment = self._segments[0]
            wanted = count - len(data)
            data += segment.data[:wanted]
            segment.data = segment.data[wanted:]
            fds, segment.fds = segment.fds, []
            if not segment.data:
                self._segments.popleft()
            if fds:
                return bytes(data), *self._install(fds)
        return bytes(data), [], ""

    def unread_bytes(self) -> int:
        return sum(len(segment.data) for segment in self._segments)

    def _install(self, fds: list[Fd]) -> tuple[list[Fd], str]:
        if self.room is None:
            return fds, ""
        fit, lost = fds[: self.room], fds[self.room :]
        self.room -= len(fit)
        close_all(lost)
        return fit, fd_module.OUT_OF_FDS if lost else ""

    def close(self) -> None:
        for segment in self._segments:
            close_all(segment.fds)
        self._segments.clear()


class SocketQueue:
    """Queue of a real socket."""

    def __init__(self) -> None:
        self._sender, self._receiver = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self._sender.setblocking(False)
        self._receiver.setblocking(False)

    def detach_receiver(self) -> socket.socket:
        """Return the receiving end; the caller reads and closes it."""
        receiver, self._receiver = self._receiver, self._receiver.dup()
        return receiver

    def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        assert fd_module.send(self._sender, data, fds) == len(data)

    def peek(self) -> tuple[bytes, bool]:
        return fd_module.peek(self._receiver)

    def receive(self, count: int) -> tuple[bytes, list[Fd], str]:
        return fd_module.receive(self._receiver, count)

    def unread_bytes(self) -> int:
        return fd_module.unread_bytes(self._receiver)

    def close(self) -> None:
        self._sender.close()
        self._receiver.close()


def read_once(queue: Queue, connection: Connection) -> bool:
    """Read once, as ``transport.FdStream.receive_nowait``; return False if the queue is empty."""
    try:
        data, fds_follow = queue.peek()
    except BlockingIOError:
        return False
    lengths, blank = connection.plan(data, fds_follow)
    assert 0 < sum(lengths) <= len(data), "a read that consumes nothing is repeated for ever"
    if not fds_follow:
        assert queue.receive(lengths[0])[1:] == ([], ""), "nobody would own them"
        return True
    left = deque(lengths)
    fds: list[Fd] = []
    lost = ""
    while left and not (fds or lost):
        got, fds, lost = queue.receive(left.popleft())
    number = len(lengths) - len(left) - 1
    if rest := sum(left):
        got, surplus, dropped = queue.receive(rest)
        assert (len(got), surplus, dropped) == (rest, [], ""), "nobody would own them"
    connection.received(number, fds, lost)
    if blank and (fds or lost) and queue.unread_bytes() == blank:
        got, surplus, dropped = queue.receive(blank)
        assert (surplus, dropped) == ([], ""), "nobody would own them"
        assert not got.strip()
    return True


class Tags:
    """*count* numbered files: any descriptor shows the number of its file."""

    def __init__(self, count: int) -> None:
        self.fds = [Fd(os.memfd_create(f"tag{number}")) for number in range(count)]
        self._inodes = {os.fstat(fd.fileno()).st_ino: n for n, fd in enumerate(self.fds)}

    def __getitem__(self, number: int) -> int:
        """Return a descriptor of the file with that number."""
        return self.fds[number].fileno()

    def which(self, fd: Fd) -> int:
        """Return the number of the file of *fd*."""
        return self._inodes[os.fstat(fd.fileno()).st_ino]

    def close(self) -> None:
        close_all(self.fds)
