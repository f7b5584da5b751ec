"""Descriptors that wait in connections, for a command or to be taken: how many a user may hoard."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import trio
from helpers import (
    ADD,
    DaemonProcess,
    Pipe,
    Wire,
    daemon,
    daemon_process,
    error,
    open_fds,
    pipes,
    request,
    settle,
    value,
)

import qmpfd
from qmpfd.limits import MAX_FDS_A_TURN

#: Two users that are neither root nor the daemon's own.
HOARDER, OTHER = 65534, 65533
#: How many descriptors the daemon may have open in all.
TABLE = 1000


@contextmanager
def _user(uid: int) -> Iterator[None]:
    """Be that user for what is done in the block: connecting, that is."""
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)


@contextmanager
def _daemon() -> Iterator[DaemonProcess]:
    """A daemon with a small table, for everybody."""
    folder = Path(tempfile.mkdtemp(prefix="qmpfd-"))
    folder.chmod(0o755)
    policy = folder / "policy.toml"
    policy.write_text('[[rule]]\nallow = ["query", "open", "add", "remove"]\n')
    options = ("--policy", os.fspath(policy), "--socket-mode", "666")
    try:
        with daemon_process(
            folder / "q.sock", *options, prefix=["prlimit", f"--nofile={TABLE}:{TABLE}"]
        ) as process:
            yield process
    finally:
        shutil.rmtree(folder)


async def _session(process: DaemonProcess, uid: int) -> Wire:
    with _user(uid):
        wire = await Wire.connect(process.path)
    assert "QMP" in await wire.reply()
    assert await wire.call("qmp_capabilities") == {"return": {}}
    return wire


async def _still_served(process: DaemonProcess) -> None:
    """Another user can do everything."""
    with await _session(process, OTHER) as wire, Pipe() as pipe:
        wire.send(b" ", [pipe] * 100)
        info = value(await wire.call("add-fds"))
        assert len(info["fds"]) == 100
        fdset = {"fdset-id": info["fdset-id"]}
        value(await wire.call("open-fdset", fdset))
        value(await wire.call("remove-fd", fdset))


@pytest.mark.root
async def test_for_commands_that_never_come() -> None:
    with _daemon() as process, ExitStack() as stack, Pipe() as pipe:
        wires = [stack.enter_context(await _session(process, HOARDER)) for _ in range(20)]
        before = len(open_fds(process.pid))
        for wire in wires:
            wire.send(b" ", [pipe] * 100)
            value(await wire.call("query-name"))
        assert len(open_fds(process.pid)) - before <= TABLE // 4
        await _still_served(process)
        # The first have theirs, the last are told.
        assert len(value(await wires[0].call("add-fds"))["fds"]) == 100
        refused = await wires[-1].call("add-fds")
        assert error(refused) == "FdNotSupplied"
        assert f"of uid {HOARDER} wait" in refused["error"]["desc"]
        # There is room again, and the connection goes on.
        for wire in wires[:5]:
            wire.close()
        for _ in range(200):
            if len(open_fds(process.pid)) - before <= 100:
                break
            await trio.sleep(0.05)
        assert len(value(await wires[-1].call("add-fds", None, [pipe] * 100))["fds"]) == 100


@pytest.mark.root
async def test_in_replies_that_are_never_read() -> None:
    ask = request("open-fdset", {"fdset-id": 0})
    with _daemon() as process, ExitStack() as stack, Pipe() as pipe:
        wires = [stack.enter_context(await _session(process, HOARDER)) for _ in range(12)]
        value(await wires[0].call("add-fd", None, [pipe]))
        before = len(open_fds(process.pid))
        for wire in wires:
            await wire.send_all(ask * 600)  # more than its socket holds replies
        with trio.move_on_after(1):
            while True:
                held = len(open_fds(process.pid)) - before
                assert held <= TABLE // 4 + MAX_FDS_A_TURN + 1
                await trio.sleep(0.05)
        await _still_served(process)


async def test_what_waits_is_counted_and_what_does_not_is_not(path: Path) -> None:
    """For commands, in the queue, in replies; taken, given up, left behind by the dead."""
    async with daemon(path) as server, qmpfd.connect(path) as client:
        counts = server.daemon
        with pipes(1) as made, await Wire.session(path) as wire:
            await client.add_fd(made[0])
            assert counts.waiting == 0
            wire.send(b" ", made * 7)
            await settle()
            assert counts.waiting == 7
            wire.send(ADD)
            value(await wire.reply())
            assert counts.waiting == 0
            wire.send(b" ", made * 9)
            await settle()
            assert (counts.waiting, dict(counts.waiting_of)) == (9, {os.geteuid(): 9})
            wire.close()
            await settle()
            assert (counts.waiting, dict(counts.waiting_of)) == (0, {})
        with await Wire.session(path) as wire:
            await wire.send_all(request("open-fdset", {"fdset-id": 0}) * 600)
            await settle()
            assert 0 < counts.waiting <= MAX_FDS_A_TURN + 1
            for reply in await wire.replies(600):
                value(reply)
            await settle()
            assert counts.waiting == 0
            value(await wire.call("query-name"))
        await settle()
        assert counts.waiting == 0


async def test_a_limit_for_all_together(path: Path) -> None:
    """For the daemon's own user too."""
    async with daemon(path) as server:
        server.daemon.most_waiting = 10
        with await Wire.session(path) as wire, await Wire.session(path) as other, Pipe() as pipe:
            wire.send(b" ", [pipe] * 10)
            await settle()
            other.send(b" ", [pipe])
            await settle()
            refused = await other.call("add-fd")
            assert error(refused) == "FdNotSupplied"
            assert "the limit is 10" in refused["error"]["desc"]
            value(await other.call("add-fd", None, [pipe]))  # it did not have to wait
            opened = await other.call("open-fdset", {"fdset-id": 0})
            assert "the limit is 10" in opened["error"]["desc"]
            value(await wire.call("add-fd"))
            value(await wire.call("open-fdset", {"fdset-id": 0}))
