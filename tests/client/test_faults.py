"""An error of one call, or of the server, does not affect other calls."""

from __future__ import annotations

import json
import os
import socket
import sys
from collections import ChainMap
from collections.abc import Iterator
from pathlib import Path
from types import MappingProxyType

import pytest
import trio
from fakes import ask, fake_server, negotiate
from helpers import Wire, daemon, open_fds, pipes, settle

import qmpfd
from qmpfd.limits import MAX_NESTING
from qmpfd.server.server import DaemonServer


async def test_connect_waits_while_the_backlog_is_full(path: Path) -> None:
    """connect(2) then fails with EAGAIN, which Trio's connect takes for success."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.fspath(path))
        listener.listen(0)
        clients = []
        while True:
            client = socket.socket(socket.AF_UNIX)
            client.setblocking(False)
            clients.append(client)
            try:
                client.connect(os.fspath(path))
            except BlockingIOError:
                break
        connected = trio.Event()

        async def connect() -> None:
            async with qmpfd.connect(path):
                connected.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(connect)
            await settle()
            assert not connected.is_set()
            for client in clients:
                client.close()
            while not connected.is_set():  # room in the backlog: the client connects
                sock, _ = await trio.to_thread.run_sync(listener.accept)
                with sock:
                    await _answer(sock, connected)


async def _answer(sock: socket.socket, connected: trio.Event) -> None:
    """Answer the negotiation as a server; ignore a client that has disconnected."""
    try:
        sock.sendall(b'{"QMP": {"version": {}, "capabilities": []}}\r\n')
        data = await trio.to_thread.run_sync(sock.recv, 4096)
        if data:
            sock.sendall(b'{"return": {}, "id": %d}\r\n' % json.loads(data)["id"])
            await connected.wait()
    except OSError:
        return


async def test_any_mapping_is_an_object(path: Path) -> None:
    async with daemon(path), qmpfd.connect(path) as client, qmpfd.connect(path) as other:
        await client.execute("getfd", MappingProxyType({"fdname": "n"}), fds=[0])
        await client.execute("closefd", ChainMap({"fdname": "n"}))
        assert await other.query_fdsets() == []


def _nested(levels: int) -> list[object]:
    value: list[object] = []
    for _ in range(levels - 1):
        value = [value]
    return value


@pytest.fixture
def deep() -> Iterator[None]:
    """Raise the recursion limit: the json module nests as deep as with Python 3.12."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(20_000)
    yield
    sys.setrecursionlimit(limit)


@pytest.mark.parametrize("levels", [MAX_NESTING - 1, 5000])
@pytest.mark.usefixtures("deep")
async def test_what_is_nested_too_deep(path: Path, levels: int) -> None:
    """The client refuses values that are nested too deep: the server's errors, one for each closing
    bracket and without ids, would be taken for the replies to other calls.
    """
    async with daemon(path), qmpfd.connect(path) as client:
        with pytest.raises(ValueError, match="nested deeper than 1024 levels"):
            await client.execute("query-name", {"a": _nested(levels)})
        # Brackets in a text, or beside each other, do not count as nesting.
        with pytest.raises(qmpfd.GenericError, match="'a' is unexpected"):
            await client.execute("query-name", {"a": [_nested(1000), [], "[" * 2000 + '"\\']})
        assert await client.query_fdsets() == []


