"""``query-stats``: counters, gauges, and the limits in force.

Tests of commands/extensions.py.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import trio
from helpers import Pipe, Wire, daemon, pipes, request, settle, value
from trio.testing import MockClock

import qmpfd
from qmpfd.policy import Access, Grant


async def stats(wire: Wire) -> dict[str, Any]:
    """Return the value of query-stats."""
    return dict(value(await wire.call("query-stats")))


def counts(listed: list[dict[str, Any]]) -> dict[str, int]:
    """Return listed names and counts as a mapping."""
    names = [each["name"] for each in listed]
    assert names == sorted(set(names))
    return {each["name"]: each["count"] for each in listed}


def one_peer(**others: object) -> dict[str, object]:
    """Return the expected entry of this process, with one connection."""
    output: dict[str, object] = {"pid": os.getpid(), "uid": os.getuid(), "gid": os.getgid()}
    output |= {"connections": 1, "age": 0, "idle": 0, "fds": 0, "watching": False}
    return output | others


async def test_at_the_start(path: Path) -> None:
    async with daemon(path):
        with await Wire.session(path) as wire:
            found = await stats(wire)
            soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
            limits = found.pop("limits")
            assert found == {
                "pid": os.getpid(),
                "uptime": 0,
                "dialect": "spec",
                "connections": 1,
                "connections-accepted": 1,
                "connections-refused": 0,
                "fdsets": 0,
                "fds": 0,
                "fds-kept": 0,
                "closes-pending": 0,
                "kept-safe": False,
                "commands": [{"name": "qmp_capabilities", "count": 1}],
                "errors": [],
                "peers": [one_peer()],
            }
            assert limits["max-open-files"] == soft
            assert "idle-timeout" not in limits


async def test_limits(path: Path) -> None:
    """The limits in force, with times in seconds."""
    limits = qmpfd.Limits(
        max_connections=9,
        max_connections_per_uid=8,
        max_fds=7,
        max_fds_per_uid=6,
        max_request_bytes=5000,
        idle_timeout=4.5,
        write_timeout=3.25,
        drain_timeout=2,
    )
    async with daemon(path, limits=limits, dialect="qemu"):
        with await Wire.session(path) as wire:
            found = await stats(wire)
            assert found["dialect"] == "qemu"
            del found["limits"]["max-open-files"]
            assert found["limits"] == {
                "max-connections": 9,
                "max-connections-per-uid": 8,
                "max-fds": 7,
                "max-fds-per-uid": 6,
                "max-request-bytes": 5000,
                "idle-timeout": 4.5,
                "write-timeout": 3.25,
                "drain-timeout": 2.0,
            }


async def test_commands_and_errors(path: Path) -> None:
    """A failed command counts in both; input that is no command counts as an error only."""
    async with daemon(path):
        with await Wire.session(path) as wire:
            await wire.call("query-name")
            await wire.call("query-name")
            await wire.call("remove-fd", {"fdset-id": 7})
            await wire.call("remove-fd")
            await wire.call("add-fd")
            await wire.call("no-such")
            wire.send(b"]")
            await wire.reply()
            found = await stats(wire)
            assert counts(found["commands"]) == {
                "add-fd": 1,
                "qmp_capabilities": 1,
                "query-name": 2,
                "remove-fd": 1,
            }
            assert counts(found["errors"]) == {
                "CommandNotFound": 1,
                "FdNotFound": 1,
                "FdNotSupplied": 1,
                "GenericError": 2,
            }
            assert counts((await stats(wire))["commands"])["query-stats"] == 1


async def test_descriptors_come_and_go(path: Path) -> None:
    async with daemon(path):
        with await Wire.session(path) as wire, pipes(3) as made:

            async def gauges() -> tuple[int, int, int]:
                found = await stats(wire)
                return found["fdsets"], found["fds"], found["fds-kept"]

            await wire.call("add-fd", None, made[:1])
            assert await gauges() == (1, 1, 1)
            await wire.call("add-fds", None, made)
            assert await gauges() == (2, 4, 4)
            with await Wire.session(path) as other:
                await other.call("getfd", {"fdname": "x"}, made[:1])
                await other.call("add-fds", {"lifetime": "connection"}, made)
                assert await gauges() == (3, 7, 8)
            await settle()
            assert await gauges() == (2, 4, 4)
            await wire.call("remove-fd", {"fdset-id": 1})
            await wire.call("remove-fd", {"fdset-id": 0})
            assert await gauges() == (0, 0, 0)


async def test_connections_come_and_go(path: Path) -> None:
    async with daemon(path, limits=qmpfd.Limits(max_connections=2)):
        with await Wire.session(path) as wire:
            with await Wire.connect(path) as other, await Wire.connect(path) as refused:
                await other.reply()
                assert "error" in await refused.reply()
                found = await stats(wire)
                gauge, accepted, turned_away = (
                    found["connections"],
                    found["connections-accepted"],
                    found["connections-refused"],
                )
                assert (gauge, accepted, turned_away) == (2, 2, 1)
            await settle()
            assert (await stats(wire))["connections"] == 1


async def test_uptime(path: Path, autojump_clock: MockClock) -> None:
    async with daemon(path):
        with await Wire.session(path) as wire:
            await trio.sleep(99.5)
            assert (await stats(wire))["uptime"] == 99


async def test_arguments(path: Path) -> None:
    async with daemon(path):
        with await Wire.session(path) as wire:
            reply = await wire.call("query-stats", {"x": 1})
            assert reply["error"]["desc"] == "Parameter 'x' is unexpected"


@pytest.mark.parametrize("how", ["getfd", "expires", "hangup"])
async def test_every_removal_lowers_the_gauges(
    path: Path, how: str, autojump_clock: MockClock
) -> None:
    """Every kind of removal lowers the gauges: else the limits would be used up over time."""
    async with daemon(path, limits=qmpfd.Limits(max_fds=2, max_fds_per_uid=2)):
        with await Wire.session(path) as wire:
            for _ in range(5):
                with pipes(2) as made:
                    if how == "getfd":
                        for pipe in made:
                            wire.send(request("getfd", {"fdname": "same"}), [pipe])
                        assert [value(reply) for reply in await wire.replies(2)] == [{}, {}]
                    elif how == "expires":
                        value(await wire.call("add-fds", {"expires": 1}, made))
                        await trio.sleep(2)
                    else:
                        value(await wire.call("add-fds", {"watch-hangup": True}, made))
                await trio.sleep(2)
            stored = 1 if how == "getfd" else 0
            assert (await stats(wire))["fds-kept"] == stored


async def test_descriptors_that_are_not_stored_do_not_count(path: Path) -> None:
    async with daemon(path):
        with await Wire.session(path) as wire, Pipe() as pipe:
            wire.send(b" ", [pipe])  # pending
            await settle()
            assert (await stats(wire))["fds-kept"] == 0


# -- peers -------------------------------------------------------------------------------------


async def peers(wire: Wire) -> list[dict[str, Any]]:
    """Return the connected peers."""
    listed: list[dict[str, Any]] = (await stats(wire))["peers"]
    return listed


async def test_a_process_with_several_connections(path: Path) -> None:
    async with daemon(path):
        with await Wire.session(path) as wire, pipes(3) as made:
            with await Wire.session(path) as other, await Wire.session(path):
                assert await peers(wire) == [one_peer(connections=3)]
                await other.call("watch-fdsets", {"enable": True})
                await other.call("getfd", {"fdname": "x"}, made[:1])
                await other.call("add-fds", {"lifetime": "connection"}, made[:2])
                await wire.call("getfd", {"fdname": "x"}, made[:1])
                await wire.call("add-fds", None, made)
                assert await peers(wire) == [one_peer(connections=3, fds=4, watching=True)]
            await settle()
            assert await peers(wire) == [one_peer(fds=1)]


async def test_ages(path: Path, autojump_clock: MockClock) -> None:
    """Age of the oldest connection, and seconds since the last request of any."""
    async with daemon(path):
        with await Wire.session(path) as wire:
            await trio.sleep(10.5)
            [peer] = await peers(wire)
            assert peer["age"] == 10
            assert peer["idle"] in (9, 10)
            with await Wire.session(path):
                await trio.sleep(5)
                [peer] = await peers(wire)
                assert (peer["age"], peer["connections"]) == (15, 2)
                assert peer["idle"] in (4, 5)


_CONNECT = """
import socket, sys
with socket.socket(socket.AF_UNIX) as sock:
    sock.connect(sys.argv[1])
    print(sock.recv(1) != b"", flush=True)
    sys.stdin.read()
