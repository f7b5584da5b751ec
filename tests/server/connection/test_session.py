"""Clients with unusual socket options, messages and descriptors: at most one command fails.

Tests of server/connection/session_state.py.
"""

from __future__ import annotations

import ctypes
import os
import socket
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.lowlevel
from helpers import (
    ADD,
    PATIENCE,
    QUERY,
    Pipe,
    Wire,
    daemon,
    error,
    open_fds,
    pipes,
    request,
    settle,
    value,
)

from qmpfd.kernel.fd import Fd
from qmpfd.limits import SCM_MAX_FD
from qmpfd.server.server import DaemonServer

#: Linux 6.16; not in Python's socket module.
SO_PASSRIGHTS = 83


async def test_out_of_band_bytes_stay_in_the_stream(path: Path) -> None:
    """A byte sent with MSG_OOB is read in order, and causes no busy loop."""
    async with daemon(path):
        with await Wire.session(path) as wire, pipes(2) as made:
            for at in range(1, len(ADD)):
                wire.send(ADD[:at], made[:1])
                assert wire.sock.send(ADD[at : at + 1], socket.MSG_OOB) == 1
                wire.send(ADD[at + 1 :])
                assert value(await wire.reply())["fdset-id"] == at - 1
            wire.sock.send(b" ", socket.MSG_OOB)
            with trio.fail_after(10):
                await settle()  # no busy loop
            value(await wire.call("query-name"))


async def test_out_of_band_bytes_before_the_negotiation(path: Path) -> None:
    async with daemon(path):
        wire = await Wire.connect(path)
        with wire:
            wire.sock.send(b" ", socket.MSG_OOB)
            assert await wire.reply()
            with trio.fail_after(10):
                await settle()
            value(await wire.call("qmp_capabilities"))


async def test_a_client_that_refuses_descriptors(path: Path) -> None:
    """open-fdset fails with an error reply; everything else works."""
    async with daemon(path):
        with await Wire.session(path) as wire, await Wire.session(path) as other, Pipe() as pipe:
            value(await wire.call("add-fd", None, [pipe]))
            _refuse_descriptors(wire)
            opening = request("open-fdset", {"fdset-id": 0})
            long = [[n] for n in range(5000)]
            await wire.send_all(
                request("query-name", id=1)
                + opening
                + request("query-name", id=2)
                + request("open-fdset", {"fdset-id": 0}, id=long)
                + request("query-name", id=3)
            )
            assert await wire.reply() == {"return": {}, "id": 1}
            refused = await wire.reply()
            assert error(refused) == "GenericError"
            assert "Operation not permitted" in refused["error"]["desc"]
            assert (await wire.reply())["id"] == 2
            refused = await wire.reply()
            assert (error(refused), refused["id"]) == ("GenericError", long)
            assert (await wire.reply())["id"] == 3
            await other.send_all(opening)
            assert "fd" in value(await other.reply())


def _refuse_descriptors(wire: Wire) -> None:
    try:
        wire.sock.setsockopt(socket.SOL_SOCKET, SO_PASSRIGHTS, 0)
    except OSError:
        pytest.skip("this kernel has no SO_PASSRIGHTS")


@pytest.mark.parametrize("long", [False, True])
async def test_descriptors_that_a_client_refuses_stay_in_their_set(path: Path, long: bool) -> None:
    opaque = "o" * (200_000 if long else 1)
    taking = {"opaque": opaque, "remove": True}
    async with daemon(path):
        with await Wire.session(path) as wire, await Wire.session(path) as other, Pipe() as pipe:
            for _ in range(2):
                wire.send(ADD, [pipe])
                await wire.reply()
            for name in (opaque, opaque, "other"):
                wire.send(b" ", [pipe])
                await wire.send_all(request("add-fd", {"fdset-id": 1, "opaque": name}))
                await wire.reply()
            before = value(await other.call("query-fdsets"))
            value(await other.call("watch-fdsets", {"enable": True}))
            _refuse_descriptors(wire)
            # Two from one set; the only one of another set, which ends; and a reply behind them.
            await wire.send_all(
                2 * request("open-fdset", taking)
                + request("open-fdset", {"fdset-id": 0, "remove": True})
                + request("query-name", id="last")
            )
            refused = [await wire.reply() for _ in range(3)]
            assert {reply["error"]["desc"] for reply in refused} == {
                "The file descriptors cannot be sent: Operation not permitted"
            }
            assert (await wire.reply())["id"] == "last"
            events = await other.replies(6)
            assert sorted(event["event"] for event in events) == 3 * ["FD_ADDED"] + 3 * [
                "FD_REMOVED"
            ]
            await other.send_all(request("query-fdsets"))
            after = value(await other.reply())
            assert [_sorted(each) for each in after] == [_sorted(each) for each in before]
            await other.send_all(request("open-fdset", taking))
            value(await other.reply())


