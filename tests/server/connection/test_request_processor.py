"""Replies wait until their changes are stored in the mirror, and removed fds are closed.

Tests of server/connection/command_log.py.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
import trio
import trio.testing

from qmpfd.commands import DECODER, Context
from qmpfd.fdsets import Peer
from qmpfd.kernel import fd as fd_module
from qmpfd.kernel.fd import Fd, FileDescriptorLike, close_all
from qmpfd.policy import EVERYTHING
from qmpfd.protocol.server import ServerConnection
from qmpfd.server.connection.fd_accounting import FdAccounting
from qmpfd.server.connection.request_processor import BatchState, RequestProcessor
from qmpfd.server.connection.send_buffer import SendBuffer
from qmpfd.server.durability import Unmirrored
from qmpfd.server.lifecycle import Event
from qmpfd.server.server import DaemonServer
from qmpfd.transport import FdStream

ADD = b'{"execute": "add-fd"}\n'
REMOVE = b'{"execute": "remove-fd", "arguments": {"fdset-id": 0}}\n'
ASK = b'{"execute": "query-name"}\n'
ADDED = b'{"return": {"fdset-id": 0, "fd": %d}}\r\n'
DONE = b'{"return": {}}\r\n'


class Slow(Unmirrored):
    """A mirror that acknowledges changes when the test says so."""

    is_synced = True

    def __init__(self, server: DaemonServer) -> None:
        super().__init__(server.daemon.closer)
        self.actions: list[Callable[[], object]] = []

    def on_synced(self, action: Callable[[], object]) -> None:
        if self.is_synced:
            action()
        else:
            self.actions.append(action)

    async def sync(self) -> None:
        synced = trio.Event()
        self.on_synced(synced.set)
        await synced.wait()

    def acknowledge(self) -> None:
        """Acknowledge all changes."""
        self.is_synced = True
        actions, self.actions = self.actions, []
        for action in actions:
            action()


class Harness:
    """A request processor, with the two ends of its connection."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.server = DaemonServer()
        self.server.lifecycle.handle(Event.START)
        self.durability = Slow(self.server)

        def spawn(
            task: Callable[[trio.CancelScope], Awaitable[None]], scope: trio.CancelScope
        ) -> None:
            nursery.start_soon(task, scope)

        services = replace(self.server.services, durability=self.durability, spawn=spawn)
        ours, self.its = trio.socket.socketpair()
        self.stream = FdStream(ours)
        self.connection = ServerConnection(DECODER)
        self.connection.greeting({})
        self.connection.negotiate([])
        peer = Peer(os.getpid(), os.getuid(), os.getgid())
        self.drained = 0
        context = Context(
            self.server.daemon, self.connection, peer, EVERYTHING, send_events=lambda: False
        )
        buffer = SendBuffer(services, self.stream, peer, context, self._on_drained)
        accounting = FdAccounting(services, self.connection, buffer, peer.uid)
        self.processor = RequestProcessor(
            services, self.connection, context, buffer, accounting, self._park
        )

    def _on_drained(self) -> None:
        self.drained += 1

    async def _park(self) -> None:
        await self.server.lifecycle.wait_running()

    def ask(self, *requests: bytes, fd: Fd | None = None, synced: bool = True) -> bool:
        """Send and process requests; return whether all of them have been processed."""
        fd_module.send(self.its._sock, b"".join(requests), [] if fd is None else [fd])  # type: ignore[attr-defined]
        self.stream.receive_nowait(self.connection)
        self.durability.is_synced = synced
        return self.processor.process_nowait(1e12)

    def add(self) -> int:
        """Add a descriptor that the mirror has not acknowledged; return its number."""
        with Fd(os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)) as fd:
            assert self.ask(ADD, fd=fd, synced=False)
        (entry,) = self.server.daemon.store.everything()
        return entry.fd.number

    def received(self) -> bytes:
        """Return the bytes that the client has received."""
        try:
            return self.its._sock.recv(4096)  # type: ignore[attr-defined, no-any-return]
        except BlockingIOError:
            return b""

    def pause(self) -> None:
        """Pause the daemon, as for a takeover."""
        self.server.lifecycle.handle(Event.OFFER)
        self.server.lifecycle.handle(Event.PAUSE)
        self.processor.pause()

    def resume(self) -> None:
        """Resume the daemon, as after a failed takeover."""
        self.server.lifecycle.handle(Event.RESUME)
        self.processor.resume()


@asynccontextmanager
async def running() -> AsyncGenerator[Harness, None]:
    async with trio.open_nursery() as nursery:
        harness = Harness(nursery)
        yield harness
        nursery.cancel_scope.cancel()
    harness.processor.close()
    close_all(harness.connection.fds_to_close)
    close_all(harness.server.daemon.store.drop_all())
    harness.stream.close()
    harness.its.close()
    harness.server.close()