"""


async def test_other_processes(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The peers connected longest come first; those beyond the limit are left out."""
    async with daemon(path):
        with await Wire.session(path) as wire:
            command = [sys.executable, "-c", _CONNECT, str(path)]
            with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
                assert other.stdout is not None
                await trio.to_thread.run_sync(other.stdout.readline)
                listed = await peers(wire)
                assert {peer["pid"] for peer in listed} == {os.getpid(), other.pid}
                assert listed == sorted(listed, key=lambda peer: -peer["age"])
                monkeypatch.setattr("qmpfd.commands.extensions.MAX_PEERS", 1)
                assert len(await peers(wire)) == 1
                assert (await stats(wire))["connections"] == 2
                other.communicate()
            await settle()
            assert [peer["pid"] for peer in await peers(wire)] == [os.getpid()]


# -- restricted clients ------------------------------------------------------------------------

#: Members with totals.
TOTALS = {"fdsets", "fds", "fds-kept", "closes-pending", "commands", "errors"}


@pytest.mark.parametrize(
    "fdsets, opaque, output",
    [(None, None, True), (frozenset({0}), None, False), (None, ("*",), False)],
)
async def test_totals_only_for_clients_that_see_all(
    path: Path, fdsets: frozenset[int] | None, opaque: tuple[str, ...] | None, output: bool
) -> None:
    """A client that may not see all descriptors gets no totals, which would reveal others."""
    async with daemon(path) as server:
        with await Wire.session(path) as wire:
            [session] = server.sessions
            session.context.change_access(Access((Grant(frozenset({"query"}), fdsets, opaque),)))
            found = await stats(wire)
            assert TOTALS & found.keys() == (TOTALS if output else set())
            assert found["connections"] == 1


async def test_no_limit_of_one_user_is_above_that_of_all(path: Path) -> None:
    """Limits in force in a process with a small descriptor table."""
    async with daemon(path) as server:
        with await Wire.session(path) as wire:
            table = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
            limits = (await stats(wire))["limits"]
            assert limits["max-fds-per-uid"] <= limits["max-fds"] < table
            assert limits["max-connections-per-uid"] <= limits["max-connections"]
            quotas = server.daemon.quotas
            assert quotas.fds_limit(0) == limits["max-fds-per-uid"]
            assert quotas.fds_limit(4711) <= table // 2
    assert qmpfd.Limits(max_connections=3).within(100).max_connections_per_uid == 3
    assert qmpfd.Limits().within(1000).max_fds_per_uid == 750
