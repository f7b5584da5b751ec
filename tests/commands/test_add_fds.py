"""``add-fds``: all descriptors or none; the end of a connection, expiry and hang-ups.

Tests of commands/extensions.py, fdsets/expiry.py and kernel/hangups.py.
"""

from __future__ import annotations

import fcntl
import os
import pty
import select
import socket
import struct
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from subprocess import PIPE
from typing import Any

import pytest
import trio
from helpers import (
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
from kinds import open_kind
from trio.testing import MockClock

import qmpfd

HANGUP = "Parameter 'watch-hangup' expects sockets or pipes only"


async def opaques(client: qmpfd.Client) -> list[str | None]:
    """Return the opaque texts of all stored descriptors, in the order of the listing."""
    return [fd.opaque for fdset in await client.query_fdsets() for fd in fdset.fds]


# -- all or nothing ----------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 253])
async def test_any_number_of_descriptors(path: Path, count: int) -> None:
    async with daemon(path), qmpfd.connect(path) as client:
        with pipes(count) as made:
            added = await client.add_fds(made, opaque="some")
            for pipe in made:
                pipe.release()
            assert added.fdset_id == 0
            assert len({fd.fd for fd in added.fds}) == count
            assert await client.query_fdsets() == [added]
            # In the order in which they were sent.
            await client.remove_fd(0, added.fds[-1].fd)
            assert [pipe.held() for pipe in made] == [True] * (count - 1) + [False]
            if count > 1:
                await client.remove_fd(0)
            assert not any(pipe.held() for pipe in made)


async def test_the_reply(path: Path) -> None:
    """The reply's members, with and without an opaque text."""
    async with daemon(path):
        with await Wire.session(path) as wire, pipes(2) as made:
            added = value(await wire.call("add-fds", {"opaque": "o"}, made))
            assert added.keys() == {"fdset-id", "fds"}
            assert [fd.keys() for fd in added["fds"]] == [{"fd", "opaque"}] * 2
            again = value(await wire.call("add-fds", {"fdset-id": 0}, made))
            assert again["fdset-id"] == 0
            assert [fd.keys() for fd in again["fds"]] == [{"fd"}] * 2
            [fdset] = value(await wire.call("query-fdsets"))
            assert fdset["fds"] == added["fds"] + again["fds"]


async def test_the_fds_on_a_blank_before(path: Path) -> None:
    """Descriptors on a blank before the command, as qemu.qmp sends them."""
    async with daemon(path):
        with await Wire.session(path) as wire, pipes(3) as made:
            wire.send(b" ", made)
            assert len(value(await wire.call("add-fds"))["fds"]) == 3


async def test_pipelined_with_add_fd(path: Path) -> None:
    """Pipelined add-fds and add-fd get their own descriptors each."""
    async with daemon(path):
        with await Wire.session(path) as wire, pipes(6) as made:
            wire.send(request("add-fd"), made[:1])
            wire.send(request("add-fds"), made[1:4])
            wire.send(request("add-fds"))
            wire.send(request("add-fd"), made[4:5])
            wire.send(request("add-fds"), made[5:])
            for pipe in made:
                pipe.release()
            replies = await wire.replies(5)
            assert error(replies.pop(2)) == "FdNotSupplied"
            counts = [len(value(reply).get("fds", [0])) for reply in replies]
            assert counts == [1, 3, 1, 1]
            for n, cut in enumerate([1, 4, 5, 6]):
                value(await wire.call("remove-fd", {"fdset-id": n}))
                assert [pipe.held() for pipe in made] == [False] * cut + [True] * (6 - cut)


@pytest.mark.parametrize(
    "arguments, error_class",
    [
        ({"fdset-id": 7}, "InvalidParameterValue"),
        ({"fdset-id": -1}, "InvalidParameterValue"),
        ({"expires": 0}, "InvalidParameterValue"),
        ({"expires": -5}, "InvalidParameterValue"),
        ({"expires": 1.5}, "GenericError"),
        ({"expires": True}, "GenericError"),
        ({"lifetime": "for ever"}, "GenericError"),
        ({"lifetime": None}, "GenericError"),
        ({"watch-hangup": 1}, "GenericError"),
        ({"watch_hangup": True}, "GenericError"),
        ({"opaque": 1}, "GenericError"),
        ({"fd": 1}, "GenericError"),
    ],
    ids=str,
)
async def test_refused(path: Path, arguments: dict[str, Any], error_class: str) -> None:
    """A refused add-fds stores no descriptor, and the connection continues."""
    async with daemon(path):
        with await Wire.session(path) as wire, pipes(3) as made:
            assert error(await wire.call("add-fds", arguments, made)) == error_class
            for pipe in made:
                pipe.release()
            assert value(await wire.call("query-fdsets")) == []
            assert not any(pipe.held() for pipe in made)


async def test_no_descriptors(path: Path) -> None:
    async with daemon(path):
        with await Wire.session(path) as wire:
            reply = await wire.call("add-fds")
            assert reply["error"]["desc"] == "No file descriptor supplied via SCM_RIGHTS"
            assert error(reply) == "FdNotSupplied"


async def test_no_room_for_all(path: Path) -> None:
    """Without room for all descriptors, none is stored."""
    async with daemon(path, limits=qmpfd.Limits(max_fds=5)), qmpfd.connect(path) as client:
        with pipes(6) as made:
            await client.add_fds(made[:3])
            with pytest.raises(qmpfd.GenericError, match="limit is 5"):
                await client.add_fds(made[3:])
            for pipe in made:
                pipe.release()
            assert [pipe.held() for pipe in made] == [True] * 3 + [False] * 3
            [fdset] = await client.query_fdsets()
            assert len(fdset.fds) == 3


async def test_the_other_dialect_creates_the_set(path: Path) -> None:
    async with daemon(path, dialect="qemu"), qmpfd.connect(path) as client:
        with pipes(2) as made:
            assert (await client.add_fds(made, 7)).fdset_id == 7
            with pytest.raises(qmpfd.GenericError, match="non-negative"):
                await client.add_fds(made, -1)
            assert [fdset.fdset_id for fdset in await client.query_fdsets()] == [7]


# -- until the connection ends -----------------------------------------------------------------


@pytest.mark.parametrize("how", ["close", "half close", "broken"])
async def test_until_the_connection_ends(path: Path, how: str) -> None:
    """Lifetime "connection": the end of the adding connection removes the descriptors."""
    async with daemon(path), qmpfd.connect(path) as other:
        with pipes(3) as made:
            wire = await Wire.session(path)
            with wire:
                passing = {"lifetime": "connection", "opaque": "passing"}
                value(await wire.call("add-fds", passing, made[:2]))
                value(await wire.call("add-fds", {"fdset-id": 0, "opaque": "lasting"}, made[2:]))
                for pipe in made:
                    pipe.release()
                async with qmpfd.connect(path) as third:
                    assert await opaques(third) == ["passing", "passing", "lasting"]
                assert await opaques(other) == ["passing", "passing", "lasting"]
                (await other.open_fdset(0)).close()
                if how == "half close":
                    wire.shut_write()
                elif how == "broken":
                    wire.send(b'{"execute": "add-fd')
                else:
                    wire.close()
                await settle()
                if how == "broken":
                    assert made[0].held()  # an incomplete command does not end the connection
                    wire.close()
                    await settle()
                assert [pipe.held() for pipe in made] == [False, False, True]
                assert await opaques(other) == ["lasting"]


#: Program that adds its standard input with lifetime "connection", and waits to be killed.
ADDER = """
import os, socket, sys
sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
sock.connect(sys.argv[1])
sock.sendall(b'{"execute": "qmp_capabilities"}')
message = b'{"execute": "add-fds", "arguments": {"lifetime": "connection"}}'
sock.sendmsg([message], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, bytes(4))])
while b"fdset-id" not in sock.recv(1 << 16):
    pass
os.write(1, b"added\\n")
sock.recv(1)
"""


async def test_until_its_process_is_killed(path: Path) -> None:
    """SIGKILL of the client ends its connection too."""
    async with daemon(path), qmpfd.connect(path) as client, client.watch_fdsets() as events:
        with Pipe() as pipe:
            command = [sys.executable, "-c", ADDER, os.fspath(path)]
            process = await trio.lowlevel.open_process(command, stdin=pipe, stdout=PIPE)
            assert process.stdout is not None
            pipe.release()
            async with process.stdout:
                assert await process.stdout.receive_some() == b"added\n"
                assert (await anext(events)).name == "FD_ADDED"
                process.kill()
                assert (await anext(events)).data["reason"] == "connection"
            await process.wait()
            await settle()
            assert not pipe.held()


async def test_removed_before_the_connection_ends(path: Path) -> None:
    """The end of the connection does not close a later descriptor with the same number."""
    async with daemon(path), qmpfd.connect(path) as other:
        with pipes(2) as made:
            async with qmpfd.connect(path) as client:
                first = await client.add_fds([made[0]], lifetime="connection")
                await other.remove_fd(0)
                again = await other.add_fd(made[1])
                assert again.fd == first.fds[0].fd, "the number is used again"
            for pipe in made:
                pipe.release()
            await settle()
            assert [pipe.held() for pipe in made] == [False, True]


# -- for a time --------------------------------------------------------------------------------


async def test_expires(path: Path, autojump_clock: MockClock) -> None:
    """Each descriptor expires at its own time, whatever the order of additions."""
    async with daemon(path), qmpfd.connect(path) as client:
        with pipes(4) as made:
            for pipe, seconds in zip(made, [30, 10, 20, None], strict=True):
                await client.add_fds([pipe], opaque=str(seconds), expires=seconds)
                pipe.release()
            assert [fd.expires for fd in await client.query_fds()] == [None, 20, 10, 30]
            await trio.sleep(9.9)
            assert [pipe.held() for pipe in made] == [True, True, True, True]
            assert [fd.expires for fd in await client.query_fds()] == [None, 11, 1, 21]
            await trio.sleep(0.2)
            assert [pipe.held() for pipe in made] == [True, False, True, True]
            await trio.sleep(10)
            assert [pipe.held() for pipe in made] == [True, False, False, True]
            await trio.sleep(10)
            assert [pipe.held() for pipe in made] == [False, False, False, True]
            await trio.sleep(1000)
            assert await opaques(client) == ["None"]


async def test_removed_before_it_expires(path: Path, autojump_clock: MockClock) -> None:
    """The expiry of a removed descriptor affects no later one, and delays no other expiry."""
    async with daemon(path), qmpfd.connect(path) as client:
        with pipes(3) as made:
            first = await client.add_fds([made[0]], expires=10)
            await client.add_fds([made[1]], expires=20)
            await client.remove_fd(0)
            again = await client.add_fd(made[2])
            assert again.fd == first.fds[0].fd, "the number is used again"
            for pipe in made:
                pipe.release()
            await trio.sleep(15)
            assert [pipe.held() for pipe in made] == [False, True, True]
            await trio.sleep(10)
            assert [pipe.held() for pipe in made] == [False, False, True]


async def test_a_very_long_time(path: Path, mock_clock: MockClock) -> None:
    """The longest time: as a float it would exceed an int64."""
    async with daemon(path), qmpfd.connect(path) as client:
        with Pipe() as pipe:
            await client.add_fds([pipe], expires=(1 << 63) - 1)
            await settle()
            [fd] = await client.query_fds()
            assert fd.expires == (1 << 63) - 1


async def test_no_time_at_all_is_refused_with_the_name(path: Path) -> None:
    async with daemon(path), qmpfd.connect(path) as client:
        with Pipe() as pipe, pytest.raises(qmpfd.InvalidParameterValue, match="'expires'"):
            await client.add_fds([pipe], expires=0)


async def test_many_that_expire_at_once(path: Path, autojump_clock: MockClock) -> None:
    async with daemon(path), qmpfd.connect(path) as client:
        before = open_fds()
        with Pipe() as pipe:
            for _ in range(6):
                await client.add_fds([pipe] * 100, expires=5)
            async with client.watch_fdsets() as events:
                for _ in range(600):
                    assert (await anext(events)).data["reason"] == "expired"
        await settle()
        assert open_fds() == before
        assert await client.query_fdsets() == []


# -- until the other end is gone ---------------------------------------------------------------


@contextmanager
def pipe_ends() -> Iterator[dict[str, int]]:
    """Yield the ends of a pipe; a test may close one after removing it from the mapping."""
    reader, writer = os.pipe2(os.O_CLOEXEC)
    ends = {"read": reader, "write": writer}
    try:
        yield ends
    finally:
        for number in ends.values():
            os.close(number)


async def hung_up(client: qmpfd.Client) -> None:
    """Wait for the next event, which must report a hang-up."""
    event = await anext(client.events())
    assert (event.name, event.data["reason"]) == ("FD_REMOVED", "hangup")


@pytest.mark.parametrize("stored", ["read", "write"])
async def test_the_other_end_of_a_pipe(path: Path, stored: str) -> None:
    """A hang-up is the close of the last duplicate of the other end."""
    gone = "write" if stored == "read" else "read"
    async with daemon(path), qmpfd.connect(path) as client:
        with pipe_ends() as ends:
            copy = os.dup(ends[gone])
            await client.add_fds([ends[stored]], watch_hangup=True)
            await client.execute("watch-fdsets", {"enable": True})
            os.close(ends.pop(gone))
            await settle()
            assert len(await client.query_fds()) == 1
            os.close(copy)
            await hung_up(client)
            assert await client.query_fds() == []


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_SEQPACKET])
async def test_the_other_end_of_a_unix_socket(path: Path, kind: socket.SocketKind) -> None:
    async with daemon(path), qmpfd.connect(path) as client:
        here, there = socket.socketpair(socket.AF_UNIX, kind)
        with here, there:
            await client.add_fds([here], watch_hangup=True)
            await client.execute("watch-fdsets", {"enable": True})
            there.shutdown(socket.SHUT_WR)  # no hang-up: the peer can still read
            await settle()
            assert len(await client.query_fds()) == 1
            there.close()
            await hung_up(client)
            assert await client.query_fds() == []


