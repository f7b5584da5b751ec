"""Limits on clients: the option of each, and the error that names the limit.

Tests of limits.py and server/listen/admission.py.
"""

from __future__ import annotations

import json
import os
import socket
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio
from helpers import ADD, Pipe, Wire, daemon, daemon_process, error, pipes, request, settle, value
from trio.testing import MockClock

import qmpfd
from qmpfd.errors import GenericError
from qmpfd.fdsets import Peer
from qmpfd.limits import FDS_AT_ONCE, MAX_OPAQUE_TOTAL, NEGOTIATION_TIMEOUT, Limits
from qmpfd.policy import Policy, Rule
from qmpfd.server.listen.admission import admit
from qmpfd.server.server import DaemonServer

TOO_MANY_FDS = "Too many file descriptors: the limit is 3"


async def _refused(wire: Wire, desc: str) -> None:
    """Check that every command that stores a descriptor is refused and stores none."""
    for name, arguments in (("add-fd", {}), ("add-fds", {}), ("getfd", {"fdname": "more"})):
        with Pipe() as pipe:
            reply = await wire.call(name, arguments, [pipe])
            assert (error(reply), reply["error"]["desc"]) == ("GenericError", desc)
            pipe.release()
            assert not pipe.held()


# -- by option ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "option, desc",
    [
        ("--max-fds", TOO_MANY_FDS),
        ("--max-fds-per-uid", "Too many file descriptors of uid 0: the limit is 3"),
    ],
)
async def test_limits_on_descriptors(option: str, desc: str, path: Path) -> None:
    """Descriptors of getfd count too; removed ones make room."""
    with (
        daemon_process(path, option, "3"),
        pipes(3) as made,
        await Wire.session(path) as wire,
        await Wire.session(path) as other,
    ):
        value(await wire.call("add-fd", None, made[:1]))
        value(await other.call("getfd", {"fdname": "n"}, made[1:2]))
        reply = await wire.call("add-fds", None, made[:2])
        assert reply["error"]["desc"] == desc  # all or nothing
        value(await wire.call("add-fd", None, made[2:]))
        await _refused(wire, desc)
        # getfd replaces a descriptor of the same name.
        value(await other.call("getfd", {"fdname": "n"}, made[:1]))
        value(await other.call("closefd", {"fdname": "n"}))
        value(await wire.call("add-fd", {"fdset-id": 0}, made[:1]))
        await _refused(wire, desc)
        value(await wire.call("remove-fd", {"fdset-id": 0}))
        value(await wire.call("add-fds", None, made[:2]))


@pytest.mark.parametrize(
    "option, desc",
    [
        ("--max-connections", "Too many connections: the limit is 2"),
        ("--max-connections-per-uid", "Too many connections of uid 0: the limit is 2"),
    ],
)
async def test_limits_on_connections(option: str, desc: str, path: Path) -> None:
    with (
        daemon_process(path, option, "2"),
        await Wire.session(path) as one,
        await Wire.session(path) as two,
    ):
        for _ in range(3):
            with await Wire.connect(path) as three:
                [output] = await three.rest()
                assert (error(output), output["error"]["desc"]) == ("GenericError", desc)
        stats = value(await one.call("query-stats"))
        assert (stats["connections"], stats["connections-refused"]) == (2, 3)
        two.close()
        while value(await one.call("query-stats"))["connections"] == 2:
            pass
        with await Wire.session(path) as four:
            assert value(await four.call("query-name")) == {}


async def test_limit_on_the_bytes_of_a_request(path: Path) -> None:
    with (
        daemon_process(path, "--max-request-bytes", "1024"),
        await Wire.session(path) as wire,
    ):
        fits = request("remove-fd", {"fdset-id": 0, "fd": 1})
        assert "not found" in (await wire.call("remove-fd", {"fdset-id": 0}))["error"]["desc"]
        wire.send(b'"' + b"x" * 1100 + b'"\n\x1b' + fits)
        assert "limit exceeded" in (await wire.reply())["error"]["desc"]
        while error(reply := await wire.reply()) != "FdNotFound":
            assert error(reply) == "GenericError"