async def test_a_reply_waits_for_the_acknowledgement() -> None:
    async with running() as harness:
        number = harness.add()
        assert harness.received() == b""
        assert [each.data for each in harness.processor.unsent] == [ADDED % number]
        harness.durability.acknowledge()
        assert harness.received() == ADDED % number
        assert not harness.processor.is_busy
        assert harness.processor.unsent == []
        assert harness.drained == 1  # events held back meanwhile may be sent now


async def test_a_reply_without_changes_does_not_wait() -> None:
    async with running() as harness:
        assert harness.ask(ASK, synced=False)
        assert harness.received() == DONE


async def test_a_removed_fd_is_closed_between_acknowledgement_and_reply() -> None:
    async with running() as harness:
        read_end, write_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        with Fd(read_end), Fd(write_end) as fd:
            assert harness.ask(ADD, fd=fd)
        harness.received()
        assert harness.ask(REMOVE, synced=False)
        number = harness.connection.fds_to_close[0].number
        os.fstat(number)  # still open: the mirror closes its duplicate first
        harness.durability.acknowledge()
        assert harness.connection.fds_to_close == []
        assert harness.received() == DONE


async def test_the_next_request_waits_for_the_reply() -> None:
    """The connection's task processes the next request after the reply, in order."""
    async with running() as harness:
        number = harness.add()
        assert not harness.ask(ASK, synced=False)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(harness.processor.process)
            await trio.testing.wait_all_tasks_blocked()
            assert harness.received() == b""
            harness.durability.acknowledge()
        assert harness.received() == ADDED % number + DONE


async def test_events_wait_for_the_acknowledgement() -> None:
    async with running() as harness:
        harness.durability.is_synced = False
        assert not harness.processor.send_events(b"event\r\n")
        assert harness.received() == b""
        harness.durability.acknowledge()
        assert harness.received() == b"event\r\n"
        assert harness.processor.send_events(b"other\r\n")
        assert harness.received() == b"other\r\n"


async def test_events_while_the_processor_waits_for_the_lock() -> None:
    async with running() as harness, trio.open_nursery() as nursery:
        fd_module.send(harness.its._sock, ASK, [])  # type: ignore[attr-defined]
        harness.stream.receive_nowait(harness.connection)
        async with harness.server.services.lock:
            nursery.start_soon(harness.processor.process)
            await trio.testing.wait_all_tasks_blocked()
            harness.durability.is_synced = False
            assert not harness.processor.send_events(b"event\r\n")
        await trio.testing.wait_all_tasks_blocked()
        assert harness.received() == b""
        harness.durability.acknowledge()
        await trio.testing.wait_all_tasks_blocked()
        assert harness.received() == b"event\r\n" + DONE


async def test_events_that_cannot_be_sent(caplog: pytest.LogCaptureFixture) -> None:
    """A failed send disconnects that client; the task that sends events gets no exception."""

    class Full(FdStream):
        def send_nowait(
            self, data: bytes | memoryview, fds: Sequence[FileDescriptorLike] = ()
        ) -> int:
            raise OSError(errno.ENOBUFS, os.strerror(errno.ENOBUFS))

    async with running() as harness:
        harness.stream.__class__ = Full
        assert not harness.processor.send_events(b"event\r\n")
        assert "No buffer space" in caplog.text
        assert harness.its._sock.recv(1) == b""  # type: ignore[attr-defined]  # disconnected


async def test_nothing_is_sent_while_paused() -> None:
    """Uncommitted replies go to the successor, or to the client after a failed takeover."""
    async with running() as harness:
        number = harness.add()
        harness.pause()
        harness.durability.acknowledge()
        await trio.testing.wait_all_tasks_blocked()
        assert harness.received() == b""
        assert [each.data for each in harness.processor.unsent] == [ADDED % number]
        harness.resume()
        await trio.testing.wait_all_tasks_blocked()
        assert harness.received() == ADDED % number


async def test_a_pause_during_the_wait_for_an_acknowledgement() -> None:
    async with running() as harness:
        number = harness.add()
        assert not harness.ask(ASK, synced=False)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(harness.processor.process)
            await trio.testing.wait_all_tasks_blocked()
            harness.pause()
            await trio.testing.wait_all_tasks_blocked()
            assert harness.processor.state is BatchState.COMMITTING
            harness.resume()
            await trio.testing.wait_all_tasks_blocked()
            assert harness.received() == b""
            harness.durability.acknowledge()
        assert harness.received() == ADDED % number + DONE


async def test_closed_with_uncommitted_replies() -> None:
    """A closed processor sends nothing; a later acknowledgement has no effect."""
    async with running() as harness:
        harness.add()
        harness.processor.close()
        harness.durability.acknowledge()
        assert harness.received() == b""
        assert harness.processor.unsent == []


async def test_the_client_disconnects_before_the_acknowledgement() -> None:
    async with running() as harness:
        harness.add()
        harness.its.shutdown(socket.SHUT_RDWR)
        harness.durability.acknowledge()
        await trio.testing.wait_all_tasks_blocked()
        assert not harness.processor.is_busy