async def test_the_other_end_of_a_tcp_socket(path: Path) -> None:
    """A FIN of the peer is no hang-up, since the peer may still read; a reset is one."""
    async with daemon(path), qmpfd.connect(path) as client:
        with (
            socket.create_server(("127.0.0.1", 0)) as listener,
            socket.create_connection(listener.getsockname()) as there,
        ):
            here, _ = listener.accept()
            with here:
                await client.add_fds([here, listener], watch_hangup=True)
            await client.execute("watch-fdsets", {"enable": True})
            there.shutdown(socket.SHUT_WR)
            await settle()
            assert len(await client.query_fds()) == 2
            there.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            there.close()
            await hung_up(client)
            assert len(await client.query_fds()) == 1  # a listening socket has no peer


async def test_the_peer_closed_before_the_addition(path: Path) -> None:
    """A descriptor whose peer has closed before is added, and removed at once."""
    async with daemon(path), qmpfd.connect(path) as client:
        with pipe_ends() as ends:
            os.close(ends.pop("write"))
            async with client.watch_fdsets() as events:
                await client.add_fds([ends["read"]], watch_hangup=True)
                assert (await anext(events)).name == "FD_ADDED"
                assert (await anext(events)).data["reason"] == "hangup"


@pytest.mark.parametrize("made_by", ["pipe", "socket"])
async def test_unread_data_is_not_lost(path: Path, made_by: str, autojump_clock: MockClock) -> None:
    """With unread data, a descriptor that has hung up stays; it goes a second after the read."""
    with ExitStack() as stack:
        if made_by == "pipe":
            reader, writer = os.pipe2(os.O_CLOEXEC)
        else:
            reader, writer = (sock.detach() for sock in socket.socketpair())
        stack.callback(os.close, reader)
        os.write(writer, b"the last words")
        async with daemon(path), qmpfd.connect(path) as client:
            await client.add_fds([reader], watch_hangup=True)
            os.close(writer)
            await trio.sleep(60)
            with await client.open_fdset(0) as fd:
                assert os.read(fd.fileno(), 8) == b"the last"
                await trio.sleep(60)
                assert len(await client.query_fds()) == 1
                assert os.read(fd.fileno(), 100) == b" words"
            await trio.sleep(2)
            assert await client.query_fds() == []