@pytest.mark.parametrize(
    "arguments",
    [
        {"opaque": "\ud800"},
        {"opaque": "a\udcff"},
        {"opaque": "\ufffe"},
        {"opaque": "\U0010ffff"},
        {"opaque": "x" * (1 << 20)},
        {"fdset-id": float("nan")},
        {"fdset-id": float("inf")},
        {"fdset-id": object()},
        {"opaque": b"bytes"},
    ],
    ids=range(9),
)
async def test_what_json_cannot_carry(path: Path, arguments: dict[str, object]) -> None:
    """The call raises ValueError; another call at the same time gets its reply."""

    async def script(wire: Wire) -> None:
        await negotiate(wire)
        first = await ask(wire)
        second = await ask(wire)
        wire.send(b'{"return": "first", "id": %d}\r\n' % first)
        wire.send(b'{"return": "second", "id": %d}\r\n' % second)
        await wire.receive()

    got: list[object] = []

    async def call() -> None:
        got.append(await client.execute("slow"))

    async with (
        fake_server(path, script),
        qmpfd.connect(path) as client,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(call)
        await settle()
        with pytest.raises(ValueError, match="cannot be sent"):
            await client.execute("add-fd", arguments)
        got.append(await client.execute("other"))
    assert sorted(map(str, got)) == ["first", "second"]


async def test_an_error_without_an_id_is_the_oldest_requests(path: Path) -> None:
    """An error without id is the reply to the oldest request, which the server could not read."""

    async def script(wire: Wire) -> None:
        await negotiate(wire)
        await ask(wire)
        second = await ask(wire)
        wire.send(b'{"error": {"class": "GenericError", "desc": "JSON parse error, x"}}\r\n')
        wire.send(b'{"return": "second", "id": %d}\r\n' % second)
        await wire.receive()

    refused: list[str] = []

    async def call() -> None:
        with pytest.raises(qmpfd.GenericError) as caught:
            await client.execute("unreadable")
        refused.append(caught.value.desc)

    async with (
        fake_server(path, script),
        qmpfd.connect(path) as client,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(call)
        await settle()
        assert await client.execute("other") == "second"
    assert refused == ["JSON parse error, x"]


async def test_a_request_that_breaks_the_connection_is_not_retried_forever(path: Path) -> None:
    times = 0

    async def script(wire: Wire) -> None:
        nonlocal times
        await negotiate(wire)
        await ask(wire)
        times += 1

    async with fake_server(path, script), qmpfd.connect(path, reconnect=60) as client:
        with pytest.raises(trio.BrokenResourceError):
            await client.execute("query-fds", {"opaque": "poison"})
    assert times == 10


async def test_a_request_that_is_never_read_is_not_retried_forever(path: Path) -> None:
    """A request of which no byte was sent is not retried forever."""
    times = 0

    async def script(wire: Wire) -> None:
        nonlocal times
        times += 1
        await negotiate(wire)  # then the connection is closed

    async with fake_server(path, script), qmpfd.connect(path, reconnect=60) as client:
        with pytest.raises(trio.BrokenResourceError), trio.fail_after(20):
            await client.execute("add-fd")
    assert times == 10


@pytest.mark.parametrize(
    "output",
    [
        b"no JSON\r\n",
        b'{"event": "X", "timestamp": {"seconds": 1' + b"0" * 400 + b"}}\r\n",
        b'{"event": "X", "timestamp": {"seconds": 1e999}}\r\n',
        b'{"event": ["\\ud800"]}\r\n',
        b"[" * 100_000 + b"\r\n",
        b'{"id": 2}\r\n',
    ],
    ids=["text", "huge", "inf", "name", "deep", "neither"],
)
async def test_no_call_hangs_after_a_protocol_error(path: Path, output: bytes) -> None:
    """Waiting calls, one of them sending, and later ones raise."""

    async def script(wire: Wire) -> None:
        await negotiate(wire)
        await wire.receive()  # reads no more: the client cannot send everything
        wire.send(output)
        await trio.sleep_forever()

    async def call(size: int) -> None:
        with pytest.raises((qmpfd.ProtocolError, trio.BrokenResourceError)):
            await client.execute("query-name", {"x": "y" * size})

    async with fake_server(path, script), qmpfd.connect(path) as client:
        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                for size in (1, 900_000, 1):
                    nursery.start_soon(call, size)
            await call(1)
            with pytest.raises((qmpfd.ProtocolError, trio.BrokenResourceError)):
                await anext(client.events())


async def _at_rest(server: qmpfd.Server) -> dict[int, str]:
    """Return the open descriptors of this process when the daemon has no sessions."""
    assert isinstance(server, DaemonServer)
    while server.sessions or server.daemon.closer.pending:  # noqa: ASYNC110 - no event
        await trio.lowlevel.checkpoint()
    return open_fds()


async def test_open_fdset_while_the_client_is_closed(path: Path) -> None:
    """open_fdset during a close() raises or returns an open descriptor, never a closed one."""
    given = 0

    async def use(client: qmpfd.Client) -> None:
        nonlocal given
        try:
            fd = await client.open_fdset(0)
        except trio.ClosedResourceError:
            return
        with fd:
            os.fstat(fd.fileno())
            given += 1

    async with daemon(path) as server:
        with pipes(1) as (pipe,):
            async with qmpfd.connect(path) as client:
                await client.add_fd(pipe)
        before = await _at_rest(server)
        for turn in range(60):
            async with qmpfd.connect(path) as client, trio.open_nursery() as nursery:
                for _ in range(5):
                    nursery.start_soon(use, client)
                for _ in range(turn % 20):
                    await trio.lowlevel.checkpoint()
                client.close()
        assert await _at_rest(server) == before
    assert 0 < given < 300


async def test_odd_texts_come_as_they_are(path: Path) -> None:
    async def script(wire: Wire) -> None:
        await negotiate(wire)
        request = await ask(wire)
        wire.send(b'{"error": {"class": "\\ud800", "desc": "\\udfff"}, "id": %d}\r\n' % request)
        await wire.receive()

    async with fake_server(path, script), qmpfd.connect(path) as client:
        with pytest.raises(qmpfd.QMPError):
            await client.execute("x")
