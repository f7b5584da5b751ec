"""``open-fdset``: which descriptor is sent, of which file, and with which reply.

Tests of commands/extensions.py.
"""

from __future__ import annotations

import array
import fcntl
import json
import os
import resource
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from helpers import Wire, daemon, daemon_process, error, open_fds, request, settle, value
from kinds import KINDS, open_kind

import qmpfd
from qmpfd.kernel.fd import Fd

MODES = {"rdonly": os.O_RDONLY, "wronly": os.O_WRONLY, "rdwr": os.O_RDWR}
COUNT = 1000


@contextmanager
def opened(path: Path, *modes: str) -> Iterator[list[int]]:
    """Open the file at *path* once in each of *modes*."""
    with ExitStack() as stack:
        fds = []
        for mode in modes:
            fds.append(os.open(path, MODES[mode] | os.O_CREAT | os.O_CLOEXEC, 0o600))
            stack.callback(os.close, fds[-1])
        yield fds


@contextmanager
def memfds(count: int) -> Iterator[list[int]]:
    """Make *count* files with the contents "0", "1", and so on."""
    with ExitStack() as stack:
        fds = []
        for number in range(count):
            fds.append(os.memfd_create(str(number), os.MFD_CLOEXEC))
            stack.callback(os.close, fds[-1])
            os.write(fds[-1], str(number).encode())
        yield fds


@pytest.fixture
def many_descriptors() -> Iterator[None]:
    """Raise this process's limit on open descriptors while the block runs."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 8192 if hard == resource.RLIM_INFINITY else min(8192, hard)
    if wanted < 2 * COUNT:
        pytest.skip("there may not be so many descriptors here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def reply_with_fds(wire: Wire) -> tuple[dict[str, Any], list[Fd]]:
    """Return the next line and its descriptors: MSG_PEEK finds the line's end, and recvmsg(2) reads
    no further.
    """
    line, fds = bytearray(), array.array("i")
    while not line.endswith(b"\n"):
        try:
            seen = wire.sock.recv(1 << 16, socket.MSG_PEEK)
            assert seen, "closed, where a reply was due"
            end = seen.find(b"\n") + 1 or len(seen)
            room = socket.CMSG_SPACE(253 * fds.itemsize)
            data, control, flags, _ = wire.sock.recvmsg(end, room, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            await trio.lowlevel.wait_readable(wire.sock)
            continue
        assert not flags & socket.MSG_CTRUNC
        for _, _, payload in control:
            assert not line, "it came with the first byte of a reply"
            fds.frombytes(payload)
        line += data
    return json.loads(line), [Fd(number) for number in fds]


def content(fd: Fd) -> bytes:
    """Return the content of the file, whatever the file position."""
    return os.pread(fd.fileno(), 10, 0)


def identity(fd: int) -> tuple[int, int]:
    """Return device and inode of the file."""
    found = os.fstat(fd)
    return found.st_dev, found.st_ino


# -- which descriptor --------------------------------------------------------------------------


async def test_equal_access_mode(path: Path, tmp_path: Path) -> None:
    """The access mode must be equal, QEMU's rule for /dev/fdset/N: rdwr does not match rdonly."""
    async with daemon(path), qmpfd.connect(path) as client:
        with opened(tmp_path / "file", "rdonly", "wronly", "rdwr") as fds:
            infos = [await client.add_fd(fd, None if n == 0 else 0) for n, fd in enumerate(fds)]
            for mode, info in zip(MODES, infos, strict=True):
                reply = await client.execute("open-fdset", {"fdset-id": 0, "access": mode})
                assert reply == {"fdset-id": 0, "fd": info.fd}
                with await client.open_fdset(0, access=mode) as fd:  # type: ignore[arg-type]
                    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
                    assert flags & os.O_ACCMODE == MODES[mode]


