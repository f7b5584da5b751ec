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
from qmpfd.server.connection.send_buffer import SendBuffer
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
        self.send_buffer.enqueue(b"{reply}\r\n", fds, lambda _: b"<refused>", stored)
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
    async with Harness() as rig:
        for data in (b"a", b"b", b"c"):
            rig.send_buffer.enqueue(data)
        assert rig.stream.sent == []
        await rig.send_buffer.drain()
        assert rig.stream.sent == [(b"abc", 0)]
        assert rig.send_buffer.size == 0


async def test_write_sends_what_the_socket_takes() -> None:
    """``write`` sends what the socket takes, and queues the rest."""
    async with Harness(room=4) as rig:
        rig.send_buffer.write(b"abc")
        rig.send_buffer.write(b"")
        assert rig.stream.sent == [(b"abc", 0)]
        assert rig.send_buffer.size == 0
        rig.send_buffer.write(b"def")
        assert rig.stream.sent[1:] == [(b"d", 0)]
        assert rig.send_buffer.size == 2
        rig.stream.room = 10
        rig.send_buffer.write(b"ghi")
        assert rig.stream.sent[2:] == [(b"efghi", 0)]
        assert rig.send_buffer.size == 0


async def test_write_sends_queued_data_first() -> None:
    """``write`` sends queued data first, and nothing when paused or discarding."""
    async with Harness() as rig:
        rig.send_buffer.enqueue(b"a")
        rig.send_buffer.write(b"b")
        assert rig.stream.sent == [(b"ab", 0)]
        rig.send_buffer.write(b"c")
        rig.server.lifecycle.handle(Event.OFFER)
        rig.server.lifecycle.handle(Event.PAUSE)
        rig.send_buffer.write(b"d")
        assert rig.stream.sent[1:] == [(b"c", 0)]
        rig.server.lifecycle.handle(Event.RESUME)
        rig.send_buffer.flush_nowait()
        assert rig.stream.sent[2:] == [(b"d", 0)]
        rig.send_buffer.discard()
        rig.send_buffer.write(b"e")
        assert rig.stream.sent[3:] == []
        assert rig.send_buffer.size == 0


async def test_descriptors_begin_a_new_send() -> None:
    """Each reply with descriptors begins a send: they arrive with the send's first byte."""
    async with Harness() as rig:
        one, two = _fd(), _fd()
        for data, fds in ((b"a", []), (b"b", [one]), (b"c", []), (b"d", [two]), (b"e", [])):
            rig.send_buffer.enqueue(data, fds)
        await rig.send_buffer.drain()
        assert rig.stream.sent == [(b"a", 0), (b"bc", 1), (b"de", 1)]
        assert one.closed
        assert two.closed


async def test_unsent_data_stays_queued() -> None:
    async with Harness(room=3) as rig:
        fd = _fd()
        rig.send_buffer.enqueue(b"abcd", [fd])
        rig.send_buffer.enqueue(b"ef")
        rig.send_buffer.flush_nowait()
        assert rig.stream.sent == [(b"abc", 1)]
        assert fd.closed  # sent with the first byte
        assert rig.send_buffer.size == 3
        rig.stream.room = 100
        rig.send_buffer.flush_nowait()
        assert rig.stream.sent[1:] == [(b"def", 0)]


async def test_nothing_is_sent_while_paused() -> None:
    async with Harness() as rig:
        rig.send_buffer.enqueue(b"a")
        for event in (Event.OFFER, Event.PAUSE):
            rig.server.lifecycle.handle(event)
        await rig.send_buffer.drain()
        rig.send_buffer.flush_nowait()
        assert rig.stream.sent == []
        rig.server.lifecycle.handle(Event.RESUME)
        await rig.send_buffer.drain()
        assert rig.stream.sent == [(b"a", 0)]


