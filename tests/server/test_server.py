"""The daemon over its socket: stored descriptors, replies, and closes.

Tests of commands/context.py, commands/control.py, commands/dispatch.py, commands/fds.py,
server/services.py, server/startup.py and server/handle.py.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable
from math import nan
from pathlib import Path
from typing import Any

import pytest
from helpers import (
    ADD,
    QUERY,
    Pipe,
    Wire,
    daemon,
    error,
    open_fds,
    pipes,
    remove,
    request,
    settle,
    value,
)
from kinds import KINDS, open_kind

import qmpfd
import qmpfd.testing
from qmpfd.kernel.fd import Fd

# -- descriptors of every kind -----------------------------------------------------------------


#: Kinds whose close(2) may take long: a netlink socket waits for an RCU grace period.
CLOSED_LATER = {"netlink socket"}


@pytest.mark.parametrize("kind", KINDS)
async def test_every_kind_is_stored_unchanged(kind: str, path: Path, tmp_path: Path) -> None:
    """The daemon stores the same open file description, unchanged, with close-on-exec."""
    with open_kind(kind, tmp_path) as fd:
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        link = os.readlink(f"/proc/self/fd/{fd}")
        async with daemon(path):
            with await Wire.session(path) as wire:
                before = open_fds()
                info = value(await wire.call("add-fd", {"opaque": kind}, [fd]))
                # The daemon is in this process: its descriptor number is valid here.
                held = info["fd"]
                assert open_fds() == {**before, held: link.removesuffix(" (deleted)")}
                assert _same_description(fd, held)
                assert fcntl.fcntl(held, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
                assert fcntl.fcntl(fd, fcntl.F_GETFL) == flags
                assert value(await wire.call("query-fdsets")) == [
                    {"fdset-id": 0, "fds": [{"fd": held, "opaque": kind}]}
                ]
                assert fcntl.fcntl(fd, fcntl.F_GETFL) == flags
                await remove(wire, info)
                # A thread closes it, because that may take long.
                while kind in CLOSED_LATER and open_fds() != before:
                    assert value(await wire.call("query-name")) == {}
                assert open_fds() == before
                assert fcntl.fcntl(fd, fcntl.F_GETFL) == flags


def _same_description(one: int, other: int) -> bool:
    """Return whether both are descriptors of one open file description.

    A flag set through one (fcntl(2), F_SETFL) shows in the other; O_PATH has no such flags.
    """
    flags = fcntl.fcntl(one, fcntl.F_GETFL)
    if flags & os.O_PATH:
        return os.path.sameopenfile(one, other)
    fcntl.fcntl(one, fcntl.F_SETFL, flags ^ os.O_NONBLOCK)
    try:
        return fcntl.fcntl(other, fcntl.F_GETFL) == fcntl.fcntl(one, fcntl.F_GETFL)
    finally:
        fcntl.fcntl(one, fcntl.F_SETFL, flags)


async def test_the_same_descriptor_twice(path: Path) -> None:
    async with daemon(path):
        with await Wire.session(path) as wire, pipes(1) as [pipe]:
            infos = [value(await wire.call("add-fd", {}, [pipe])) for _ in range(2)]
            assert infos[0]["fd"] != infos[1]["fd"]
            pipe.release()
            await remove(wire, infos[0])
            assert pipe.held()
            await remove(wire, infos[1])
            assert not pipe.held()


async def test_a_socket_of_the_daemon_itself(path: Path) -> None:
    """A client may send a descriptor of its own connection; that does not keep it open."""
    async with daemon(path):
        with await Wire.session(path) as other:
            with await Wire.session(path) as wire:
                info = value(await wire.call("add-fd", {}, [wire.sock]))
            await settle()
            await remove(other, info)


# -- closing -----------------------------------------------------------------------------------


async def test_a_removed_fd_is_closed_before_the_reply(path: Path) -> None:
    """A removed descriptor, or set, is closed before the reply: the pipe is at its end."""
    async with daemon(path):
        with await Wire.session(path) as wire, pipes(4) as made:
            await wire.call("add-fd", None, made[:1])
            infos = [value(await wire.call("add-fd", {"fdset-id": 0}, [pipe])) for pipe in made[1:]]
            for pipe in made:
                pipe.release()
            await remove(wire, infos[-1])
            assert [pipe.held() for pipe in made] == [True, True, True, False]
            assert value(await wire.call("remove-fd", {"fdset-id": 0})) == {}
            assert not any(pipe.held() for pipe in made)
            assert value(await wire.call("query-fdsets")) == []


async def test_an_fd_added_and_removed_in_one_read_is_closed(path: Path) -> None:
    """A descriptor added and removed in one read is closed before the reply to the removal."""
    async with daemon(path):
        with await Wire.session(path) as wire, Pipe() as pipe:
            wire.send(ADD + request("remove-fd", {"fdset-id": 0}) + QUERY, [pipe])
            pipe.release()
            await wire.reply()
            assert await wire.reply() == {"return": {}}
            assert not pipe.held()
            assert await wire.reply() == {"return": {}}  # query-name


async def test_stored_fds_stay_when_their_client_disconnects(path: Path) -> None:
    async with daemon(path):
        with Pipe() as pipe:
            with await Wire.session(path) as wire:
                info = value(await wire.call("add-fd", {"opaque": "left"}, [pipe]))
                pipe.release()
            await settle()
            assert pipe.held()
            with await Wire.session(path) as other:
                assert value(await other.call("query-fdsets")) == [
                    {"fdset-id": 0, "fds": [{"fd": info["fd"], "opaque": "left"}]}
                ]
                await remove(other, info)
                assert not pipe.held()


async def test_closed_when_the_daemon_ends(path: Path) -> None:
    with pipes(3) as made:
        async with daemon(path):
            with await Wire.session(path) as wire:
                await wire.call("add-fd", None, [made[0]])
                await wire.call("getfd", {"fdname": "n"}, [made[1]])
                wire.send(b" ", [made[2]])
                for pipe in made:
                    pipe.release()
                await settle()
                assert all(pipe.held() for pipe in made)
        assert not any(pipe.held() for pipe in made)


# -- getfd and closefd -------------------------------------------------------------------------


async def test_names_belong_to_one_connection(path: Path) -> None:
    async with daemon(path):
        with await Wire.session(path) as one, await Wire.session(path) as two, pipes(3) as made:
            for wire, pipe in [(one, made[0]), (two, made[1])]:
                assert value(await wire.call("getfd", {"fdname": "n"}, [pipe])) == {}
                pipe.release()
            assert value(await two.call("query-fdsets")) == []
            # The same name again: the daemon closes the old descriptor.
            assert value(await one.call("getfd", {"fdname": "n"}, [made[2]])) == {}
            made[2].release()
            assert [pipe.held() for pipe in made] == [False, True, True]
            assert value(await one.call("closefd", {"fdname": "n"})) == {}
            assert [pipe.held() for pipe in made] == [False, True, False]
            gone = await one.call("closefd", {"fdname": "n"})
            assert gone["error"] == {
                "class": "FdNotFound",
                "desc": "File descriptor named 'n' not found",
            }
            two.close()
            await settle()
            assert not made[1].held()


async def test_getfd_refused(path: Path) -> None:
    async with daemon(path):
        with await Wire.session(path) as wire, Pipe() as pipe:
            assert error(await wire.call("getfd", {"fdname": "n"})) == "FdNotSupplied"
            digit = await wire.call("getfd", {"fdname": "1st"}, [pipe])
            assert digit["error"] == {
                "class": "InvalidParameterValue",
                "desc": "Parameter 'fdname' expects a name not starting with a digit",
            }
            pipe.release()
            assert not pipe.held()


# -- dialects ----------------------------------------------------------------------------------


async def test_unknown_fdset_in_each_dialect(path: Path) -> None:
    async with daemon(path, dialect="spec"):
        with await Wire.session(path) as wire, Pipe() as pipe:
            for fdset_id in (5, -1):
                assert await wire.call("add-fd", {"fdset-id": fdset_id}, [pipe]) == {
                    "error": {
                        "class": "InvalidParameterValue",
                        "desc": "Parameter 'fdset-id' expects an existing fdset-id",
                    }
                }
            pipe.release()
            assert not pipe.held()
    async with daemon(path, dialect="qemu"):
        with await Wire.session(path) as wire, Pipe() as pipe:
            created = value(await wire.call("add-fd", {"fdset-id": 5}, [pipe]))
            assert created["fdset-id"] == 5
            assert await wire.call("add-fd", {"fdset-id": -1}, [pipe]) == {
                "error": {
                    "class": "GenericError",
                    "desc": "Parameter 'fdset-id' expects a non-negative value",
                }
            }
            pipe.release()
            await remove(wire, created)
            assert not pipe.held()


@pytest.mark.parametrize("dialect", ["spec", "qemu"])
async def test_error_classes_in_each_dialect(path: Path, dialect: str) -> None:
    expected = [
        (request("add-fd"), "FdNotSupplied", "No file descriptor supplied via SCM_RIGHTS"),
        (
            request("remove-fd", {"fdset-id": 3}),
            "FdNotFound",
            "File descriptor named 'fdset-id:3' not found",
        ),
        (
            request("remove-fd", {"fdset-id": 3, "fd": -4}),
            "FdNotFound",
            "File descriptor named 'fdset-id:3, fd:-4' not found",
        ),
        (request("nothing"), "CommandNotFound", "The command nothing has not been found"),
        (request("remove-fd"), "GenericError", "Parameter 'fdset-id' is missing"),
    ]
    async with daemon(path, dialect=dialect):
        with await Wire.session(path) as wire:
            for sent, kind, desc in expected:
                wire.send(sent)
                output = kind if dialect == "spec" or kind == "CommandNotFound" else "GenericError"
                assert await wire.reply() == {"error": {"class": output, "desc": desc}}


# -- the connection ----------------------------------------------------------------------------


async def test_greeting(path: Path) -> None:
    async with daemon(path):
        with await Wire.connect(path) as wire:
            greeting = (await wire.reply())["QMP"]
            assert greeting["capabilities"] == ["oob"]
            assert greeting["version"]["package"] == f"qmpfd {qmpfd.__version__}"
            numbers = greeting["version"]["qemu"]
            version = ".".join(str(numbers[part]) for part in ("major", "minor", "micro"))
            assert version == qmpfd.__version__


@pytest.mark.parametrize("request_id", [{"a": 1}, ["b"], 1.5, None, "c" * 5000])
async def test_ids_of_every_kind(path: Path, request_id: object) -> None:
    """Ids on empty replies, which share one value, and on other replies."""
    async with daemon(path):
        with await Wire.session(path) as wire, Pipe() as pipe:
            for _ in range(2):
                for name, arguments in (("getfd", {"fdname": "x"}), ("closefd", {"fdname": "x"})):
                    sent = {"execute": name, "arguments": arguments, "id": request_id}
                    wire.send(b" ", [pipe] if name == "getfd" else [])
                    wire.send(json.dumps(sent).encode())
                    assert await wire.reply() == {"return": {}, "id": request_id}
            wire.send(json.dumps({"execute": "query-fdsets", "id": request_id}).encode())
            assert await wire.reply() == {"return": [], "id": request_id}


async def test_a_client_that_shuts_down_its_side_gets_all_replies(path: Path) -> None:
    """A client that has shut down its sending direction gets all replies, and then the end."""
    async with daemon(path):
        with await Wire.session(path) as wire, pipes(2) as made:
            for pipe in made:
                wire.send(ADD, [pipe])
            wire.send(request("query-fdsets", id="last"))
            wire.shut_write()
            *added, listing = await wire.rest()
            assert [value(info)["fdset-id"] for info in added] == [0, 1]
            assert len(value(listing)) == 2
            assert listing["id"] == "last"


async def test_an_incomplete_request_before_the_half_close(path: Path) -> None:
    async with daemon(path):
        with await Wire.session(path) as wire:
            wire.send(QUERY + QUERY.strip()[:-1])
            wire.shut_write()
            assert await wire.rest() == [{"return": {}}]


@pytest.mark.parametrize("greeted", [True, False], ids=["greeting read", "greeting not read"])
@pytest.mark.parametrize("count", [1, 50])
async def test_commands_sent_right_before_close_are_executed(
    path: Path, count: int, greeted: bool
) -> None:
    """The daemon executes all commands, though it cannot send the replies."""
    async with daemon(path):
        with pipes(count) as made:
            with await (Wire.session(path) if greeted else Wire.connect(path)) as wire:
                if not greeted:
                    wire.send(request("qmp_capabilities"))
                for pipe in made:
                    wire.send(ADD, [pipe])
                    pipe.release()
            await settle()
            assert all(pipe.held() for pipe in made)
            with await Wire.session(path) as other:
                sets = value(await other.call("query-fdsets"))
                assert [fdset["fdset-id"] for fdset in sets] == [*reversed(range(count))]
                for fdset in sets:
                    await other.call("remove-fd", {"fdset-id": fdset["fdset-id"]})
                assert not any(pipe.held() for pipe in made)


async def test_all_sockets_share_one_store(path: Path) -> None:
    """All sockets of a daemon share one store."""
    others = [path.with_name(f"{n}.sock") for n in range(5)]
    async with daemon(path, *others):
        with Pipe() as pipe:
            with await Wire.session(path) as wire:
                info = value(await wire.call("add-fd", None, [pipe]))
            pipe.release()
            for other in others:
                with await Wire.session(other) as one, await Wire.session(other) as two:
                    for wire in (one, two):
                        assert len(value(await wire.call("query-fdsets"))) == 1
            with await Wire.session(others[-1]) as wire:
                await remove(wire, info)
            assert not pipe.held()
    assert not any(other.exists() for other in others)


@pytest.mark.parametrize("kind", [str, Path, os.fsencode])
async def test_one_path_is_no_list_of_paths(path: Path, kind: Callable[[Path], Any]) -> None:
    """A text is an iterable of its characters, and a type checker lets it pass."""
    with pytest.raises(TypeError, match="a list of paths"):
        await qmpfd.serve(kind(path))


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ({"dialect": "QEMU"}, ValueError),
        ({"limits": qmpfd.Limits(max_fds=0)}, ValueError),
        ({"limits": qmpfd.Limits(write_timeout=nan)}, ValueError),
        ({"limits": qmpfd.Limits(drain_timeout=None)}, TypeError),  # type: ignore[arg-type]
        ({"policy": Path("policy.toml")}, TypeError),
        ({"socket_mode": 600}, ValueError),
        ({"metrics_path": 5}, TypeError),
        ({"fdset_id": -1}, ValueError),
        ({"fdset_id": 1 << 63}, ValueError),
        ({"opaque": os.fsdecode(b"\xff")}, ValueError),
    ],
)
async def test_arguments_that_would_spoil_the_daemon(
    path: Path, arguments: dict[str, Any], expected: type[Exception]
) -> None:
    """They are refused at the start, and the descriptors are closed."""
    with Pipe() as pipe:
        fd = Fd(os.dup(pipe.fileno()))
        initial = (fd, arguments.pop("fdset_id", 0), arguments.pop("opaque", ""))
        pipe.release()
        with pytest.raises(expected):
            await qmpfd.serve([path], initial_fds=[initial], **arguments)
        assert not path.exists()
        assert not pipe.held()


async def test_arguments_of_related_types(path: Path) -> None:
    class Text(str):
        """A text of another type: JSON's encoder has no rule for it."""

    metrics = path.with_name("metrics")
    initial = (Fd(os.dup(0)), True, Text("name"))
    async with (
        qmpfd.testing.daemon(
            path, dialect=Text("qemu"), metrics_path=str(metrics), initial_fds=[initial]
        ),
        qmpfd.connect(path) as client,
    ):
        [fdset] = await client.query_fdsets()
        assert (fdset.fdset_id, fdset.fds[0].opaque) == (1, "name")
        assert (await client.execute("query-stats"))["dialect"] == "qemu"
        while not metrics.exists():  # a thread writes the file
            await client.execute("query-name")