async def test_newest_first(path: Path, tmp_path: Path) -> None:
    """The newest of all, or of those with the access mode; after its removal, the next one."""
    async with daemon(path), qmpfd.connect(path) as client:
        with opened(tmp_path / "file", "rdonly", "rdwr", "rdonly", "rdwr", "wronly") as fds:
            infos = [await client.add_fd(fd, 0 if n else None, str(n)) for n, fd in enumerate(fds)]

            async def newest(**arguments: str) -> str:
                reply = await client.execute("open-fdset", {"fdset-id": 0, **arguments})
                return str(reply["opaque"])

            assert await newest() == "4"
            assert await newest(access="rdonly") == "2"
            assert await newest(access="rdwr") == "3"
            await client.remove_fd(0, infos[3].fd)
            await client.remove_fd(0, infos[4].fd)
            assert await newest() == "2"
            assert await newest(access="rdwr") == "1"


async def test_by_number(path: Path) -> None:
    async with daemon(path), qmpfd.connect(path) as client:
        with memfds(3) as fds:
            added = await client.add_fds(fds)
            for number in (1, 0, 2):
                with await client.open_fdset(0, fd=added.fds[number].fd) as fd:
                    assert content(fd) == str(number).encode()
            with await client.open_fdset(0, "rdwr", added.fds[0].fd) as fd:
                assert content(fd) == b"0"


async def test_the_opaque_text_comes_along(path: Path) -> None:
    async with daemon(path), qmpfd.connect(path) as client:
        with memfds(1) as fds:
            info = await client.add_fd(fds[0], opaque='{"a": "\u20ac"}')
            reply = await client.execute("open-fdset", {"fdset-id": 0})
            assert reply == {"fdset-id": 0, "fd": info.fd, "opaque": '{"a": "\u20ac"}'}


async def test_errors(path: Path, tmp_path: Path) -> None:
    """Each error names the alternatives, and carries no descriptor."""
    with opened(tmp_path / "file", "rdwr", "rdonly", "rdwr") as fds:
        place = os.open(tmp_path, os.O_PATH | os.O_CLOEXEC)
        try:
            async with daemon(path), qmpfd.connect(path) as client:
                info = await client.add_fds(fds)
                await client.add_fd(place)
                number = info.fds[0].fd
                here = "File descriptor named 'fdset-id:"
                none = "No file descriptor with access mode"
                cases: list[tuple[dict[str, Any], str]] = [
                    ({"fdset-id": 7}, f"{here}7' not found"),
                    ({"fdset-id": -1}, f"{here}-1' not found"),
                    ({"fdset-id": 7, "access": "rdwr"}, f"{here}7' not found"),
                    ({"fdset-id": 0, "fd": 9999}, f"{here}0, fd:9999' not found"),
                    ({"fdset-id": 1, "fd": number}, f"{here}1, fd:{number}' not found"),
                    (
                        {"fdset-id": 0, "access": "wronly"},
                        f"{none} 'wronly' in 'fdset-id:0', only 'rdonly', 'rdwr'",
                    ),
                    (
                        {"fdset-id": 0, "fd": number, "access": "rdonly"},
                        f"{none} 'rdonly' in 'fdset-id:0, fd:{number}', only 'rdwr'",
                    ),
                    # O_PATH is no access mode, though its O_ACCMODE bits are those of O_RDONLY.
                    (
                        {"fdset-id": 1, "access": "rdonly"},
                        f"{none} 'rdonly' in 'fdset-id:1', only 'path'",
                    ),
                ]
                with await Wire.session(path) as wire:
                    for arguments, desc in cases:
                        wire.send(request("open-fdset", arguments))
                        reply, passed = await reply_with_fds(wire)
                        assert reply == {"error": {"class": "FdNotFound", "desc": desc}}
                        assert not passed
        finally:
            os.close(place)


