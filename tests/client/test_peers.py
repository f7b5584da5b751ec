"""The Trio client with servers that are silent, faulty, or no QMP servers.

Tests of client/connecting.py and client/errors.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
from fakes import GREETING, ask, fake_server, negotiate
from helpers import Pipe, Wire, open_fds, send_now, settle
from trio.testing import MockClock

import qmpfd

# -- silence -----------------------------------------------------------------------------------


async def test_never_greeted(path: Path, autojump_clock: MockClock) -> None:
    async def script(wire: Wire) -> None:
        await trio.sleep_forever()

    async with fake_server(path, script):
        with trio.move_on_after(10) as scope:
            async with qmpfd.connect(path):
                pass
        assert scope.cancelled_caught


async def test_never_answered(path: Path, autojump_clock: MockClock) -> None:
    """A cancelled call affects no other, and its late reply is no other call's."""

    async def script(wire: Wire) -> None:
        await negotiate(wire)
        late = await ask(wire)
        following = await ask(wire)
        wire.send(b'{"return": "late", "id": %d}\r\n' % late)
        wire.send(b'{"return": "following", "id": %d}\r\n' % following)
        await wire.receive()

    async with fake_server(path, script), qmpfd.connect(path) as client:
        with trio.move_on_after(10) as scope:
            await client.execute("slow")
        assert scope.cancelled_caught
        assert await client.execute("x") == "following"


# -- peers that are no QMP servers, or odd ones ------------------------------------------------


@pytest.mark.parametrize(
    "output",
    [
        b"220 mail.example.org ESMTP\r\n",
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"\x00\x01\x02\xff\n",
        b"[1, 2]\r\n",
        b"7\r\n",
        GREETING + GREETING,
        b'{"QMP"}\r\n',
    ],
)
async def test_no_qmp_server(path: Path, output: bytes) -> None:
    async def script(wire: Wire) -> None:
        wire.send(output)
        await wire.drain()

    async with fake_server(path, script):
        before = open_fds()
        with pytest.raises(qmpfd.ProtocolError):
            async with qmpfd.connect(path):
                pass
        await settle()
        assert open_fds() == before


@pytest.mark.parametrize("output", [b"", b'{"QMP": ', GREETING])
async def test_a_server_that_closes_before_its_reply(path: Path, output: bytes) -> None:
    async def script(wire: Wire) -> None:
        if output:
            wire.send(output)

    async with fake_server(path, script):
        with pytest.raises(trio.BrokenResourceError):
            async with qmpfd.connect(path):
                pass


@pytest.mark.parametrize(
    "result", [b"{}", b"7", b'{"fdset-id": "0", "fd": 3}', b'[{"fdset-id": 0}]', b"null"]
)
async def test_a_result_of_the_wrong_type(path: Path, result: bytes) -> None:
    async def script(wire: Wire) -> None:
        await negotiate(wire)
        wire.send(b'{"return": %s, "id": %d}\r\n' % (result, await ask(wire)))
        wire.send(b'{"return": [], "id": %d}\r\n' % await ask(wire))
        await wire.receive()

    async with fake_server(path, script), qmpfd.connect(path) as client:
        with (
            Pipe() as pipe,
            pytest.raises(qmpfd.ProtocolError, match="has another type than the command returns"),
        ):
            await client.add_fd(pipe)
        assert await client.query_fdsets() == []


@pytest.mark.parametrize("size", [1, 7, 1000])
async def test_answers_in_pieces(path: Path, size: int) -> None:
    """Replies split anywhere, with LF or CRLF, with events in between, and out of order."""

    async def script(wire: Wire) -> None:
        await negotiate(wire)
        first, second = await ask(wire), await ask(wire)
        event = b'{"event": "STOP", "timestamp": {"seconds": 1, "microseconds": 2}}\r\n'
        output = event + b'{"return": "second", "id": %d}\n' % second + event
        output += b'{"id": %d, "return": "first \xe2\x82\xac"}\r\n' % first
        for start in range(0, len(output), size):
            wire.send(output[start : start + size])
            await settle()
        await wire.receive()

    found: dict[str, object] = {}

    async def call(name: str) -> None:
        found[name] = await client.execute(name)

    async with (
        fake_server(path, script),
        qmpfd.connect(path) as client,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(call, "one")
        await settle()
        nursery.start_soon(call, "two")
    assert found == {"one": "first \u20ac", "two": "second"}


async def test_unexpected_descriptors_are_closed(path: Path) -> None:
    """Descriptors with a greeting, an event, or an unexpected reply are closed."""
    with Pipe() as pipe:

        async def script(wire: Wire) -> None:
            send_now(wire.sock, GREETING, [pipe])
            send_now(wire.sock, b'{"return": {}, "id": %d}\r\n' % await ask(wire), [pipe] * 3)
            answer = b'{"return": 7, "id": %d}\r\n' % await ask(wire)
            send_now(wire.sock, b'{"event": "X"}\r\n', [pipe])
            send_now(wire.sock, b'{"event": "X", "return": 0}\r\n', [pipe])
            send_now(wire.sock, b'{"return": 0, "id": 99999}\r\n', [pipe])
            send_now(wire.sock, answer, [pipe] * 253)
            pipe.release()
            await wire.receive()

        async with fake_server(path, script), qmpfd.connect(path) as client:
            assert await client.execute("x") == 7
            assert not pipe.held()