async def test_a_fifo_that_is_opened_again(
    path: Path, tmp_path: Path, autojump_clock: MockClock
) -> None:
    """A FIFO with unread data that is opened for writing again before the read stays."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with ExitStack() as stack:
        reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        stack.callback(os.close, reader)
        async with daemon(path) as server, qmpfd.connect(path) as client:
            writer = os.open(fifo, os.O_WRONLY | os.O_CLOEXEC)
            await client.add_fds([reader], watch_hangup=True)
            os.write(writer, b"last words")
            os.close(writer)
            await trio.sleep(10)
            writer = os.open(fifo, os.O_WRONLY | os.O_CLOEXEC)
            assert os.read(reader, 100) == b"last words"
            await trio.sleep(10)
            assert len(await client.query_fds()) == 1
            assert not server.daemon.hangups.draining  # epoll watches it again, without polling
            os.close(writer)
            await trio.sleep(10)
            assert await client.query_fds() == []


async def test_an_error_is_no_hangup(path: Path, autojump_clock: MockClock) -> None:
    """A pending error of a UDP socket, which stays usable, is no hang-up."""
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as nobody,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock,
    ):
        nobody.bind(("127.0.0.1", 0))
        sock.connect(nobody.getsockname())
        nobody.close()
        async with daemon(path), qmpfd.connect(path) as client:
            await client.add_fds([sock], watch_hangup=True)
            sock.send(b"x")  # refused: ICMP arrives at once on the loopback interface
            poll = select.poll()
            poll.register(sock, 0)
            assert [events for _, events in poll.poll(0)] == [select.POLLERR]
            await trio.sleep(10)
            assert len(await client.query_fds()) == 1
            with pytest.raises(ConnectionRefusedError):
                sock.send(b"x")


@pytest.mark.parametrize(
    "kind",
    ["file, read and write", "directory", "/dev/null", "memfd", "eventfd", "epoll", "O_PATH"],
)
async def test_kinds_that_cannot_hang_up(kind: str, path: Path, tmp_path: Path) -> None:
    """add-fds refuses all descriptors if one of them cannot hang up."""
    with open_kind(kind, tmp_path) as number, pipes(2) as made:
        async with daemon(path), qmpfd.connect(path) as client:
            with pytest.raises(qmpfd.InvalidParameterValue, match=HANGUP):
                await client.add_fds([made[0], number, made[1]], watch_hangup=True)
            for pipe in made:
                pipe.release()
            assert not any(pipe.held() for pipe in made)
            assert await client.query_fds() == []
            # The refused command has left no watch behind.
            with pipe_ends() as ends:
                await client.add_fds([ends["read"]] * 3, watch_hangup=True)
                await client.execute("watch-fdsets", {"enable": True})
                os.close(ends.pop("write"))
                for _ in range(3):
                    await hung_up(client)


def _stream(family: int, address: Any) -> socket.socket:
    sock = socket.socket(family)
    if address is not None:
        sock.bind(address)
    return sock


@pytest.mark.parametrize(
    "family, address",
    [
        (socket.AF_INET, None),
        (socket.AF_INET6, ("::1", 0)),
        (socket.AF_UNIX, None),
        (socket.AF_UNIX, b""),
    ],
)
async def test_never_connected(family: int, address: Any, path: Path) -> None:
    """An unconnected socket is refused: the kernel reports POLLHUP for it at once."""
    with _stream(family, address) as sock, pipes(1) as made:
        async with daemon(path), qmpfd.connect(path) as client:
            with pytest.raises(qmpfd.InvalidParameterValue, match="connected sockets only"):
                await client.add_fds([*made, sock], watch_hangup=True)
            assert await client.query_fds() == []


async def test_a_listening_socket_stays(path: Path) -> None:
    with _stream(socket.AF_INET, ("127.0.0.1", 0)) as sock:
        sock.listen()
        async with daemon(path) as server, qmpfd.connect(path) as client:
            await client.add_fds([sock], watch_hangup=True)
            server.daemon.hangups.poll()
            assert not server.daemon.hangups.due


@pytest.mark.parametrize("unread", [b"", b"x"])
async def test_reset_before_it_was_added(unread: bytes, path: Path) -> None:
    """A socket that has been reset is accepted if it has unread data."""
    with _stream(socket.AF_INET, ("127.0.0.1", 0)) as listener:
        listener.listen()
        with socket.create_connection(listener.getsockname()) as sock:
            peer, _ = listener.accept()
            peer.sendall(unread)
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            peer.close()
            async with daemon(path), qmpfd.connect(path) as client:
                if unread:
                    await client.add_fds([sock], watch_hangup=True)
                    assert len(await client.query_fds()) == 1
                else:
                    with pytest.raises(qmpfd.InvalidParameterValue, match="connected sockets"):
                        await client.add_fds([sock], watch_hangup=True)


async def test_a_terminal_has_no_other_end(path: Path) -> None:
    with ExitStack() as stack:
        for number in (ends := pty.openpty()):
            stack.callback(os.close, number)
        async with daemon(path), qmpfd.connect(path) as client:
            with pytest.raises(qmpfd.InvalidParameterValue, match=HANGUP):
                await client.add_fds(ends, watch_hangup=True)


async def test_removed_while_watched(path: Path) -> None:
    """A hang-up after the removal does not affect a later descriptor with the same number."""
    async with daemon(path), qmpfd.connect(path) as client:
        with pipe_ends() as ends, pipes(1) as made:
            first = await client.add_fds([ends["read"]], watch_hangup=True)
            await client.remove_fd(0)
            again = await client.add_fds(made, watch_hangup=True)
            assert again.fds[0].fd == first.fds[0].fd, "the number is used again"
            os.close(ends.pop("write"))
            await settle()
            assert len(await client.query_fds()) == 1


async def test_removed_with_unread_data(path: Path, autojump_clock: MockClock) -> None:
    """Removed after the hang-up with unread data: a later one with the same number stays."""
    async with daemon(path), qmpfd.connect(path) as client:
        with pipe_ends() as ends, pipe_ends() as others:
            os.write(ends["write"], b"x")
            first = await client.add_fds([ends["read"]], watch_hangup=True)
            os.dup2(others["write"], ends["write"])  # closes the end, and reuses its number
            await trio.sleep(5)
            await client.remove_fd(0)
            again = await client.add_fds([others["read"]], watch_hangup=True)
            assert again.fds[0].fd == first.fds[0].fd, "the number is used again"
            await trio.sleep(5)
            assert len(await client.query_fds()) == 1
            os.close(others.pop("write"))
            os.close(ends.pop("write"))
            await trio.sleep(5)
            assert await client.query_fds() == []


async def test_only_watched_descriptors_are_removed(path: Path) -> None:
    """The same descriptor, added without watch-hangup, stays."""
    async with daemon(path), qmpfd.connect(path) as client:
        with pipe_ends() as ends:
            await client.add_fds([ends["read"]], opaque="watched", watch_hangup=True)
            await client.add_fds([ends["read"]], opaque="not watched")
            await client.execute("watch-fdsets", {"enable": True})
            os.close(ends.pop("write"))
            await hung_up(client)
            await settle()
            assert await opaques(client) == ["not watched"]


async def test_many_hang_up_at_once(path: Path) -> None:
    async with daemon(path), qmpfd.connect(path) as client:
        before = open_fds()
        with pipe_ends() as ends, pipe_ends() as others:
            for end in (ends["read"], others["read"]):
                await client.add_fds([end] * 240, watch_hangup=True)
            await client.execute("watch-fdsets", {"enable": True})
            os.close(ends.pop("write"))
            os.close(others.pop("write"))
            for _ in range(2 * 240):
                await hung_up(client)
        await settle()
        assert open_fds() == before


async def test_expiry_hangup_and_connection_end_together(
    path: Path, autojump_clock: MockClock
) -> None:
    """Expiry, hang-up and end of the connection: the first removes, the others have no effect."""
    async with daemon(path), qmpfd.connect(path) as other, other.watch_fdsets() as events:
        for first in ("connection", "expired", "hangup"):
            with pipe_ends() as ends:
                async with qmpfd.connect(path) as client:
                    await client.add_fds(
                        [ends["read"]], lifetime="connection", expires=10, watch_hangup=True
                    )
                    if first == "hangup":
                        os.close(ends.pop("write"))
                        await trio.sleep(1)
                    elif first == "expired":
                        await trio.sleep(20)
                assert (await anext(events)).name == "FD_ADDED"
                assert (await anext(events)).data["reason"] == first
        await trio.sleep(100)
        assert await other.query_fds() == []


def _cpu_ticks(pid: int) -> int:
    """Return the CPU time of a process in hundredths of a second (proc(5))."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


async def test_an_idle_daemon_does_not_spin(path: Path) -> None:
    """No busy loop, also with a hang-up that epoll reports repeatedly because of unread data."""
    with daemon_process(path) as process:
        async with qmpfd.connect(path) as client:
            with pipe_ends() as ends:
                os.write(ends["write"], b"x")
                await client.add_fds([ends["read"]], watch_hangup=True)
                os.close(ends.pop("write"))

                await client.query_fds()
                before = _cpu_ticks(process.pid)
                with trio.move_on_after(0.5):  # a busy loop would use 50 ticks
                    await anext(client.events())
                assert _cpu_ticks(process.pid) - before < 10
                assert len(await client.query_fds()) == 1


async def test_status_flags_are_left_alone(path: Path) -> None:
    """The daemon changes no status flags, which it shares with the sender."""
    async with daemon(path), qmpfd.connect(path) as client:
        with pipe_ends() as ends:
            before = fcntl.fcntl(ends["read"], fcntl.F_GETFL)
            await client.add_fds([ends["read"]], watch_hangup=True)
            await client.query_fds()
            assert fcntl.fcntl(ends["read"], fcntl.F_GETFL) == before