async def test_arguments(path: Path) -> None:
    async with daemon(path):
        with await Wire.session(path) as wire:
            for arguments, desc in [
                (None, "Parameter 'fdset-id' is missing"),
                ({"access": "rdwr"}, "Parameter 'fdset-id' is missing"),
                ({"fdset-id": "0"}, "Invalid parameter type for 'fdset-id', expected: integer"),
                ({"fdset-id": 0, "access": "path"}, "'access' does not accept value 'path'"),
                ({"fdset-id": 0, "access": 2}, "'access', expected: string"),
                ({"fdset-id": 0, "mode": "r"}, "Parameter 'mode' is unexpected"),
            ]:
                reply = await wire.call("open-fdset", arguments)
                assert error(reply) == "GenericError"
                assert desc in reply["error"]["desc"]


async def test_the_other_dialect(path: Path) -> None:
    """In the qemu dialect the class is QEMU's; the text is the same."""
    async with daemon(path, dialect="qemu"), qmpfd.connect(path) as client:
        with pytest.raises(qmpfd.GenericError, match="'fdset-id:7' not found"):
            await client.open_fdset(7)
        with memfds(1) as fds:
            await client.add_fd(fds[0], 7)
            with await client.open_fdset(7) as fd:
                assert content(fd) == b"0"


# -- the same open file description ------------------------------------------------------------


async def test_the_same_open_file_description(path: Path, tmp_path: Path) -> None:
    """File position and status flags are shared; close-on-exec is set."""
    async with daemon(path), qmpfd.connect(path) as client:
        with opened(tmp_path / "file", "rdwr") as (mine,):
            os.write(mine, b"0123456789")
            await client.add_fd(mine)
            with await client.open_fdset(0) as fd, await client.open_fdset(0) as other:
                assert len({mine, fd.fileno(), other.fileno()}) == 3
                os.lseek(mine, 4, os.SEEK_SET)
                assert os.read(fd.fileno(), 2) == b"45"
                assert os.read(other.fileno(), 2) == b"67"
                assert os.lseek(mine, 0, os.SEEK_CUR) == 8
                fcntl.fcntl(fd, fcntl.F_SETFL, os.O_APPEND)
                assert fcntl.fcntl(mine, fcntl.F_GETFL) & os.O_APPEND
                for each in (fd, other):
                    assert fcntl.fcntl(each, fcntl.F_GETFD) == fcntl.FD_CLOEXEC


async def test_it_outlives_all_the_others(path: Path) -> None:
    """A duplicate works after its removal, and after the ends of its opener and the daemon."""
    async with daemon(path), qmpfd.connect(path) as client:
        with memfds(1) as fds:
            await client.add_fd(fds[0])
        fd = await client.open_fdset(0)
        await client.remove_fd(0)
    with fd:
        assert content(fd) == b"0"


@pytest.mark.parametrize("kind", KINDS)
async def test_every_kind(kind: str, path: Path, tmp_path: Path) -> None:
    """Listing, opening and removing leave the open file description unchanged."""
    with open_kind(kind, tmp_path) as mine:
        flags = fcntl.fcntl(mine, fcntl.F_GETFL)
        async with daemon(path), qmpfd.connect(path) as client:
            await client.add_fd(mine)
            [described] = await client.query_fds()
            assert described.target == os.readlink(f"/proc/self/fd/{mine}")
            with await client.open_fdset(0) as fd:
                assert identity(fd.fileno()) == identity(mine)
                assert fcntl.fcntl(fd, fcntl.F_GETFL) == flags
            await client.remove_fd(0)
        assert fcntl.fcntl(mine, fcntl.F_GETFL) == flags


async def test_an_unlinked_file_is_usable(path: Path, tmp_path: Path) -> None:
    async with daemon(path), qmpfd.connect(path) as client:
        with opened(tmp_path / "file", "rdwr") as (mine,):
            (tmp_path / "file").unlink()
            await client.add_fd(mine)
        with await client.open_fdset(0, "rdwr") as fd:
            assert os.write(fd.fileno(), b"content") == 7
        with await client.open_fdset(0, "rdwr") as fd:
            assert content(fd) == b"content"


