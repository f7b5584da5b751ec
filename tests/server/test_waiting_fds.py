"""Quota of a uid for descriptors that are pending for a command or queued with a reply.

Tests of server/connection/fd_accounting.py.
"""

from __future__ import annotations

import errno
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
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
DAEMON = 65532
#: How many descriptors the daemon may have open in all.
TABLE = 1000


@contextmanager
def _user(uid: int) -> Iterator[None]:
    """Set the effective uid while the block runs, for a connect(2)."""
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)


@contextmanager
def _daemon(*prefix: str, options: Sequence[str] = ()) -> Iterator[DaemonProcess]:
    """Run a daemon with a small descriptor table, for all users."""
    folder = Path(tempfile.mkdtemp(prefix="qmpfd-"))
    folder.chmod(0o777)
    policy = folder / "policy.toml"
    policy.write_text('[[rule]]\nallow = ["query", "open", "add", "remove"]\n')
    options = ["--policy", os.fspath(policy), "--socket-mode", "666", *options]
    try:
        with daemon_process(
            folder / "q.sock", *options, prefix=[*prefix, "prlimit", f"--nofile={TABLE}:{TABLE}"]
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
    """Check that another user can execute all commands."""
    with await _session(process, OTHER) as wire, Pipe() as pipe:
        wire.send(b" ", [pipe] * 100)
        info = value(await wire.call("add-fds"))
        assert len(info["fds"]) == 100
        fdset = {"fdset-id": info["fdset-id"]}
        value(await wire.call("open-fdset", fdset))
        value(await wire.call("remove-fd", fdset))


@pytest.mark.root
async def test_pending_for_commands_that_never_come() -> None:
    with _daemon() as process, ExitStack() as stack, Pipe() as pipe:
        wires = [stack.enter_context(await _session(process, HOARDER)) for _ in range(20)]
        before = len(open_fds(process.pid))
        for wire in wires:
            wire.send(b" ", [pipe] * 100)
            value(await wire.call("query-name"))
        assert len(open_fds(process.pid)) - before <= TABLE // 4
        await _still_served(process)
        # The first clients still have their pending descriptors; the last get an error.
        assert len(value(await wires[0].call("add-fds"))["fds"]) == 100
        refused = await wires[-1].call("add-fds")
        assert error(refused) == "FdNotSupplied"
        assert f"of uid {HOARDER} wait" in refused["error"]["desc"]
        # When others disconnect there is room again, and the connection continues.
        for wire in wires[:5]:
            wire.close()
        for _ in range(200):
            if len(open_fds(process.pid)) - before <= 100:
                break
            await trio.sleep(0.05)
        assert len(value(await wires[-1].call("add-fds", None, [pipe] * 100))["fds"]) == 100


@pytest.mark.root
async def test_queued_in_replies_that_are_never_read() -> None:
    ask = request("open-fdset", {"fdset-id": 0})
    with _daemon() as process, ExitStack() as stack, Pipe() as pipe:
        wires = [stack.enter_context(await _session(process, HOARDER)) for _ in range(12)]
        value(await wires[0].call("add-fd", None, [pipe]))
        before = len(open_fds(process.pid))
        for wire in wires:
            await wire.send_all(ask * 600)  # more replies than its socket buffers
        with trio.move_on_after(1):
            while True:
                held = len(open_fds(process.pid)) - before
                assert held <= TABLE // 4 + MAX_FDS_A_TURN + 1
                await trio.sleep(0.05)
        await _still_served(process)


@contextmanager
def _unprivileged(*options: str) -> Iterator[DaemonProcess]:
    """Run a daemon whose user has a limit on descriptors in flight (unix(7), ETOOMANYREFS)."""
    # dac_override, to read the interpreter; other capabilities would lift the limit.
    caps = ["--inh-caps=-all,+dac_override", "--ambient-caps=+dac_override"]
    prefix = ["setpriv", f"--reuid={DAEMON}", "--clear-groups", *caps]
    with _daemon(*prefix, options=options) as process:
        yield process


@pytest.mark.root
async def test_in_flight_in_sent_replies() -> None:
    """Descriptors in flight count against the limit of the daemon's user until received."""
    ask = request("open-fdset", {"fdset-id": 0})
    with _unprivileged() as process, ExitStack() as stack, Pipe() as pipe:
        first = stack.enter_context(await _session(process, HOARDER))
        value(await first.call("add-fd", None, [pipe]))
        for _ in range(3 * TABLE // 100):
            wire = stack.enter_context(await _session(process, HOARDER))
            wire.send(ask * 100)
        await _still_served(process)
        refused = await first.call("open-fdset", {"fdset-id": 0})
        assert f"of uid {HOARDER} wait" in refused["error"]["desc"]
        stack.close()
        for _ in range(200):  # until the daemon has read the ends of the connections
            with await _session(process, HOARDER) as wire:
                if "return" in await wire.call("open-fdset", {"fdset-id": 0}):
                    return
            await trio.sleep(0.05)
        pytest.fail("the descriptors of closed connections still count")


@contextmanager
def _hoarded(sock: socket.socket, pipe: Pipe) -> Iterator[None]:
    """Run a process of the daemon's user that sends descriptors until ETOOMANYREFS."""
    script = (
        "import array, os, resource, socket, sys\n"
        f"os.setuid({DAEMON})\n"
        f"resource.setrlimit(resource.RLIMIT_NOFILE, ({2 * TABLE}, {2 * TABLE}))\n"
        "sock = socket.socket(fileno=int(sys.argv[1]))\n"
        "rights = array.array('i', [int(sys.argv[2])] * 200)\n"
        "try:\n"
        "    while True:\n"
        "        sock.sendmsg([b' '], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])\n"
        "except OSError as exc:\n"
        "    print(exc.errno, flush=True)\n"
        "    sys.stdin.read()\n"
    )
    numbers = sock.fileno(), pipe.fileno()
    with subprocess.Popen(
        [sys.executable, "-c", script, *map(str, numbers)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        pass_fds=numbers,
    ) as hoarder:
        assert hoarder.stdout is not None
        assert int(hoarder.stdout.readline()) == errno.ETOOMANYREFS
        yield


@pytest.mark.root
async def test_the_in_flight_limit_is_used_up_by_another_process() -> None:
    """Another process of the daemon's user has used up the limit: open-fdset is refused."""
    near, far = socket.socketpair()
    with _unprivileged() as process, near, far, Pipe() as pipe, ExitStack() as stack:
        wire = stack.enter_context(await _session(process, OTHER))
        value(await wire.call("add-fd", None, [pipe]))
        with _hoarded(near, pipe):
            refused = await wire.call("open-fdset", {"fdset-id": 0})
            assert f"uid {DAEMON} have sent wait to be received" in refused["error"]["desc"]
            value(await wire.call("query-fdsets"))
        far.close()
        value(await wire.call("open-fdset", {"fdset-id": 0}))


@pytest.mark.root
async def test_the_in_flight_limit_is_used_up_for_the_parent() -> None:
    """An add-fd that cannot be sent to the parent is refused; listings and removals work."""
    near, far = socket.socketpair()
    with _unprivileged("--supervise") as process, near, far, Pipe() as pipe, ExitStack() as stack:
        wire = stack.enter_context(await _session(process, OTHER))
        stored = value(await wire.call("add-fd", None, [pipe]))
        with _hoarded(near, pipe), trio.fail_after(3):
            refused = await wire.call("add-fd", None, [pipe])
            assert f"uid {DAEMON} have sent wait to be received" in refused["error"]["desc"]
            assert len(value(await wire.call("query-fdsets"))) == 1
            value(await wire.call("remove-fd", {"fdset-id": stored["fdset-id"]}))
        far.close()
        value(await wire.call("add-fd", None, [pipe]))


async def test_only_pending_and_unread_descriptors_count(path: Path) -> None:
    """The quota counts pending and unread descriptors; not taken, received or closed ones."""
    async with daemon(path) as server, qmpfd.connect(path) as client:
        counts = server.daemon.quotas
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
            assert (counts.waiting, dict(counts.waiting_by_uid)) == (9, {os.geteuid(): 9})
            wire.close()
            await settle()
            assert (counts.waiting, dict(counts.waiting_by_uid)) == (0, {})
        with await Wire.session(path) as wire:
            await wire.send_all(request("open-fdset", {"fdset-id": 0}) * 600)
            await settle()
            # As many as the socket buffers, and those of one time slice.
            assert 100 < counts.waiting <= 416 + MAX_FDS_A_TURN + 1
            for reply in await wire.replies(600):
                value(reply)
            await settle()
            counts.refresh_in_flight()
            assert counts.waiting == 0
            value(await wire.call("query-name"))
        await settle()
        assert counts.waiting == 0


async def test_the_limit_on_all_uids(path: Path) -> None:
    """The limit on the sum of all uids includes the daemon's own."""
    async with daemon(path) as server:
        server.daemon.quotas.waiting_limit = 10
        with await Wire.session(path) as wire, await Wire.session(path) as other, Pipe() as pipe:
            wire.send(b" ", [pipe] * 10)
            await settle()
            other.send(b" ", [pipe])
            await settle()
            refused = await other.call("add-fd")
            assert error(refused) == "FdNotSupplied"
            assert "the limit is 10" in refused["error"]["desc"]
            value(await other.call("add-fd", None, [pipe]))  # complete, so never pending
            opened = await other.call("open-fdset", {"fdset-id": 0})
            assert "the limit is 10" in opened["error"]["desc"]
            value(await wire.call("add-fd"))
            value(await wire.call("open-fdset", {"fdset-id": 0}))