def _sorted(fdset: dict[str, Any]) -> dict[str, Any]:
    return {**fdset, "fds": sorted(fdset["fds"], key=lambda fd: int(fd["fd"]))}


def io_uring() -> Fd:
    """Return a descriptor that the kernel does not send (SCM_RIGHTS)."""
    parameters = ctypes.create_string_buffer(120)  # struct io_uring_params
    number = ctypes.CDLL(None, use_errno=True).syscall(425, 1, parameters)
    if number < 0:
        pytest.skip(f"no io_uring: {os.strerror(ctypes.get_errno())}")
    return Fd(number)


async def test_a_descriptor_that_the_kernel_does_not_send(path: Path) -> None:
    async with daemon(path, initial_fds=[(io_uring(), 0, None)]):
        with await Wire.session(path) as wire:
            refused = await wire.call("open-fdset", {"fdset-id": 0})
            assert error(refused) == "GenericError"
            assert "Invalid argument" in refused["error"]["desc"]
            value(await wire.call("query-name"))


OWN_END: dict[str, tuple[bytes, int]] = {
    "getfd": (request("getfd", {"fdname": "me"}), 1),
    "add-fds": (request("add-fds", {"lifetime": "connection"}), 3),
    "unclaimed": (b" ", 1),
    "unclaimed, many": (b" ", SCM_MAX_FD),
}


async def _one_is_left(server: DaemonServer) -> None:
    """Wait until one session is left.

    A connection may end only when a thread has closed the descriptors sent over it, and there is no
    event for both.
    """
    with trio.fail_after(PATIENCE):  # noqa: ASYNC912 - the loop may end at once
        while len(server.sessions) > 1 or server.daemon.closer.pending:  # noqa: ASYNC110 - no event
            await trio.lowlevel.checkpoint()


@pytest.mark.parametrize("kind", OWN_END)
async def test_a_client_that_sends_its_own_end(kind: str, path: Path) -> None:
    """The daemon closes a client's own end with its connection, and so ends the connection."""
    data, count = OWN_END[kind]
    async with daemon(path) as server:
        with await Wire.session(path) as other:
            before = open_fds()
            for across in (False, True):
                with await Wire.session(path) as one, await Wire.session(path) as two:
                    one.send(data, [two.sock if across else one.sock] * count)
                    two.send(data, [one.sock if across else two.sock] * count)
                    await settle()
                await _one_is_left(server)
                assert open_fds() == before
            value(await other.call("query-name"))


async def test_an_own_end_may_be_stored(path: Path) -> None:
    """A stored own end keeps the connection open until it is removed."""
    async with daemon(path) as server:
        with await Wire.session(path) as wire:
            with await Wire.session(path) as one:
                info: Any = value(await wire.call("add-fd", None, [one.sock]))
            await settle()
            assert len(server.sessions) == 2
            wire.send(request("remove-fd", {"fdset-id": info["fdset-id"]}) + QUERY)
            await wire.replies(2)
            await _one_is_left(server)


async def test_heavy_clients_do_not_delay_a_light_one(path: Path) -> None:
    """A light client gets its reply before heavy clients, whose requests came before, are done."""
    clients, each = 20, 2000
    async with daemon(path) as server:
        with ExitStack() as stack:
            wires = [stack.enter_context(await Wire.session(path)) for _ in range(clients)]
            light = stack.enter_context(await Wire.session(path))
            for wire in wires:
                await wire.send_all(request("query-name") * each)
            value(await light.call("query-version"))
            assert server.daemon.stats.commands["query-name"] < clients * each / 2
            async with trio.open_nursery() as nursery:
                for wire in wires:
                    nursery.start_soon(wire.replies, each)
                while server.daemon.stats.commands["query-name"] < clients * each:
                    value(await light.call("query-version"))