async def test_a_listening_socket_is_usable(path: Path) -> None:
    async with daemon(path), qmpfd.connect(path) as client:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            address = listener.getsockname()
            await client.add_fd(listener)
        # Only the daemon has the socket now: connections are not refused, and wait.
        with socket.create_connection(address) as visitor:
            visitor.sendall(b"hello")
            fd = await client.open_fdset(0)
            with socket.socket(fileno=fd.detach()) as again:
                connection, _ = again.accept()
                with connection:
                    assert connection.recv(5) == b"hello"


async def test_a_pipe_is_usable(path: Path) -> None:
    """Both ends of a pipe, selected by their access modes."""
    async with daemon(path), qmpfd.connect(path) as client:
        reader, writer = os.pipe2(os.O_CLOEXEC)
        await client.add_fds([reader, writer])
        os.close(reader)
        os.close(writer)
        with (
            await client.open_fdset(0, "wronly") as write_end,
            await client.open_fdset(0, "rdonly") as read_end,
        ):
            os.write(write_end.fileno(), b"through")
            await client.remove_fd(0)
            assert os.read(read_end.fileno(), 100) == b"through"
            write_end.close()
            assert os.read(read_end.fileno(), 100) == b""


async def test_a_device_is_usable(path: Path) -> None:
    async with daemon(path), qmpfd.connect(path) as client:
        with open("/dev/zero", "rb") as device:
            await client.add_fd(device)
        with await client.open_fdset(0, "rdonly") as fd:
            assert os.read(fd.fileno(), 4) == b"\0\0\0\0"


# -- with which reply --------------------------------------------------------------------------


async def test_pipelined(path: Path) -> None:
    """Each of many pipelined replies, read late, carries its own descriptor."""
    async with daemon(path):
        with await Wire.session(path) as wire, memfds(20) as fds:
            wire.send(request("add-fds"), fds)
            numbers = [fd["fd"] for fd in value(await wire.reply())["fds"]]
            assert value(await wire.call("watch-fdsets", {"enable": True})) == {}
            expected: list[int | None] = []
            for n in range(200):
                which = n * 7 % 20
                members = {"fdset-id": 0, "fd": numbers[which]}
                if n % 10 == 3:
                    wire.send(request("query-name", id=n))
                elif n % 10 == 7:
                    wire.send(request("open-fdset", {"fdset-id": 99}, id=n))
                else:
                    wire.send(request("open-fdset", members, id=n))
                expected.append(which if n % 10 not in (3, 7) else None)
                if n % 50 == 0:
                    wire.send(request("add-fd", id="add"), [fds[0]])
            seen = events = 0
            while seen < len(expected):
                reply, passed = await reply_with_fds(wire)
                if "event" in reply or reply.get("id") == "add":
                    events += "event" in reply
                    assert not passed
                    continue
                assert reply["id"] == seen
                wanted = expected[seen]
                seen += 1
                if wanted is None:
                    assert not passed
                else:
                    [fd] = passed
                    with fd:
                        assert content(fd) == str(wanted).encode()
            while events < 4:
                reply, passed = await reply_with_fds(wire)
                assert reply["event"] == "FD_ADDED"
                assert not passed
                events += 1


async def test_the_socket_is_full_in_the_middle_of_a_reply(path: Path) -> None:
    """A reply longer than the socket buffers: its descriptor goes with the first part, and only
    once.
    """
    long = "x" * 100_000
    async with daemon(path):
        before = open_fds()
        with await Wire.session(path) as wire, memfds(30) as fds:
            for fd in fds:
                await wire.send_all(b"\n" * 10)
                wire.send(b" ", [fd])
                await wire.send_all(request("add-fd", {"opaque": long}))
                value(await wire.reply())
            for n in range(30):
                wire.send(request("open-fdset", {"fdset-id": n}))
            await settle()  # the daemon waits now, with megabytes unsent
            for n in range(30):
                reply, passed = await reply_with_fds(wire)
                assert value(reply)["fdset-id"] == n
                [fd_] = passed
                with fd_:
                    assert content(fd_) == str(n).encode()
                await settle()
            for n in range(30):
                await wire.call("remove-fd", {"fdset-id": n})
        await settle()
        assert open_fds() == before


