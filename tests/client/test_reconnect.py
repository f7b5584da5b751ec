"""The Trio client with ``reconnect`` replaces a broken connection."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from cancelling import CancelAt
from conformance.peers import qemu_at
from fakes import ask, fake_server, negotiate
from helpers import PATIENCE, Pipe, Wire, open_fds, pipes, settle
from trio.testing import MockClock

import qmpfd


class Restarted:
    """A daemon that the test stops and starts again."""

    def __init__(self, path: Path, nursery: trio.Nursery) -> None:
        self._path = path
        self._nursery = nursery
        self._server: qmpfd.Server | None = None

    async def begin(self) -> None:
        self._server = await self._nursery.start(qmpfd.serve, [self._path])

    async def end(self) -> None:
        if self._server is not None:
            self._server.stop()
            await self._server.ended.wait()
            self._server = None

    async def again(self) -> None:
        await self.end()
        await self.begin()


@asynccontextmanager
async def restartable(path: Path) -> AsyncIterator[Restarted]:
    async with trio.open_nursery() as nursery:
        made = Restarted(path, nursery)
        await made.begin()
        yield made
        await made.end()


async def test_unsent_requests_use_the_new_connection(path: Path) -> None:
    """Requests that were not sent are sent over the new connection, whatever the command."""
    async with restartable(path) as restarted, qmpfd.connect(path, reconnect=10) as client:
        for _ in range(3):
            with Pipe() as pipe:
                info = await client.add_fd(pipe)
                pipe.release()
                assert info.fdset_id == 0
                assert pipe.held()
                with await client.open_fdset(0):
                    pass
                await restarted.again()
                assert not pipe.held()
        assert await client.query_fdsets() == []


async def test_without_reconnect_calls_fail(path: Path) -> None:
    async with restartable(path) as restarted, qmpfd.connect(path) as client:
        await restarted.again()
        for _ in range(2):
            with pytest.raises(trio.BrokenResourceError) as caught:
                await client.query_fdsets()
            assert not issubclass(caught.type, qmpfd.ReplyLost)
        with pytest.raises(trio.BrokenResourceError):
            await anext(client.events())


async def test_many_calls_make_one_connection(path: Path) -> None:
    done = []

    async def call() -> None:
        done.append(await client.query_fdsets())

    async with restartable(path) as restarted, qmpfd.connect(path, reconnect=10) as client:
        await restarted.end()
        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(call)
            await settle()
            await restarted.begin()
        assert done == [[]] * 20
        assert (await client.execute("query-stats"))["connections-accepted"] == 1


class Lossy:
    """A server that closes the connection on certain commands, and counts all commands."""

    def __init__(self, lost: str, times: int = 1) -> None:
        self._lost = lost
        self._times = times
        self.got: Counter[str] = Counter()

    async def __call__(self, wire: Wire) -> None:
        await negotiate(wire)
        while request := await wire.receive():
            name = request["execute"]
            self.got[name] += 1
            if name == self._lost and self._times:
                self._times -= 1
                return
            wire.send(b'{"return": {"fdset-id": 1, "fd": 2}, "id": %d}\r\n' % request["id"])


@pytest.mark.parametrize("command", ["add-fd", "remove-fd", "quit", "blockdev-add", "getfd"])
async def test_a_reply_is_lost(path: Path, command: str) -> None:
    """A lost reply raises: the command may have been executed."""
    server = Lossy(command)
    with Pipe() as pipe:
        async with fake_server(path, server), qmpfd.connect(path, reconnect=10) as client:
            with pytest.raises(qmpfd.ReplyLost, match=f"'{command}' came: it may have been"):
                await client.execute(command, fds=[pipe])
            assert server.got[command] == 1
            assert await client.execute(command, fds=[pipe])
            assert server.got[command] == 2


@pytest.mark.parametrize("command", ["query-fdsets", "query-block", "watch-fdsets"])
async def test_queries_are_repeated(path: Path, command: str) -> None:
    server = Lossy(command, times=3)
    async with fake_server(path, server), qmpfd.connect(path, reconnect=10) as client:
        assert await client.execute(command)
        assert server.got[command] == 4


async def test_no_server_within_the_timeout(path: Path, autojump_clock: MockClock) -> None:
    async with restartable(path) as restarted, qmpfd.connect(path, reconnect=7) as client:
        await restarted.end()
        for call in (client.query_fdsets, client.query_fds, client.events().__anext__):
            began = trio.current_time()
            with pytest.raises(trio.BrokenResourceError, match="again within 7 s") as caught:
                await call()
            assert isinstance(caught.value.__cause__, FileNotFoundError)
            assert trio.current_time() - began == pytest.approx(7)
        await restarted.begin()
        assert await client.query_fdsets() == []


@pytest.mark.parametrize(
    "output", [b"", b"HTTP/1.1\r\n", b'{"error": {"class": "GenericError", "desc": "full"}}\n']
)
async def test_retries_while_the_server_rejects(
    path: Path, autojump_clock: MockClock, output: bytes
) -> None:
    """The client retries while the server rejects it, speaks no QMP, or closes at once."""
    turns = itertools.count()

    async def script(wire: Wire) -> None:
        turn = next(turns)
        if turn in (1, 2):
            if output:
                wire.send(output)
            return
        await negotiate(wire)
        request = await ask(wire)
        if turn:
            wire.send(b'{"return": [], "id": %d}\r\n' % request)
            await wire.receive()

    async with fake_server(path, script), qmpfd.connect(path, reconnect=7) as client:
        assert await client.query_fdsets() == []
    assert next(turns) == 4


async def test_it_is_closed_while_calls_wait(path: Path) -> None:
    raised = []

    async def call(method: Callable[[], Any]) -> None:
        with pytest.raises(trio.ClosedResourceError):
            await method()
        raised.append(method)

    before = open_fds()
    async with restartable(path) as restarted, qmpfd.connect(path, reconnect=1000) as client:
        await restarted.end()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(call, client.query_fdsets)
            nursery.start_soon(call, client.query_fds)
            nursery.start_soon(call, client.events().__anext__)
            await settle()
            client.close()
        assert len(raised) == 3
        with pytest.raises(trio.ClosedResourceError):
            await client.query_fdsets()
        await restarted.begin()
    assert open_fds() == before


# -- events ------------------------------------------------------------------------------------


async def test_a_watch_continues_after_a_reconnection(path: Path) -> None:
    """After a reconnection a watcher gets FD_EVENTS_LOST, and then all new events."""
    send, output = trio.open_memory_channel[tuple[str, Any]](10)

    async def pass_on(events: AsyncIterator[qmpfd.QMPEvent]) -> None:
        async for event in events:
            await send.send((event.name, event.data.get("opaque")))

    async def add(opaque: str) -> None:
        async with qmpfd.connect(path) as other:
            await other.add_fd(0, opaque=opaque)

    async with (
        restartable(path) as restarted,
        qmpfd.connect(path, reconnect=10) as client,
        client.watch_fdsets() as events,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(pass_on, events)
        await add("first")
        assert await output.receive() == ("FD_ADDED", "first")
        await restarted.again()
        assert await output.receive() == ("FD_EVENTS_LOST", None)
        await add("second")
        assert await output.receive() == ("FD_ADDED", "second")
        nursery.cancel_scope.cancel()


async def test_what_was_not_asked_for_comes_first(path: Path) -> None:
    async with restartable(path) as restarted, qmpfd.connect(path, reconnect=10) as client:
        async with client.watch_fdsets() as events:
            await client.add_fd(0)
            await client.add_fd(0)
            await restarted.again()
            await client.query_fdsets()
            await client.add_fd(0)
            names = [(await anext(events)).name for _ in range(4)]
            assert names == ["FD_ADDED", "FD_ADDED", "FD_EVENTS_LOST", "FD_ADDED"]
            await restarted.again()
        # The watch block ends without a connection: the next connection does not watch.
        await client.add_fd(0)
        assert (await client.execute("query-stats"))["commands"][0]["name"] == "add-fd"
        with trio.move_on_after(0.05) as scope:
            await anext(client.events())
            await anext(client.events())
        assert scope.cancelled_caught


# -- cancellation ------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [True, False], ids=["running", "waiting"])
@pytest.mark.parametrize("watching", [False, True])
async def test_a_call_that_connects_is_cancelled(path: Path, before: bool, watching: bool) -> None:
    """Cancelled at every step: nothing leaks, and the next call has a connection."""
    steps, cancelled = 0, True
    while cancelled:
        steps += 1
        cancelled = await _cancelled(path, steps, before=before, watching=watching)
    assert steps > 6


async def _cancelled(path: Path, step: int, *, before: bool, watching: bool) -> bool:
    victims = [trio.lowlevel.current_task()]
    open_before = open_fds()
    async with AsyncExitStack() as stack:
        restarted = await stack.enter_async_context(restartable(path))
        client = await stack.enter_async_context(qmpfd.connect(path, reconnect=10))
        if watching:
            await stack.enter_async_context(client.watch_fdsets())
        await restarted.again()
        with pipes(2) as made:
            with (
                trio.CancelScope() as scope,
                CancelAt(victims.__contains__, scope, step, before=before) as at,
            ):
                await client.add_fd(made[0])
                with await client.open_fdset(0):
                    pass
            info = await client.add_fd(made[1])
            await settle()
            assert (await client.execute("query-stats"))["connections"] == 1
            for pipe in made:
                pipe.release()
            for fdset in await client.query_fdsets():
                await client.remove_fd(fdset.fdset_id)
            assert info.fdset_id in (0, 1)
            assert not any(pipe.held() for pipe in made)
    await settle()
    assert open_fds() == open_before
    return at.done


# -- a real QEMU -------------------------------------------------------------------------------


@pytest.mark.qemu
async def test_a_qemu_that_is_started_again(path: Path) -> None:
    """A second QEMU inherits the same listening socket."""
    with qemu_at(path) as start:
        process = start()
        async with qmpfd.connect(path, reconnect=PATIENCE) as client:
            for _ in range(2):
                with Pipe() as pipe:
                    await client.add_fd(pipe, 5)
                    pipe.release()
                    process.kill()
                    process.wait()
                    assert not pipe.held()
                    process = start()
                    assert await client.query_fdsets() == []
            assert (await anext(client.events())).name == "FD_EVENTS_LOST"
