"""Send buffer: joins data, keeps the order, and queues what the socket does not take."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Sequence

import pytest
import trio

from qmpfd.commands import DECODER, Context
from qmpfd.fdsets import PERMANENT, Lifetime, Peer
from qmpfd.kernel.fd import Fd, FileDescriptorLike, close_all
from qmpfd.limits import MAX_UNSENT_BYTES
from qmpfd.policy import EVERYTHING
from qmpfd.protocol.server import ServerConnection
from qmpfd.server.connection.send_buffer import SendBuffer, Unsent
from qmpfd.server.lifecycle import Event
from qmpfd.server.server import DaemonServer
from qmpfd.transport import FdStream


class _Stream(FdStream):
    """A stream that takes *room* bytes, and records each send."""

    def __init__(self, sock: trio.socket.SocketType, room: int) -> None:
        super().__init__(sock)
        self.room = room
        self.sent: list[tuple[bytes, int]] = []

    def send_nowait(self, data: bytes | memoryview, fds: Sequence[FileDescriptorLike] = ()) -> int:
        part = bytes(data[: self.room])
        if part:
            self.sent.append((part, len(fds)))
            self.room -= len(part)
        return len(part)


class Harness:
    """A send buffer and its stream."""

    def __init__(self, room: int = 1 << 30) -> None:
        self.server = DaemonServer()
        self.server.lifecycle.handle(Event.START)
        ours, self.its = trio.socket.socketpair()
        self.stream = _Stream(ours, room)
        self.context = self.connected()
        self.fds_to_close = self.context.connection.fds_to_close
        self.send_buffer = SendBuffer(
            *(self.server.services, self.stream, Peer(1, 0, 0), self.context),
            on_drained=lambda: None,
        )

    def connected(self) -> Context:
        """Return the context of a connection."""
        connection = ServerConnection(DECODER)
        return Context(self.server.daemon, connection, Peer(1, 0, 0), EVERYTHING, lambda: False)

    def take(self, lifetime: Lifetime = PERMANENT) -> Fd:
        """Store a descriptor, remove it, and enqueue it with a reply."""
        daemon, fds = self.server.daemon, [_fd()]
        (stored,) = daemon.add(list(fds), opaque="o", lifetime=lifetime)
        daemon.remove([stored], "removed", [])
        self.send_buffer.enqueue(Unsent(b"{reply}\r\n", fds, lambda _: b"<refused>", stored))
        return fds[0]

    async def __aenter__(self) -> Harness:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self.send_buffer.discard()
        close_all(self.fds_to_close)
        self.stream.close()
        self.its.close()
        self.server.close()


def _fd() -> Fd:
    return Fd(os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC))


async def test_drain_joins_data() -> None:
    async with Harness() as harness:
        for data in (b"a", b"b", b"c"):
            harness.send_buffer.enqueue(Unsent(data))
        assert harness.stream.sent == []
        await harness.send_buffer.drain()
        assert harness.stream.sent == [(b"abc", 0)]
        assert harness.send_buffer.size == 0


async def test_write_sends_what_the_socket_takes() -> None:
    """``write`` sends what the socket takes, and queues the rest."""
    async with Harness(room=4) as harness:
        harness.send_buffer.write(b"abc")
        harness.send_buffer.write(b"")
        assert harness.stream.sent == [(b"abc", 0)]
        assert harness.send_buffer.size == 0
        harness.send_buffer.write(b"def")
        assert harness.stream.sent[1:] == [(b"d", 0)]
        assert harness.send_buffer.size == 2
        harness.stream.room = 10
        harness.send_buffer.write(b"ghi")
        assert harness.stream.sent[2:] == [(b"efghi", 0)]
        assert harness.send_buffer.size == 0


async def test_write_sends_queued_data_first() -> None:
    """``write`` sends queued data first, and nothing when paused or discarding."""
    async with Harness() as harness:
        harness.send_buffer.enqueue(Unsent(b"a"))
        harness.send_buffer.write(b"b")
        assert harness.stream.sent == [(b"ab", 0)]
        harness.send_buffer.write(b"c")
        harness.server.lifecycle.handle(Event.OFFER)
        harness.server.lifecycle.handle(Event.PAUSE)
        harness.send_buffer.write(b"d")
        assert harness.stream.sent[1:] == [(b"c", 0)]
        harness.server.lifecycle.handle(Event.RESUME)
        harness.send_buffer.flush_nowait()
        assert harness.stream.sent[2:] == [(b"d", 0)]
        harness.send_buffer.discard()
        harness.send_buffer.write(b"e")
        assert harness.stream.sent[3:] == []
        assert harness.send_buffer.size == 0


async def test_descriptors_begin_a_new_send() -> None:
    """Each reply with descriptors begins a send: they arrive with the send's first byte."""
    async with Harness() as harness:
        one, two = _fd(), _fd()
        for data, fds in ((b"a", []), (b"b", [one]), (b"c", []), (b"d", [two]), (b"e", [])):
            harness.send_buffer.enqueue(Unsent(data, fds))
        await harness.send_buffer.drain()
        assert harness.stream.sent == [(b"a", 0), (b"bc", 1), (b"de", 1)]
        assert one.closed
        assert two.closed


async def test_unsent_data_stays_queued() -> None:
    async with Harness(room=3) as harness:
        fd = _fd()
        harness.send_buffer.enqueue(Unsent(b"abcd", [fd]))
        harness.send_buffer.enqueue(Unsent(b"ef"))
        harness.send_buffer.flush_nowait()
        assert harness.stream.sent == [(b"abc", 1)]
        assert fd.closed  # sent with the first byte
        assert harness.send_buffer.size == 3
        harness.stream.room = 100
        harness.send_buffer.flush_nowait()
        assert harness.stream.sent[1:] == [(b"def", 0)]


