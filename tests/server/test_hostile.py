"""Clients that send too much, read nothing, send invalid input or die: other clients are served,
and no descriptor leaks.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
import trio
from helpers import (
    ADD,
    PATIENCE,
    QUERY,
    Pipe,
    Wire,
    daemon,
    daemon_process,
    error,
    open_fds,
    pipes,
    remove,
    request,
    settle,
    value,
)
from trio.testing import MockClock

import qmpfd
from qmpfd.limits import MAX_INCOMPLETE_BYTES


async def test_huge_request(path: Path) -> None:
    """A request beyond the limit gets one error, and the connection continues."""
    async with daemon(path, limits=qmpfd.Limits(max_request_bytes=4096)):
        with await Wire.session(path) as wire, pipes(2) as made:
            huge = request("add-fd", {"opaque": "x" * 100_000})
            async with trio.open_nursery() as nursery:
                wire.send(huge[:1], [made[0]])
                nursery.start_soon(wire.send_all, huge[1:] + b"\x1b" + request("query-name", id=1))
                replies = []
                while "id" not in (reply := await wire.reply()):
                    replies.append(reply)
            assert "limit exceeded" in replies[0]["error"]["desc"]
            assert {error(reply) for reply in replies} == {"GenericError"}
            assert reply == {"return": {}, "id": 1}
            made[0].release()
            assert not made[0].held()
            fits = request("add-fd", {"opaque": "x" * 3900})
            wire.send(fits, [made[1]])
            made[1].release()
            await remove(wire, value(await wire.reply()))


async def test_a_large_request_that_is_permitted(path: Path) -> None:
    """Larger than all incomplete requests together by default, and another client has begun one."""
    most = MAX_INCOMPLETE_BYTES + (8 << 20)
    text = b'{"execute": "remove-fds", "arguments": {"opaque": "%s"}}'
    text %= b"x" * (most - len(text) - 100)
    async with daemon(path, limits=qmpfd.Limits(max_request_bytes=most)):
        with await Wire.session(path) as wire, await Wire.session(path) as other:
            other.send(b'{"execute": "query-')
            with trio.fail_after(PATIENCE):
                await wire.send_all(text)
                assert error(await wire.reply()) == "FdNotFound"
            other.send(b'name"}')
            assert await other.reply() == {"return": {}}


async def test_request_of_almost_a_mebibyte(path: Path) -> None:
    opaque = "\u20ac" * 300_000
    async with daemon(path):
        with await Wire.session(path) as wire, Pipe() as pipe:
            sent = json.dumps(
                {"execute": "add-fd", "arguments": {"opaque": opaque}}, ensure_ascii=False
            ).encode()
            async with trio.open_nursery() as nursery:
                wire.send(sent[:1], [pipe])
                nursery.start_soon(wire.send_all, sent[1:])
                info = value(await wire.reply())
            # The reply is six times as long, more than the socket buffers.
            [fdset] = value(await wire.call("query-fdsets"))
            assert fdset["fds"] == [{"fd": info["fd"], "opaque": opaque}]


async def test_a_client_that_never_reads(path: Path, autojump_clock: MockClock) -> None:
    """The client is disconnected after the write timeout; no other client waits."""
    async with daemon(path, limits=qmpfd.Limits(write_timeout=25)):
        with await Wire.session(path) as wire, await Wire.session(path) as other:
            await _fill(wire)
            start = trio.current_time()
            with Pipe() as pipe:
                added = value(await other.call("add-fd", None, [pipe]))
                pipe.release()
                await remove(other, added)
                assert not pipe.held()
            assert trio.current_time() == start
            await trio.sleep(26)
            await wire.drain()
            assert value(await other.call("query-name")) == {}


async def test_a_client_that_reads_late(path: Path, autojump_clock: MockClock) -> None:
    """The client is not disconnected before the write timeout, and loses no reply."""
    async with daemon(path, limits=qmpfd.Limits(write_timeout=25)):
        with await Wire.session(path) as wire:
            sent = await _fill(wire)
            await trio.sleep(24)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(wire.send_all, request("query-name", id="last"))
                assert all("return" in reply for reply in await wire.replies(sent))
                assert await wire.reply() == {"return": {}, "id": "last"}


async def _fill(wire: Wire) -> int:
    """Send requests until the socket is full in both directions; return their number."""
    count = 0
    while True:
        try:
            wire.send(request("query-commands"))
        except BlockingIOError:
            return count
        count += 1
        await settle()


async def test_commands_of_a_disconnected_client_are_executed(
    path: Path, autojump_clock: MockClock
) -> None:
    """The daemon executes what a client had sent before it was disconnected."""
    async with daemon(path):
        with await Wire.session(path) as wire, Pipe() as pipe:
            wire.send(request("query-commands") * 1500)
            wire.send(ADD, [pipe])
            pipe.release()
            await trio.sleep(31)
            with await Wire.session(path) as other:
                [fdset] = value(await other.call("query-fdsets"))
                assert pipe.held()
                assert value(await other.call("remove-fd", {"fdset-id": fdset["fdset-id"]})) == {}
                assert not pipe.held()


async def test_too_many_connections(path: Path) -> None:
    """A client beyond the limit gets an error; when another one disconnects there is room."""
    async with daemon(path, limits=qmpfd.Limits(max_connections=2)):
        with await Wire.session(path) as one, await Wire.session(path) as two:
            with await Wire.connect(path) as three:
                [refusal] = await three.rest()
                assert error(refusal) == "GenericError"
                assert "the limit is 2" in refusal["error"]["desc"]
            two.close()
            await settle()
            with await Wire.session(path) as four:
                assert value(await four.call("query-name")) == {}
            assert value(await one.call("query-name")) == {}


async def test_invalid_input_gets_one_error(path: Path) -> None:
    """Each piece of invalid input gets one error, and the connection continues."""
    async with daemon(path):
        with await Wire.session(path) as wire, socket.socket() as passed:
            for broken in (b"\xff", b"]", b"{,", b'{"execute" "x"}', b"nope", b"{]"):
                wire.send(broken, [passed])
                wire.send(b"\x1b" + request("query-name", id=1))
                replies = []
                while "id" not in (reply := await wire.reply()):
                    replies.append(error(reply))
                assert set(replies) == {"GenericError"}
                assert value(reply) == {}
            for odd in (b"[]", b"7", b'"text"', b"null", b"{}"):
                wire.send(odd + b" ")
                assert error(await wire.reply()) == "GenericError"


# -- leaks -------------------------------------------------------------------------------------

REFUSALS = {
    "value": request("add-fd", {"fdset-id": 9}),
    "type": request("add-fd", {"fdset-id": "9"}),
    "member": request("add-fd", {"set": 9}),
    "envelope": request("add-fd", other=1),
    "arguments": b'{"execute":"add-fd","arguments":[]}',
    "broken": b'{"execute":"add-fd",}',
    "unknown": request("no-such-command"),
    "takes none": request("query-name"),
    "not UTF-8": b'{"execute":"add-fd","arguments":{"opaque":"\xff"}}',
    "twice": b'{"execute":"add-fd","execute":"add-fd"}',
    "too deep": b"[" * 1100,
    "digit": request("getfd", {"fdname": "0"}),
    "no name": request("getfd"),
    "out of band": b'{"exec-oob":"add-fd"}',
    "negotiated": request("qmp_capabilities"),
}


@pytest.mark.parametrize("count", [1, 2, 253])
@pytest.mark.parametrize("refused", REFUSALS.values(), ids=REFUSALS)
async def test_no_leak_when_refused(path: Path, refused: bytes, count: int) -> None:
    async with daemon(path):
        with await Wire.session(path) as other:
            await settle()
            before = open_fds()
            with await Wire.session(path) as wire, Pipe() as pipe:
                for _ in range(3):
                    wire.send(refused, [pipe] * count)
                    await settle()
                pipe.release()
                wire.send(b"\x1b" + request("query-name", id="last"))
                replies = []
                while "id" not in (reply := await wire.reply()):
                    replies.append(reply)
                assert len(replies) >= 3
                # A surplus descriptor may still be pending for one command, but not for two.
                await wire.call("add-fd")
                wire.send(request("remove-fd", {"fdset-id": 0}))
                await wire.reply()
                assert not pipe.held()
            await settle()
            assert open_fds() == before
            assert value(await other.call("query-fdsets")) == []


#: Program that connects to the socket in argv, sends some pieces, and kills itself.
VICTIM = """
import array, ast, os, signal, socket, sys
sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
sock.connect(sys.argv[1])
for data, count in ast.literal_eval(sys.argv[2]):
    fds = [os.memfd_create("victim") for _ in range(count)]
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    sock.sendmsg([data], rights)
os.kill(os.getpid(), signal.SIGKILL)
"""

CAPABILITIES = request("qmp_capabilities")
LIFE: list[tuple[bytes, int]] = [
    (CAPABILITIES[:9], 0),
    (CAPABILITIES[9:], 0),
    (b" ", 2),
    (ADD[:7], 1),
    (ADD[7:], 0),
    (ADD + ADD[:12], 253),
    (ADD[12:-3], 3),
    (b"}" + request("getfd", {"fdname": "n"}), 1),
    (QUERY * 50, 0),
    (b"{{{", 1),
]


def _dies(path: Path, life: Sequence[tuple[bytes, int]]) -> None:
    """Run a process that sends *life* to the daemon at *path*, and kills itself."""
    command = [sys.executable, "-S", "-E", "-c", VICTIM, os.fspath(path), repr(life)]
    assert subprocess.run(command, timeout=PATIENCE, check=False).returncode == -signal.SIGKILL


@pytest.mark.parametrize("length", range(len(LIFE) + 1))
async def test_a_client_killed_at_any_point(path: Path, length: int) -> None:
    async with daemon(path):
        with await Wire.session(path) as other:
            before = open_fds()
            await trio.to_thread.run_sync(_dies, path, LIFE[:length])
            await settle()
            # The descriptors of complete commands are stored, and no others.
            sets = value(await other.call("query-fdsets"))
            assert len(sets) == sum([length >= 5, length >= 6, length >= 8])
            for fdset in sets:
                await other.call("remove-fd", {"fdset-id": fdset["fdset-id"]})
            assert open_fds() == before


async def test_many_clients_are_killed(path: Path) -> None:
    """Several clients at a time are killed at random points."""
    seed = random.Random(7)
    with daemon_process(path) as process, await Wire.session(path) as other:
        before = open_fds(process.pid)
        async with trio.open_nursery() as nursery:
            for _ in range(20):
                life = LIFE[: seed.randrange(len(LIFE) + 1)]
                nursery.start_soon(trio.to_thread.run_sync, _dies, path, life)
        while True:  # until the commands of all killed clients are executed
            for fdset in value(await other.call("query-fdsets")):
                await other.call("remove-fd", {"fdset-id": fdset["fdset-id"]})
            if open_fds(process.pid) == before:
                break


@pytest.mark.parametrize("size", [1, 3, 8, 19])
async def test_half_sent_at_any_byte(path: Path, size: int) -> None:
    """A client disconnects after each byte; each piece that it sends carries a descriptor."""
    whole = CAPABILITIES + ADD + b"  " + ADD
    ends = [len(CAPABILITIES + ADD.rstrip()), len(whole.rstrip())]
    async with daemon(path):
        with await Wire.session(path) as other:
            before = open_fds()
            for length in range(0, len(whole) + 1, 1 if size > 1 else 3):
                with Pipe() as pipe:
                    with await Wire.connect(path) as wire:
                        for start in range(0, length, size):
                            wire.send(whole[start : min(start + size, length)], [pipe])
                        pipe.release()
                    await settle()
                    sets = value(await other.call("query-fdsets"))
                    assert len(sets) == sum(end <= length for end in ends)
                    for fdset in sets:
                        await other.call("remove-fd", {"fdset-id": fdset["fdset-id"]})
                    assert not pipe.held()
                assert open_fds() == before


@pytest.mark.root
async def test_another_user_is_rejected() -> None:
    """By default only the daemon's user and root may connect; other users get an error."""
    script = "import os, socket, sys; os.setuid(65534); s = socket.socket(socket.AF_UNIX)\n"
    script += "s.connect(sys.argv[1])\nwhile data := s.recv(999): sys.stdout.buffer.write(data)"
    path = Path(tempfile.mkdtemp(prefix="qmpfd-")) / "q.sock"
    try:
        path.parent.chmod(0o755)
        async with daemon(path, socket_mode=0o666):
            command = [sys.executable, "-S", "-E", "-c", script, os.fspath(path)]
            run = partial(subprocess.run, command, capture_output=True, check=True)
            output = json.loads((await trio.to_thread.run_sync(run)).stdout)
            assert output["error"]["class"] == "PermissionDenied"
            with await Wire.session(path) as wire:
                assert value(await wire.call("query-name")) == {}
    finally:
        path.parent.rmdir()