async def test_our_client_with_a_full_socket(path: Path) -> None:
    found: dict[int, bytes] = {}

    async def one(number: int) -> None:
        with await client.open_fdset(number) as fd:
            found[number] = content(fd)

    async with daemon(path), qmpfd.connect(path) as client:
        with memfds(20) as fds:
            for fd in fds:
                await client.add_fd(fd, opaque="x" * 100_000)
        async with trio.open_nursery() as nursery:
            for number in range(20):
                nursery.start_soon(one, number)
    assert found == {number: str(number).encode() for number in range(20)}


async def test_a_client_disconnects_with_unread_replies(path: Path) -> None:
    """Unread and unsent descriptors of a client that has disconnected are closed."""
    async with daemon(path):
        before = open_fds()
        with memfds(1) as fds, await Wire.session(path) as other:
            wire = await Wire.session(path)
            wire.send(b" ", fds)
            await wire.send_all(request("add-fd", {"opaque": "x" * 100_000}))
            value(await wire.reply())
            for _ in range(100):
                wire.send(request("open-fdset", {"fdset-id": 0}))
            await settle()
            wire.close()
            await settle()
            assert value(await other.call("remove-fd", {"fdset-id": 0})) == {}
        await settle()
        assert open_fds() == before


# -- many --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("many_descriptors")
@pytest.mark.parametrize("connections", [1, 100])
async def test_a_thousand_at_once(path: Path, connections: int) -> None:
    """1000 duplicates at the same time all work, and the daemon leaks none."""
    got: list[Fd] = []

    async def one(client: qmpfd.Client) -> None:
        got.append(await client.open_fdset(0, "rdwr"))

    async def many(share: int) -> None:
        async with qmpfd.connect(path) as client, trio.open_nursery() as nursery:
            for _ in range(share):
                nursery.start_soon(one, client)

    with daemon_process(path) as process:
        async with qmpfd.connect(path) as client:
            with memfds(1) as fds:
                await client.add_fd(fds[0])
            had = len(open_fds(process.pid))
            try:
                async with trio.open_nursery() as nursery:
                    for _ in range(connections):
                        nursery.start_soon(many, COUNT // connections)
                assert len({fd.fileno() for fd in got}) == COUNT
                assert all(content(fd) == b"0" for fd in got)
            finally:
                for fd in got:
                    fd.close()
            # The daemon may not have read the ends of earlier connections yet.
            connections = 2
            while connections > 1:
                connections = (await client.execute("query-stats"))["connections"]
            assert len(open_fds(process.pid)) == had
            await client.remove_fd(0)
            assert len(open_fds(process.pid)) == had - 1


async def test_no_room_for_a_duplicate(path: Path) -> None:
    """With a full descriptor table, open-fdset fails; with room again, it works."""
    with daemon_process(path) as process:
        async with qmpfd.connect(path) as client:
            with memfds(1) as fds:
                await client.add_fd(fds[0])
            limits = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
            full = (max(open_fds(process.pid)) + 1, limits[1])
            # Numbers below the highest may be free: use all of them.
            free = [n for n in range(full[0]) if n not in open_fds(process.pid)]
            with memfds(len(free)) as fillers:
                for filler in fillers:
                    await client.add_fd(filler, 0)
            resource.prlimit(process.pid, resource.RLIMIT_NOFILE, full)
            with pytest.raises(qmpfd.GenericError, match="cannot be handed out: Too many open"):
                await client.open_fdset(0)
            resource.prlimit(process.pid, resource.RLIMIT_NOFILE, limits)
            (await client.open_fdset(0)).close()