async def test_nothing_is_sent_while_paused() -> None:
    async with Harness() as harness:
        harness.send_buffer.enqueue(Unsent(b"a"))
        for event in (Event.OFFER, Event.PAUSE):
            harness.server.lifecycle.handle(event)
        await harness.send_buffer.drain()
        harness.send_buffer.flush_nowait()
        assert harness.stream.sent == []
        harness.server.lifecycle.handle(Event.RESUME)
        await harness.send_buffer.drain()
        assert harness.stream.sent == [(b"a", 0)]


async def test_two_tasks_that_send(autojump_clock: trio.testing.MockClock) -> None:
    """Data of two tasks, replies and events, is sent whole and in order."""
    async with Harness(room=1) as harness:

        async def send(data: bytes) -> None:
            harness.send_buffer.enqueue(Unsent(data))
            await harness.send_buffer.drain()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send, b"abc")
            nursery.start_soon(send, b"def")
            await trio.testing.wait_all_tasks_blocked()
            harness.stream.room = 100
        output = b"".join(data for data, _ in harness.stream.sent)
        assert sorted((output[:3], output[3:])) == [b"abc", b"def"]


async def test_a_buffer_above_its_limit_is_discarded(caplog: pytest.LogCaptureFixture) -> None:
    async with Harness(room=0) as harness:
        fd = _fd()
        harness.send_buffer.enqueue(Unsent(bytes(MAX_UNSENT_BYTES + 1), [fd]))
        harness.send_buffer.flush_nowait()
        assert harness.send_buffer.discarding
        assert harness.fds_to_close == [fd]
        assert "does not read its replies" in caplog.text
        other = _fd()
        harness.send_buffer.enqueue(Unsent(b"a", [other]))
        assert other.closed


async def test_an_error_replaces_a_reply_whose_descriptors_cannot_be_sent() -> None:
    """An error reply replaces the reply; data behind it is sent too."""

    class Refusing(_Stream):
        def send_nowait(
            self, data: bytes | memoryview, fds: Sequence[FileDescriptorLike] = ()
        ) -> int:
            if fds:
                raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
            return super().send_nowait(data, fds)

    async with Harness() as harness:
        harness.stream.__class__ = Refusing
        one, two = _fd(), _fd()
        for wait in (False, True):
            harness.send_buffer.enqueue(Unsent(b"a"))
            harness.send_buffer.enqueue(
                Unsent(b"bb", [one], lambda error: b"<%b>" % error.desc.encode()[-13:])
            )
            harness.send_buffer.enqueue(Unsent(b"c"))
            if wait:
                await harness.send_buffer.drain()
            else:
                harness.send_buffer.flush_nowait()
            assert b"".join(data for data, _ in harness.stream.sent) == b"a<not permitted>c"
            assert harness.send_buffer.size == harness.send_buffer.undelivered_fds == 0
            assert one.closed
            harness.stream.sent.clear()
            one, two = two, one


async def test_a_removed_fd_is_closed_before_the_end_of_its_reply() -> None:
    async with Harness() as harness:
        fd = harness.take()
        harness.send_buffer.enqueue(Unsent(b"next"))
        harness.send_buffer.flush_nowait()
        assert harness.stream.sent == [(b"{reply", 1), (b"}\r\nnext", 0)]
        assert fd.closed


async def test_the_end_of_the_reply_waits_for_a_close_that_may_block() -> None:
    async with Harness() as harness:
        fd = harness.take()
        closed = threading.Event()  # set when another process has closed its duplicate
        harness.server.daemon.closer.close_after(fd, closed)
        harness.send_buffer.flush_nowait()
        harness.send_buffer.enqueue(Unsent(b"next"))
        harness.send_buffer.flush_nowait()
        assert harness.stream.sent == [(b"{reply", 1)]
        assert harness.server.daemon.closer.pending == 1
        closed.set()
        await harness.send_buffer.drain()
        assert harness.stream.sent == [(b"{reply", 1), (b"}\r\nnext", 0)]
        assert fd.closed


async def test_an_undelivered_fd_is_stored_again() -> None:
    async with Harness(room=0) as harness:
        number = harness.take().number
        harness.send_buffer.flush_nowait()
        assert harness.server.store.fd_count == 0
        harness.send_buffer.discard()
        assert harness.fds_to_close == []
        (fdset,) = harness.server.store
        assert (fdset.id, fdset.fds[number].opaque) == (0, "o")
        harness.take()  # discarding: stored again at once
        assert [len(fdset.fds) for fdset in harness.server.store] == [1, 1]


async def test_an_undelivered_fd_does_not_join_a_new_set_of_its_id() -> None:
    async with Harness(room=0) as harness:
        number = harness.take().number
        harness.server.daemon.add([_fd()])
        harness.send_buffer.discard()
        assert [fdset.id for fdset in harness.server.store if number in fdset.fds] == [1]


async def test_an_undelivered_fd_of_a_closed_connection_is_not_stored_again() -> None:
    async with Harness(room=0) as harness:
        owner = harness.connected()
        fd = harness.take(Lifetime(owner=owner))
        owner.close()
        harness.send_buffer.discard()
        assert harness.fds_to_close == [fd]
        assert harness.server.store.fd_count == 0