async def test_write_timeout(path: Path) -> None:
    with (
        daemon_process(path, "--write-timeout", "0.2") as process,
        await Wire.session(path) as wire,
    ):
        wire.send(request("query-qmp-schema") * 200)
        line = process.await_line(lambda line: "does not read its replies" in line)
        await wire.drain()
    assert " uid 0 does not read its replies" in line


async def test_idle_timeout(path: Path) -> None:
    with daemon_process(path, "--idle-timeout", "0.5"), await Wire.session(path) as wire:
        output, *more = await wire.rest()
        assert not more
        assert "Idle for more than 0.5 s" in output["error"]["desc"]


# -- time --------------------------------------------------------------------------------------


async def test_a_client_that_never_negotiates_is_disconnected(
    path: Path, autojump_clock: MockClock
) -> None:
    async with daemon(path):
        with await Wire.connect(path) as silent, await Wire.session(path) as other:
            await silent.reply()
            start = trio.current_time()
            [output] = await silent.rest()
            assert NEGOTIATION_TIMEOUT <= trio.current_time() - start <= NEGOTIATION_TIMEOUT + 2
            assert "No 'qmp_capabilities' within 60 s" in output["error"]["desc"]
            assert value(await other.call("query-name")) == {}


def received(sock: socket.socket) -> bytes:
    """Return all bytes that the socket holds."""
    found = b""
    with suppress(BlockingIOError):
        while True:
            found += sock.recv(1 << 20)
    return found


async def test_no_error_follows_an_incomplete_reply(path: Path) -> None:
    """No error follows an incomplete reply when its client is disconnected."""
    async with daemon(path) as server:
        with await Wire.connect(path) as wire:
            await wire.reply()
            (session,) = server.sessions
            await wire.send_all(request("query-name", id="x" * 100_000) * 4)
            await settle()
            found = received(wire.sock)  # no checkpoint until the eviction: nothing else is sent
            session.evict_if_idle(trio.current_time() + NEGOTIATION_TIMEOUT + 1)
            found += await wire.drain()
    *whole, rest = found.split(b"\r\n")
    assert [json.loads(line)["error"]["class"] for line in whole] == ["CommandNotFound"] * len(
        whole
    )
    assert rest
    assert b"No 'qmp" not in rest


@pytest.mark.parametrize("text", [b" ", b"7 ", request("query-name")], ids=["blank", "7", "early"])
async def test_other_input_does_not_extend_the_time_to_negotiate(
    text: bytes, path: Path, autojump_clock: MockClock
) -> None:
    """Blanks and refused requests do not extend the time to negotiate."""
    async with daemon(path):
        with await Wire.connect(path) as wire:
            for _ in range(5):
                wire.send(text)
                await trio.sleep(NEGOTIATION_TIMEOUT / 4)
            output = (await wire.rest())[-1]
            assert "No 'qmp_capabilities'" in output["error"]["desc"]


async def test_a_client_that_sends_requests_is_not_idle(
    path: Path, autojump_clock: MockClock
) -> None:
    async with daemon(path, limits=qmpfd.Limits(idle_timeout=10)):
        with await Wire.session(path) as asking, await Wire.session(path) as babbling:
            for _ in range(10):
                await trio.sleep(4)
                assert value(await asking.call("query-name")) == {}
                if babbling.sock.fileno() >= 0:
                    try:
                        babbling.send(b" ")
                    except BrokenPipeError:
                        [output] = await babbling.rest()
                        assert "Idle for more than 10 s" in output["error"]["desc"]
                        babbling.close()
            assert babbling.sock.fileno() < 0
            start = trio.current_time()
            await asking.rest()
            assert 9 < trio.current_time() - start < 13