async def test_two_tasks_that_send(autojump_clock: trio.testing.MockClock) -> None:
    """Data of two tasks, replies and events, is sent whole and in order."""
    async with Harness(room=1) as rig:

        async def send(data: bytes) -> None:
            rig.send_buffer.enqueue(data)
            await rig.send_buffer.drain()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send, b"abc")
            nursery.start_soon(send, b"def")
            await trio.testing.wait_all_tasks_blocked()
            rig.stream.room = 100
        told = b"".join(data for data, _ in rig.stream.sent)
        assert sorted((told[:3], told[3:])) == [b"abc", b"def"]


async def test_a_buffer_above_its_limit_is_discarded(caplog: pytest.LogCaptureFixture) -> None:
    async with Harness(room=0) as rig:
        fd = _fd()
        rig.send_buffer.enqueue(bytes(MAX_UNSENT_BYTES + 1), [fd])
        rig.send_buffer.flush_nowait()
        assert rig.send_buffer.discarding
        assert rig.fds_to_close == [fd]
        assert "does not read its replies" in caplog.text
        other = _fd()
        rig.send_buffer.enqueue(b"a", [other])
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

    async with Harness() as rig:
        rig.stream.__class__ = Refusing
        one, two = _fd(), _fd()
        for wait in (False, True):
            rig.send_buffer.enqueue(b"a")
            rig.send_buffer.enqueue(b"bb", [one], lambda error: b"<%b>" % error.desc.encode()[-13:])
            rig.send_buffer.enqueue(b"c")
            if wait:
                await rig.send_buffer.drain()
            else:
                rig.send_buffer.flush_nowait()
            assert b"".join(data for data, _ in rig.stream.sent) == b"a<not permitted>c"
            assert rig.send_buffer.size == rig.send_buffer.undelivered_fds == 0
            assert one.closed
            rig.stream.sent.clear()
            one, two = two, one


async def test_a_removed_fd_is_closed_before_the_end_of_its_reply() -> None:
    async with Harness() as rig:
        fd = rig.take()
        rig.send_buffer.enqueue(b"next")
        rig.send_buffer.flush_nowait()
        assert rig.stream.sent == [(b"{reply", 1), (b"}\r\nnext", 0)]
        assert fd.closed


async def test_the_end_of_the_reply_waits_for_a_close_that_may_block() -> None:
    async with Harness() as rig:
        fd = rig.take()
        closed = threading.Event()  # set when another process has closed its duplicate
        rig.server.daemon.closer.close_after(fd, closed)
        rig.send_buffer.flush_nowait()
        rig.send_buffer.enqueue(b"next")
        rig.send_buffer.flush_nowait()
        assert rig.stream.sent == [(b"{reply", 1)]
        assert rig.server.daemon.closer.pending == 1
        closed.set()
        await rig.send_buffer.drain()
        assert rig.stream.sent == [(b"{reply", 1), (b"}\r\nnext", 0)]
        assert fd.closed


async def test_an_undelivered_fd_is_stored_again() -> None:
    async with Harness(room=0) as rig:
        number = rig.take().number
        rig.send_buffer.flush_nowait()
        assert rig.server.store.fd_count == 0
        rig.send_buffer.discard()
        assert rig.fds_to_close == []
        (fdset,) = rig.server.store
        assert (fdset.id, fdset.fds[number].opaque) == (0, "o")
        rig.take()  # discarding: stored again at once
        assert [len(fdset.fds) for fdset in rig.server.store] == [1, 1]


async def test_an_undelivered_fd_does_not_join_a_new_set_of_its_id() -> None:
    async with Harness(room=0) as rig:
        number = rig.take().number
        rig.server.daemon.add([_fd()])
        rig.send_buffer.discard()
        assert [fdset.id for fdset in rig.server.store if number in fdset.fds] == [1]


async def test_an_undelivered_fd_of_a_closed_connection_is_not_stored_again() -> None:
    async with Harness(room=0) as rig:
        owner = rig.connected()
        fd = rig.take(Lifetime(owner=owner))
        owner.close()
        rig.send_buffer.discard()
        assert rig.fds_to_close == [fd]
        assert rig.server.store.fd_count == 0
