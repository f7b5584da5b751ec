"""Cancel at every checkpoint of a client's life, on either side: no descriptor leaks, the store
stays consistent, and other clients are served.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
import trio
from cancelling import CancelAt
from helpers import (
    ADD,
    QUERY,
    Pipe,
    Wire,
    daemon,
    open_fds,
    pipes,
    request,
    settle,
    value,
)

import qmpfd
from qmpfd.server.closing import closed
from qmpfd.server.connection.session import Session
from qmpfd.server.listen.listener import UnixListener
from qmpfd.server.server import DaemonServer

Live = Callable[[Path, DaemonServer, list[Pipe]], Awaitable[None]]

EACH_WAY = pytest.mark.parametrize("before", [True, False], ids=["running", "waiting"])
BIG = "x" * 600_000  # more than a socket buffers


async def _empty(path: Path, held: list[Pipe]) -> None:
    """Check that all descriptors of the store are listed, and are closed when removed."""
    with await Wire.session(path) as wire:
        sets = value(await wire.call("query-fdsets"))
        assert sum(pipe.held() for pipe in held) == sum(len(fdset["fds"]) for fdset in sets)
        for fdset in sets:
            assert value(await wire.call("remove-fd", {"fdset-id": fdset["fdset-id"]})) == {}
        assert not any(pipe.held() for pipe in held)
        with Pipe() as pipe:
            assert value(await wire.call("add-fd", None, [pipe]))["fdset-id"] == 0
            pipe.release()
            assert pipe.held()
            assert value(await wire.call("remove-fd", {"fdset-id": 0})) == {}
            assert not pipe.held()
        assert value(await wire.call("query-fdsets")) == []


# -- the server's session ----------------------------------------------------------------------


class _FirstCancelled(DaemonServer):
    """A daemon whose first session is cancelled."""

    def __init__(self) -> None:
        super().__init__()
        self.scope = trio.CancelScope()
        self.victim: trio.lowlevel.Task | None = None

    async def _serve(self, session: Session) -> None:
        if self.victim is None:
            self.victim = trio.lowlevel.current_task()
            with self.scope:
                await super()._serve(session)
        else:
            await super()._serve(session)


async def _live(path: Path, server: DaemonServer, made: list[Pipe]) -> None:
    """Run a client that makes its session wait in every possible way."""
    with await Wire.connect(path) as wire:
        await wire.reply()
        await wire.call("qmp_capabilities")
        wire.send(ADD, [made[0]])
        await wire.reply()
        wire.send(b" ", [made[1]])
        await settle()
        wire.send(QUERY + ADD[:9])
        await settle()
        wire.send(ADD[9:])
        await wire.replies(2)
        await wire.call("getfd", {"fdname": "n"}, [made[2]])
        async with server.services.lock:
            wire.send(ADD + QUERY, [made[3]])
            await settle()
        await wire.replies(2)
        # More replies than the socket buffers, read late.
        wire.send(request("query-commands") * 600)
        await settle()
        await wire.replies(600)
        for _ in range(4):  # more than one time slice: the session waits for its turn
            wire.send(request("query-name") * 200)
            await wire.replies(200)
        await wire.call("remove-fd", {"fdset-id": 0})
        # At the end: a complete command's fd, one that no command takes, one of half a command.
        wire.send(ADD, [made[4]])
        wire.send(b" ", [made[5]])
        wire.send(ADD[:20], [made[6]])


async def _answers(wire: Wire, count: int) -> None:
    """Read *count* replies, and the events between them."""
    while count:
        count -= "event" not in await wire.reply()


async def _live_with_our_own(path: Path, server: DaemonServer, made: list[Pipe]) -> None:
    """As :func:`_live`, with the commands that only qmpfd has."""
    with await Wire.session(path) as wire, await Wire.session(path) as other:
        wire.send(request("watch-fdsets", {"enable": True}))
        wire.send(request("add-fds", {"lifetime": "connection"}), made[:2])
        await _answers(wire, 2)
        wire.send(request("add-fds", {"fdset-id": 0, "watch-hangup": True}), made[2:3])
        wire.send(request("add-fds", {"fdset-id": 0, "expires": 1000}), made[3:4])
        await _answers(wire, 2)
        wire.send(request("open-fdset", {"fdset-id": 0}) + request("query-fds"))
        await _answers(wire, 2)
        # More replies with descriptors, and more events, than the socket buffers, read late.
        wire.send(request("open-fdset", {"fdset-id": 0}) * 500)
        for _ in range(40):
            other.send(request("add-fds", {"opaque": "x" * 5000}), made[4:5])
            other.send(request("remove-fd", {"fdset-id": 1}))
            await other.replies(2)
        await _answers(wire, 500)
        async with server.services.lock:
            wire.send(request("watch-fdsets", {"enable": False}))
            wire.send(request("remove-fd", {"fdset-id": 0}))
            wire.send(request("add-fds", {"lifetime": "connection"}), made[5:6])
            await settle()
        await _answers(wire, 3)
        # At the end: the client disconnects while its reply is queued.
        wire.send(request("add-fds") + request("open-fdset", {"fdset-id": 0}) * 500, made[6:])


LIVES = pytest.mark.parametrize("live", [_live, _live_with_our_own], ids=["QEMU's", "our own"])


@LIVES
@EACH_WAY
async def test_a_session_is_cancelled(path: Path, before: bool, live: Live) -> None:
    steps = 0
    cancelled = True
    while cancelled:
        steps += 1
        open_before = open_fds()
        server = _FirstCancelled()
        with closing(UnixListener.bind(path)) as listener, pipes(7) as made:
            async with trio.open_nursery() as nursery:
                await nursery.start(server.run, [listener])
                with CancelAt(
                    lambda task, server=server: task is server.victim,  # type: ignore[misc]
                    server.scope,
                    steps,
                    before=before,
                ) as cancelling:
                    with suppress(AssertionError, BrokenPipeError):  # the connection ends
                        await live(path, server, made)
                    await settle()
                for pipe in made:
                    pipe.release()
                await closed(server.daemon.closer.all_closes)  # closes that no reply waits for
                await _empty(path, made)
                server.stop()
            server.close()
            await closed(server.daemon.closer.all_closes)
        cancelled = cancelling.done
        assert open_fds() == open_before
    assert steps > 10


# -- the whole daemon --------------------------------------------------------------------------


class _Started(trio.TaskStatus[Any]):
    """Sets an event when the daemon listens."""

    def __init__(self) -> None:
        self.event = trio.Event()

    def started(self, value: Any = None) -> None:
        self.event.set()


@EACH_WAY
async def test_the_daemon_is_cancelled(path: Path, before: bool) -> None:
    steps = 0
    cancelled = True
    while cancelled:
        steps += 1
        open_before = open_fds()
        scope = trio.CancelScope()
        status = _Started()
        ours: list[trio.lowlevel.Task] = []

        async def run(
            scope: trio.CancelScope = scope,
            status: _Started = status,
            ours: list[trio.lowlevel.Task] = ours,
        ) -> None:
            ours.append(trio.lowlevel.current_task())
            with scope:
                await qmpfd.serve([path], task_status=status)
            status.started()

        with pipes(4) as made:
            async with trio.open_nursery() as nursery:
                instrument = CancelAt(
                    lambda task, ours=ours: _is_within(task, ours),  # type: ignore[misc]
                    scope,
                    steps,
                    before=before,
                )
                with instrument as cancelling:
                    nursery.start_soon(run)
                    await status.event.wait()
                    with suppress(AssertionError, OSError):  # the daemon ends
                        await _short_life(path, made)
                cancelled = cancelling.done
                scope.cancel()
            for pipe in made:
                pipe.release()
                assert not pipe.held()
        assert not path.exists()
        assert open_fds() == open_before
    assert steps > 10


def _is_within(task: trio.lowlevel.Task | None, ours: list[trio.lowlevel.Task]) -> bool:
    while task is not None and task not in ours:
        task = task.parent_nursery.parent_task if task.parent_nursery else None
    return task is not None


async def _short_life(path: Path, made: list[Pipe]) -> None:
    with await Wire.session(path) as wire, await Wire.session(path) as other:
        wire.send(ADD, made[:1])
        other.send(ADD, made[1:2])
        await wire.reply()
        await other.reply()
        await wire.call("getfd", {"fdname": "n"}, made[2:3])
        other.send(b" ", made[3:])
        await other.call("query-fdsets")


# -- the client --------------------------------------------------------------------------------

Call = Callable[[qmpfd.Client, Pipe], Awaitable[object]]


async def _open(client: qmpfd.Client, pipe: Pipe) -> object:
    with await client.open_fdset(0):
        return await client.query_fdsets()


async def _watch(client: qmpfd.Client, pipe: Pipe) -> object:
    async with client.watch_fdsets() as events:
        await client.add_fd(pipe)
        return await anext(events)


CALLS: dict[str, Call] = {
    "add_fd": lambda client, pipe: client.add_fd(pipe, opaque="victim"),
    "add_fd, large": lambda client, pipe: client.add_fd(pipe, opaque=BIG),
    "add_fds": lambda client, pipe: client.add_fds([pipe] * 253),
    "remove_fd": lambda client, pipe: client.remove_fd(1),
    "query_fdsets": lambda client, pipe: client.query_fdsets(),
    "query_fds": lambda client, pipe: client.query_fds(),
    "open_fdset": _open,
    "watch_fdsets": _watch,
    "execute": lambda client, pipe: client.execute("query-version"),
    "an error": lambda client, pipe: client.remove_fd(99),
}


@EACH_WAY
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
async def test_a_call_is_cancelled(call: Call, path: Path, before: bool) -> None:
    """Other calls on the same connection, before, after and later, get their replies; the command
    of the cancelled call is executed completely or not at all, and no events are sent any more.
    """
    steps = 0
    cancelled = True
    while cancelled:
        steps += 1
        cancelled = await _cancelled_call(call, path, steps, before=before)
    assert steps > 2


async def _cancelled_call(call: Call, path: Path, steps: int, *, before: bool) -> bool:
    results: list[str] = []
    scope = trio.CancelScope()
    victims: list[trio.lowlevel.Task] = []

    async def victim() -> None:
        victims.append(trio.lowlevel.current_task())
        with scope, suppress(qmpfd.FdNotFound):
            await call(client, made[0])

    async def bystander(pipe: Pipe) -> None:
        info = await client.add_fd(pipe)
        fdsets = await client.query_fdsets()
        assert [fd.fd for fds in fdsets if fds.fdset_id == info.fdset_id for fd in fds.fds] == [
            info.fd
        ]
        results.append("answered")

    with pipes(5) as made:
        async with daemon(path) as server, qmpfd.connect(path) as client:
            open_before = open_fds()
            for pipe in made[3:]:
                await client.add_fd(pipe)
            with CancelAt(victims.__contains__, scope, steps, before=before) as at:
                # The lock holds back all replies until every call waits.
                async with trio.open_nursery() as nursery, server.services.lock:
                    nursery.start_soon(bystander, made[1])
                    await settle()
                    nursery.start_soon(victim)
                    await settle()
                    nursery.start_soon(bystander, made[2])
                    await settle()
            assert results == ["answered"] * 2
            assert await client.execute("query-name") == {}
            assert not server.daemon.watchers
            for pipe in made:
                pipe.release()
            for fdset in await client.query_fdsets():
                await client.remove_fd(fdset.fdset_id)
            assert not any(pipe.held() for pipe in made)
            closed = {number for number, link in open_before.items() if "pipe:" in link}
            assert open_fds().keys() | closed == open_before.keys() | closed
    return at.done


@EACH_WAY
async def test_connect_is_cancelled(path: Path, before: bool) -> None:
    steps = 0
    cancelled = True
    async with daemon(path):
        with await Wire.session(path) as other:
            while cancelled:
                steps += 1
                open_before = open_fds()
                with pipes(1) as made:
                    victims = [trio.lowlevel.current_task()]
                    with (
                        trio.CancelScope() as scope,
                        CancelAt(victims.__contains__, scope, steps, before=before) as at,
                    ):
                        async with qmpfd.connect(path) as client:
                            await client.add_fd(made[0])
                    cancelled = at.done
                    await settle()
                    made[0].release()
                    await _empty(path, made)
                await settle()
                assert open_fds() == open_before
                assert value(await other.call("query-name")) == {}
    assert steps > 4