async def test_no_idle_timeout_by_default(path: Path, autojump_clock: MockClock) -> None:
    async with daemon(path):
        with await Wire.session(path) as wire:
            await trio.sleep(80_000)
            assert value(await wire.call("query-name")) == {}


async def test_inherited_descriptors_count_as_stored(path: Path) -> None:
    """Descriptors of ``--add-fd`` count as stored."""
    with pipes(1) as made:
        number = made[0].fileno()
        options = ["--max-fds", "2", "--add-fd", f"fd={number},set=0"]
        with daemon_process(path, *options, pass_fds=[number]), await Wire.session(path) as wire:
            assert value(await wire.call("query-stats"))["fds-kept"] == 1
            value(await wire.call("add-fd", None, made))
            refused = await wire.call("add-fd", None, made)
            assert refused["error"]["desc"] == "Too many file descriptors: the limit is 2"
            value(await wire.call("remove-fd", {"fdset-id": 0}))
            assert value(await wire.call("query-stats"))["fds-kept"] == 1
            value(await wire.call("add-fd", None, made))


async def test_limits_stay_below_the_limit_on_open_files(path: Path) -> None:
    """The limits stay below RLIMIT_NOFILE: pending descriptors and other users need room."""
    options = ["--max-fds", "100000", "--max-fds-per-uid", "100000"]
    with (
        daemon_process(path, *options, prefix=["prlimit", "--nofile=400:400"]),
        pipes(1) as made,
        await Wire.session(path) as wire,
    ):
        limits = value(await wire.call("query-stats"))["limits"]
        assert limits["max-fds"] == 300
        value(await wire.call("add-fds", None, made * 200))
        value(await wire.call("add-fds", None, made * 100))
        refused = await wire.call("add-fd", None, made)
        assert refused["error"]["desc"].endswith("the limit is 300")


async def test_others_leave_room_for_root_and_the_daemons_own_user() -> None:
    """However many users have taken all that they may: these two can connect, and store."""

    @dataclass
    class Connected:
        peer: Peer

    own, uid = Peer(1, os.geteuid(), 0), os.geteuid() + 1
    policy, limits = Policy([Rule(allow=["add"])]), Limits(max_connections=32)
    connected = [Connected(Peer(1, uid + number, 0)) for number in range(30)]
    admit(Peer(1, uid, 0), frozenset(), policy, limits, connected[:29])
    with pytest.raises(GenericError, match="Too many connections: the limit is 30"):
        admit(Peer(1, uid, 0), frozenset(), policy, limits, connected)
    admit(own, frozenset(), policy, limits, connected)
    server = DaemonServer(limits=Limits(max_fds=100))
    quotas = server.daemon.quotas
    quotas.check_quota(uid, 94)
    with pytest.raises(GenericError, match="Too many file descriptors: the limit is 94"):
        quotas.check_quota(uid, 95)
    quotas.check_quota(own.uid, 100)
    quotas.opaque_total = MAX_OPAQUE_TOTAL - 1
    with pytest.raises(GenericError, match="Too much opaque text"):
        quotas.check_quota(uid, 1, "x")
    quotas.check_quota(own.uid, 1, "x")
    server.close()


