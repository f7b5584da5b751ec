"""The reader task serves light clients in turns; a failure of one affects no other."""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncGenerator, Callable
from contextlib import ExitStack, asynccontextmanager
from itertools import chain, repeat

import pytest
import trio
from helpers import settle

from qmpfd.kernel.close_pool import ClosePool
from qmpfd.server.connection import reader as reader_module
from qmpfd.server.connection.reader import Reader
from qmpfd.server.durability import Unmirrored
from qmpfd.server.lifecycle import Event, Lifecycle


class Harness:
    """A reader, and clients for it."""

    def __init__(self, nursery: trio.Nursery, stack: ExitStack) -> None:
        closer = ClosePool()
        stack.callback(closer.shut_down)
        self.lifecycle = Lifecycle()
        self.lock = trio.Lock()
        self.reader = Reader(self.lifecycle, self.lock, Unmirrored(closer))
        stack.callback(self.reader.close)
        self.nursery = nursery
        self._stack = stack

    def pair(self) -> tuple[socket.socket, socket.socket]:
        """Return a client's end and the daemon's end of a socket pair."""
        ends = socket.socketpair()
        for end in ends:
            end.setblocking(False)
            self._stack.enter_context(end)
        self._stack.callback(self.reader.forget, ends[1].fileno())
        return ends

    def client(
        self, name: str, served: list[str], piece: Callable[[], object] = lambda: None
    ) -> socket.socket:
        """Connect a client that is served until *piece* returns a value; log into *served*."""
        theirs, ours = self.pair()

        def serve(_: float) -> object:
            served.append(name)
            return piece()

        async def wait() -> None:
            try:
                served.append(f"{name}: {await self.reader.serve(ours.fileno(), serve)}")
            except ZeroDivisionError:
                served.append(f"{name} failed")

        self.nursery.start_soon(wait)
        return theirs


@asynccontextmanager
async def running() -> AsyncGenerator[Harness, None]:
    with ExitStack() as stack:
        async with trio.open_nursery() as nursery:
            harness = Harness(nursery, stack)
            nursery.start_soon(harness.reader.run)  # noqa: ASYNC113 - no test needs it to run yet
            yield harness
            nursery.cancel_scope.cancel()


async def test_a_failure_and_a_value_reach_the_clients_task() -> None:
    """The task of each gets the exception or the value; the third client is served."""
    served: list[str] = []
    done = trio.Event()

    def piece() -> None:  # reads nothing: the socket stays readable
        if served.count("c") == 10:
            done.set()

    async with running() as harness:
        clients = [
            harness.client("a", served, lambda: 1 // 0),
            harness.client("b", served, lambda: "left"),
            harness.client("c", served, piece),
        ]
        await settle()
        for client in clients:
            client.send(b"x")
        with trio.fail_after(10):
            await done.wait()
    assert sorted(served)[:2] == ["a", "a failed"]
    assert served.count("b") == served.count("b: left") == 1


async def test_round_robin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every readable client is served before one is served again; other tasks run meanwhile."""
    monkeypatch.setattr(reader_module, "PASS_SECONDS", 1e-9)  # one client fills a pass
    served: list[str] = []
    done = trio.Event()

    def piece() -> None:
        if served.count("a") == 10:
            done.set()

    async def other() -> None:
        while True:
            await trio.lowlevel.checkpoint()
            served.append("-")

    async with running() as harness:
        clients = [harness.client(name, served, piece) for name in "abc"]
        await settle()
        for client in clients:
            client.send(b"x")
        harness.nursery.start_soon(other)
        with trio.fail_after(10):
            await done.wait()
    pieces = [name for name in served if name != "-"]
    for at in range(len(pieces) - 2):
        assert set(pieces[at : at + 3]) == set("abc")
    busy = served[served.index("a") : len(served) - served[::-1].index("a")]
    for at in range(len(busy) - 2):  # Trio runs the tasks of a pass in any order
        assert "-" in busy[at : at + 3]


async def test_a_client_is_heavy_after_two_long_pieces_in_a_row(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A client is heavy after two long pieces in a row: one may be long because of the machine."""
    # Times at the start of each pass and after each piece: long, short, long, long.
    times = chain([0.0, 1.0], [1.0, 1.0, 2.0], [2.0, 3.0], repeat(3.0))
    monkeypatch.setattr(reader_module, "monotonic", lambda: next(times))
    monkeypatch.setattr(reader_module, "PASS_SECONDS", 0.5)
    served: list[str] = []
    async with running() as harness:
        client = harness.client("a", served)
        await settle()
        client.send(b"x")  # never read: each pass serves the client once
        with trio.fail_after(10):
            await settle()
    assert served == ["a", "a", "a", "a", "a: None"]


async def test_unread_input_causes_no_busy_loop() -> None:
    """Unread input of a client that its own task serves causes no busy loop."""
    served: list[str] = []
    async with running() as harness:
        client = harness.client("a", served, lambda: "left")
        await settle()
        client.send(b"x")
        with trio.fail_after(10):
            await settle()
    assert served == ["a", "a: left"]


async def test_a_cancelled_client_is_not_served() -> None:
    """After a cancellation the client is not served; it can be served again, and be forgotten."""
    async with running() as harness:
        theirs, ours = harness.pair()
        served: list[float] = []
        with trio.CancelScope() as scope:
            harness.nursery.start_soon(lambda: _cancel(scope))
            await harness.reader.serve(ours.fileno(), served.append)
        theirs.send(b"x")
        await settle()
        assert not served
        assert await harness.reader.serve(ours.fileno(), lambda _: "again") == "again"
        # A duplicate in another process would keep the closed socket in the epoll set.
        copy = os.dup(ours.fileno())
        harness.reader.forget(ours.fileno())
        ours.close()
        with trio.fail_after(10):
            await settle()
        os.close(copy)


async def _cancel(scope: trio.CancelScope) -> None:
    await settle()
    scope.cancel()


async def test_nobody_is_served_while_paused_or_while_the_store_is_locked() -> None:
    served: list[str] = []
    async with running() as harness:
        for event in (Event.START, Event.OFFER, Event.PAUSE):
            harness.lifecycle.handle(event)
        client = harness.client("a", served, lambda: "left")
        await settle()
        client.send(b"x")
        await settle()
        assert not served
        async with harness.lock:
            harness.lifecycle.handle(Event.RESUME)
            await settle()
            assert not served
        await settle()
        assert served == ["a", "a: left"]