@pytest.mark.parametrize("owner", [True, False], ids=["own user", "another"])
async def test_the_end_of_the_descriptor_table_is_the_owners(
    owner: bool, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However users fill the table, with connections, stored or pending descriptors: the daemon's
    own user and root can connect, and store.
    """
    monkeypatch.setattr("qmpfd.commands.quotas.is_owner", lambda uid: owner)
    desc = "Too many open files: the limit is 0"
    async with daemon(path) as server:
        with await Wire.session(path) as wire:
            assert server.daemon.quotas.others_table > 100
            server.daemon.quotas.others_table = 0
            if owner:
                (await Wire.session(path)).close()
                with pipes(1) as made:
                    for name in ("add-fd", "add-fds"):
                        value(await wire.call(name, {}, made))
                    wire.send(b" ", made)
                    await settle()
                    value(await wire.call("getfd", {"fdname": "more"}))
                return
            await _refused(wire, desc)
            with Pipe() as pipe:
                wire.send(b" ", [pipe])
                pipe.release()
                await settle()
                assert not pipe.held()
                assert (await wire.call("add-fd"))["error"]["desc"] == desc
            with await Wire.connect(path) as refused:
                assert (await refused.reply())["error"]["desc"] == desc


async def test_a_user_leaves_room_for_others() -> None:
    server = DaemonServer()
    server.daemon.quotas.waiting_limit = 10
    server.daemon.quotas.check_quota(os.geteuid(), 11)
    server.daemon.quotas.check_quota(os.geteuid() + 1, 10)
    with pytest.raises(GenericError, match=f"uid {os.geteuid() + 1}: the limit is 10"):
        server.daemon.quotas.check_quota(os.geteuid() + 1, 11)
    server.close()


async def test_hanging_closes_count_against_their_own_uid() -> None:
    """Hanging closes count against the quota of the client's uid only."""
    server = DaemonServer(limits=Limits(max_fds=100, max_fds_per_uid=50))
    quotas, stranger = server.daemon.quotas, os.geteuid() + 1
    server.daemon.closer.pending_by_uid[stranger] = 50
    quotas.check_quota(os.geteuid(), 50)
    quotas.check_quota(stranger + 1, 50)
    with pytest.raises(GenericError, match=f"uid {stranger}: the limit is 50"):
        quotas.check_quota(stranger, 1)
    quotas.waiting_limit = 60
    quotas.check_waiting(stranger + 1, 30)
    with pytest.raises(GenericError, match=f"of uid {stranger} wait in its connections"):
        quotas.check_waiting(stranger, 10)
    server.daemon.closer.pending_by_uid.clear()
    server.close()


async def test_near_the_limit_requests_are_received_one_by_one() -> None:
    """Near the limit, the daemon receives the descriptors of one request at a time."""
    server = DaemonServer(limits=Limits(max_fds=100))
    counts = server.daemon.quotas
    assert counts.fds_at_once() == FDS_AT_ONCE
    counts.fds_total = 100 - FDS_AT_ONCE
    assert counts.fds_at_once() == FDS_AT_ONCE
    counts.waiting = 1
    assert counts.fds_at_once() == 1
    server.close()


# -- text --------------------------------------------------------------------------------------


async def test_limit_on_the_sum_of_opaque_texts(path: Path) -> None:
    """Limit on the sum of all opaque texts: names of getfd count, removed texts do not."""
    text = "x" * 1_000_000
    most = MAX_OPAQUE_TOTAL // len(text)
    async with daemon(path):
        with await Wire.session(path) as wire, pipes(1) as made:

            async def call(name: str, arguments: dict[str, object]) -> dict[str, object]:
                sent = request(name, arguments)
                wire.send(sent[:1], made)
                replies: list[dict[str, object]] = []
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(wire.send_all, sent[1:])
                    replies.append(await wire.reply())
                return replies[0]

            for number in range(most):
                if number % 2:
                    value(await call("getfd", {"fdname": f"n{number}" + text[:-8]}))
                else:
                    value(await call("add-fd", {"opaque": text}))
            for name, arguments in (("add-fd", {"opaque": text}), ("getfd", {"fdname": text})):
                reply = await call(name, dict(arguments))
                assert "opaque text" in reply["error"]["desc"]  # type: ignore[index]
            value(await wire.call("remove-fd", {"fdset-id": 0}))
            value(await call("add-fd", {"opaque": text}))


async def test_pending_descriptors_do_not_count_as_stored(path: Path) -> None:
    async with daemon(path, limits=qmpfd.Limits(max_fds=1)):
        with await Wire.session(path) as wire, pipes(1) as made:
            wire.send(b" ", made * 100)
            await settle()
            wire.send(ADD)
            value(await wire.reply())
