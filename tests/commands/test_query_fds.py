"""``query-fds``: kind, flags, owner, age and lifetime of each descriptor.

Tests of commands/extensions.py, kernel/fdinfo.py and kernel/sockets.py.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from helpers import PATIENCE, ROOT, Pipe, Wire, daemon, daemon_process, error, pipes, value
from kinds import KINDS, open_kind
from trio.testing import MockClock

import qmpfd
from qmpfd.kernel.fd import Fd

#: Expected kind and access mode of each descriptor of ``kinds.py``.
EXPECTED = {
    "file, read": ("file", "rdonly"),
    "file, write": ("file", "wronly"),
    "file, read and write": ("file", "rdwr"),
    "file, append": ("file", "wronly"),
    "file, synchronous": ("file", "rdwr"),
    "file, not blocking": ("file", "rdwr"),
    "file, deleted": ("file", "rdwr"),
    "O_PATH": ("file", "path"),
    "O_PATH of a directory": ("dir", "path"),
    "directory": ("dir", "rdonly"),
    "pipe, reading end": ("pipe", "rdonly"),
    "pipe, writing end": ("pipe", "wronly"),
    "FIFO": ("pipe", "rdwr"),
    "TCP socket": ("socket", "rdwr"),
    "TCP socket, listening": ("socket", "rdwr"),
    "UDP socket": ("socket", "rdwr"),
    "Unix socket": ("socket", "rdwr"),
    "Unix socket, connected": ("socket", "rdwr"),
    "netlink socket": ("socket", "rdwr"),
    "eventfd": ("eventfd", "rdwr"),
    "epoll": ("epoll", "rdwr"),
    "pidfd": ("pidfd", "rdwr"),
    "memfd": ("memfd", "rdwr"),
    "memfd, sealed": ("memfd", "rdwr"),
    "/dev/null": ("chr", "rdwr"),
    "/dev/zero, read": ("chr", "rdonly"),
    "terminal": ("chr", "rdwr"),
    "/proc file": ("file", "rdonly"),
    "namespace": ("net", "rdonly"),
}


@pytest.mark.parametrize("kind", KINDS)
async def test_kind_and_access(kind: str, path: Path, tmp_path: Path) -> None:
    with open_kind(kind, tmp_path) as number:
        async with daemon(path), qmpfd.connect(path) as client:
            await client.add_fd(number)
            [found] = await client.query_fds()
            assert (found.kind, found.access) == EXPECTED[kind]


#: Expected access mode and flags for any flags of open(2).
FLAGS = {
    os.O_RDWR | os.O_WRONLY: ("path", []),  # mode 3: only for ioctl(2)
    os.O_RDWR | os.O_WRONLY | os.O_NONBLOCK: ("path", ["nonblock"]),
    os.O_RDWR | os.O_APPEND: ("rdwr", ["append"]),
    os.O_RDONLY | os.O_NONBLOCK | os.O_NOATIME: ("rdonly", ["noatime", "nonblock"]),
    os.O_WRONLY | os.O_SYNC: ("wronly", ["sync"]),
    os.O_WRONLY | os.O_DSYNC: ("wronly", ["dsync"]),
    os.O_RDONLY | os.O_NOFOLLOW: ("rdonly", ["nofollow"]),
    os.O_PATH: ("path", ["path"]),
}


@pytest.mark.root
@pytest.mark.parametrize("flags", FLAGS)
async def test_any_flags(path: Path, tmp_path: Path, flags: int) -> None:
    """A descriptor with any flags can be listed, opened and removed."""
    (tmp_path / "file").write_bytes(b"12345")
    number = os.open(tmp_path / "file", flags | os.O_CLOEXEC)
    try:
        async with daemon(path):
            with await Wire.session(path) as wire, pipes(1) as made:
                value(await wire.call("add-fd", {"opaque": "odd"}, [number]))
                for _ in range(2):
                    [found] = value(await wire.call("query-fds", {"opaque": "odd"}))
                    assert (found["access"], found["flags"]) == FLAGS[flags]
                    value(await wire.call("open-fdset", {"fdset-id": 0}))
                    for mode in {"rdonly", "wronly", "rdwr"} - {found["access"]}:
                        output = await wire.call("open-fdset", {"fdset-id": 0, "access": mode})
                        assert f"only '{found['access']}'" in output["error"]["desc"]
                    for _ in range(2):
                        value(await wire.call("add-fds", None, made * 200))
                    assert len(value(await wire.call("query-fds"))) > 400
                value(await wire.call("remove-fd", {"fdset-id": 0}))
    finally:
        os.close(number)


def listening(family: int, address: Any) -> socket.socket:
    sock = socket.socket(family)
    sock.bind(address)
    sock.listen()
    return sock


async def test_sizes_and_addresses(path: Path, tmp_path: Path) -> None:
    async with daemon(path), qmpfd.connect(path) as client:
        with ExitStack() as stack:
            (tmp_path / "file").write_bytes(b"12345")
            file = stack.enter_context((tmp_path / "file").open("rb"))
            memory = stack.enter_context(open(os.memfd_create("m"), "wb"))
            memory.write(b"x" * 5000)
            memory.flush()
            v4 = stack.enter_context(listening(socket.AF_INET, ("127.0.0.1", 0)))
            v6 = stack.enter_context(listening(socket.AF_INET6, ("::1", 0)))
            unix = stack.enter_context(listening(socket.AF_UNIX, str(tmp_path / "s")))
            abstract = stack.enter_context(listening(socket.AF_UNIX, f"\0qmpfd-{os.getpid()}"))
            udp = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            netlink = stack.enter_context(socket.socket(socket.AF_NETLINK, socket.SOCK_RAW))
            visitor = stack.enter_context(socket.create_connection(v4.getsockname()))
            pair = socket.socketpair()
            for sock in pair:
                stack.enter_context(sock)
            port, port6 = v4.getsockname()[1], v6.getsockname()[1]
            own = f"127.0.0.1:{visitor.getsockname()[1]}"
            expected: list[tuple[Any, tuple[int | None, str | None, str | None, bool | None]]] = [
                (file, (5, None, None, None)),
                (memory, (5000, None, None, None)),
                (v4, (None, f"127.0.0.1:{port}", None, True)),
                (v6, (None, f"[::1]:{port6}", None, True)),
                (unix, (None, f"unix:{tmp_path}/s", None, True)),
                (abstract, (None, f"unix:@qmpfd-{os.getpid()}", None, True)),
                (udp, (None, "0.0.0.0:0", None, False)),
                (netlink, (None, "netlink:0:0", "netlink:0:0", False)),
                (visitor, (None, own, f"127.0.0.1:{port}", False)),
                (pair[0], (None, None, None, False)),
            ]
            for each, members in expected:
                info = await client.add_fd(each)
                [found] = await client.query_fds(fd=info.fd)
                assert (found.size, found.address, found.peer, found.listening) == members


@pytest.mark.root
@pytest.mark.parametrize(
    "family, kind, bind_to, written",
    [
        (socket.AF_NETLINK, socket.SOCK_RAW, (0, 5), "netlink:{}:{}"),
        (socket.AF_PACKET, socket.SOCK_RAW, ("lo", 3), "packet:{}:{}"),
        (socket.AF_VSOCK, socket.SOCK_STREAM, (socket.VMADDR_CID_ANY, 4711), "vsock:{}:{}"),
        (socket.AF_INET6, socket.SOCK_DGRAM, ("::ffff:127.0.0.1", 0), "[{}]:{}"),
    ],
)
async def test_families(family: int, kind: int, bind_to: Any, written: str, path: Path) -> None:
    """The address of a socket, for every family that Python supports."""
    try:
        sock = socket.socket(family, kind)
    except OSError as exc:
        pytest.skip(f"no such sockets here: {exc}")
    with sock:
        sock.bind(bind_to)
        async with daemon(path), qmpfd.connect(path) as client:
            await client.add_fd(sock)
            [found] = await client.query_fds()
            assert found.address == written.format(*sock.getsockname())
            assert found.listening is False


async def test_a_path_that_looks_abstract(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with listening(socket.AF_UNIX, "@web") as sock:
        async with daemon(path), qmpfd.connect(path) as client:
            await client.add_fd(sock)
            [found] = await client.query_fds()
            assert found.address == "unix:./@web"


async def test_the_file_of_a_socket(path: Path, tmp_path: Path) -> None:
    """An O_PATH descriptor of a socket's file is no socket, and has no address."""
    with listening(socket.AF_UNIX, str(tmp_path / "s")):
        number = os.open(tmp_path / "s", os.O_PATH | os.O_CLOEXEC)
    try:
        async with daemon(path), qmpfd.connect(path) as client:
            await client.add_fd(number)
            [found] = await client.query_fds()
            assert (found.kind, found.access) == ("socket", "path")
            assert (found.address, found.peer, found.listening) == (None, None, None)
    finally:
        os.close(number)


async def test_the_reply(path: Path, tmp_path: Path) -> None:
    """All members, with their types; inapplicable ones are left out."""
    (tmp_path / "file").touch()
    async with daemon(path):
        with await Wire.session(path) as wire, (tmp_path / "file").open("r+") as file:
            added = value(await wire.call("add-fd", {"opaque": "o"}, [file]))
            terms = {"expires": 10, "lifetime": "connection"}
            value(await wire.call("add-fds", terms, [file]))
            me = {"pid": os.getpid(), "uid": os.geteuid(), "gid": os.getegid()}
            common: dict[str, Any] = {
                "access": "rdwr",
                "kind": "file",
                "target": str(tmp_path / "file"),
                "flags": [],
                "size": 0,
            }
            common |= {"age": 0, "watch-hangup": False, "added-by": me}
            newer, older = value(await wire.call("query-fds"))
            assert older == {**added, **common, "opaque": "o", "lifetime": "daemon"}
            number = newer.pop("fd")
            assert isinstance(number, int)
            assert newer == {"fdset-id": 1, **common, "lifetime": "connection", "expires": 10}


async def test_the_target_follows_the_file(path: Path, tmp_path: Path) -> None:
    """The target of a renamed or unlinked file is that of /proc/PID/fd."""
    file = tmp_path / "one"
    file.touch()
    async with daemon(path), qmpfd.connect(path) as client:
        with file.open("rb") as opened:
            await client.add_fd(opened)
        file = file.rename(tmp_path / "two")
        assert (await client.query_fds())[0].target == str(file)
        file.unlink()
        assert (await client.query_fds())[0].target == f"{file} (deleted)"
        assert (await client.query_fds())[0].kind == "file"


@pytest.mark.parametrize(
    "name, shown",
    [
        (b"\xff\xfe", "\\xff\\xfe"),
        (b"a\nb\t\x7f", "a\nb\t\x7f"),
        ("\u20ac\U0001f600".encode(), "\u20ac\U0001f600"),
        (b'"\\', '"\\'),
        (b"socket:[1]", "socket:[1]"),
        (b"anon_inode:[eventpoll]", "anon_inode:[eventpoll]"),
    ],
)
async def test_odd_names(path: Path, tmp_path: Path, name: bytes, shown: str) -> None:
    """Files with unusual names are listed, and all others too."""
    number = os.open(os.fsencode(tmp_path) + b"/" + name, os.O_CREAT | os.O_CLOEXEC)
    try:
        async with daemon(path), qmpfd.connect(path) as client:
            await client.add_fd(number)
            [found] = await client.query_fds()
            assert found.target == f"{tmp_path}/{shown}"
            assert found.kind == "file"
    finally:
        os.close(number)


async def test_a_path_longer_than_the_kernel_shows(path: Path, tmp_path: Path) -> None:
    """A path beyond PATH_MAX does not make the listing fail."""
    with ExitStack() as stack, Pipe() as pipe:
        place = os.open(tmp_path, os.O_RDONLY | os.O_CLOEXEC)
        stack.callback(os.close, place)
        for _ in range(20):
            os.mkdir("d" * 250, dir_fd=place)
            place = os.open("d" * 250, os.O_RDONLY | os.O_CLOEXEC, dir_fd=place)
            stack.callback(os.close, place)
        async with daemon(path), qmpfd.connect(path) as client:
            await client.add_fd(place)
            await client.add_fd(pipe)
            ordinary, long = await client.query_fds()
            assert (long.kind, long.access, long.target) == ("dir", "rdonly", "")
            assert ordinary.kind == "pipe"
            (await client.open_fdset(long.fdset_id)).close()


async def test_by_set_and_prefix(path: Path) -> None:
    async with daemon(path), qmpfd.connect(path) as client:
        with pipes(6) as made:
            texts = ["vm1:disk", None, "vm1:net", "vm10:disk", "", "Vm1:"]
            for fdset_id, (pipe, text) in enumerate(zip(made, texts, strict=True)):
                await client.add_fd(pipe, 0 if fdset_id in (1, 2) else None, text)

            async def found(**arguments: Any) -> list[str | None]:
                return [fd.opaque for fd in await client.query_fds(**arguments)]

            # Sets by descending id, the oldest of each first: the order of query-fdsets.
            assert await found() == ["Vm1:", "", "vm10:disk", "vm1:disk", None, "vm1:net"]
            assert await found(opaque_prefix="vm1") == ["vm10:disk", "vm1:disk", "vm1:net"]
            assert await found(opaque_prefix="vm1:") == ["vm1:disk", "vm1:net"]
            assert await found(opaque_prefix="vm1:disk+") == []
            assert await found(opaque_prefix="m1") == []
            assert await found(opaque="vm1:") == []
            assert await found(opaque="vm1:disk") == ["vm1:disk"]
            assert await found(opaque="") == [""]
            assert await found(opaque_prefix="*") == []
            # The empty prefix matches every text, also the empty one, but not a missing one.
            assert await found(opaque_prefix="") == ["Vm1:", "", "vm10:disk", "vm1:disk", "vm1:net"]
            assert await found(fdset_id=0) == ["vm1:disk", None, "vm1:net"]
            assert await found(fdset_id=0, opaque_prefix="vm1:n") == ["vm1:net"]
            assert await found(fdset_id=1, opaque_prefix="vm1:n") == []
            with pytest.raises(qmpfd.FdNotFound, match="'fdset-id:7' not found"):
                await found(fdset_id=7)
            with pytest.raises(qmpfd.FdNotFound, match="'fdset-id:7' not found"):
                await found(fdset_id=7, opaque_prefix="vm1")


async def test_arguments(path: Path) -> None:
    async with daemon(path):
        with await Wire.session(path) as wire:
            assert value(await wire.call("query-fds")) == []
            for arguments in ({"fdset-id": "0"}, {"opaque": 0}, {"fd": "0"}, {"pid": 0}):
                assert error(await wire.call("query-fds", arguments)) == "GenericError"


async def test_age(path: Path, autojump_clock: MockClock) -> None:
    async with daemon(path), qmpfd.connect(path) as client:
        with pipes(2) as made:
            await client.add_fd(made[0])
            await trio.sleep(99.5)
            await client.add_fd(made[1], 0)
            await trio.sleep(1)
            assert [fd.age for fd in await client.query_fds()] == [100, 1]


def test_added_by_another_process(path: Path) -> None:
    """added-by has the kernel's credentials of the client, also after its end."""
    with daemon_process(path):
        program = [sys.executable, "-m", "qmpfd", "add", "--socket", str(path), "/dev/null"]
        with subprocess.Popen(program, cwd=ROOT, stdout=subprocess.DEVNULL) as adder:
            assert adder.wait(PATIENCE) == 0
        [found] = trio.run(_query, path)
        assert found.added_by is not None
        assert found.added_by.pid == adder.pid
        assert (found.added_by.uid, found.added_by.gid) == (os.geteuid(), os.getegid())


async def _query(path: Path) -> list[qmpfd.FdInfo]:
    async with qmpfd.connect(path) as client:
        return await client.query_fds()


#: Program that changes to user nobody and adds its standard input.
ADDER = """
import os, socket, sys
sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
os.chdir(sys.argv[1])
os.setgroups([])
os.setgid(65533)
os.setuid(65534)
sock.connect("q.sock")
sock.sendall(b'{"execute": "qmp_capabilities"}')
sock.sendmsg([b'{"execute": "add-fd"}'], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, bytes(4))])
said = b""
while said.count(b"return") < 2:
    said += sock.recv(1 << 16) or exit(said)
"""


@pytest.mark.root
def test_added_by_another_user(path: Path, tmp_path: Path) -> None:
    """added-by has the user that connected, not the one that opened the file."""
    policy = tmp_path / "policy.toml"
    tmp_path.chmod(0o711)
    policy.write_text('[[rule]]\nuid = 65534\nallow = ["query", "add"]\n')
    with daemon_process(path, "--policy", str(policy), "--socket-mode", "666"):
        with subprocess.Popen([sys.executable, "-c", ADDER, str(tmp_path)], stdin=0) as adder:
            assert adder.wait(PATIENCE) == 0
        [found] = trio.run(_query, path)
        assert found.added_by is not None
        assert found.added_by.pid == adder.pid
        assert (found.added_by.uid, found.added_by.gid) == (65534, 65533)


def test_there_from_the_start(path: Path) -> None:
    """Descriptors of ``--add-fd`` have no ``added-by``."""
    with Pipe() as pipe:
        number = pipe.fileno()
        option = f"fd={number},set=3,opaque=inherited"
        with daemon_process(path, "--add-fd", option, pass_fds=[number]):
            [found] = trio.run(_query, path)
            assert (found.fdset_id, found.opaque) == (3, "inherited")
            assert (found.kind, found.access) == ("pipe", "wronly")
            assert found.added_by is None


# -- a file system that does not answer --------------------------------------------------------


@contextmanager
def fuse(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Mount a FUSE file system that hangs on the requests named on its standard input."""
    if not os.access("/dev/fuse", os.R_OK):
        pytest.skip("no FUSE here")
    folder.mkdir()
    program = [sys.executable, str(ROOT / "tests/faults/fuse.py"), str(folder)]
    with subprocess.Popen(
        program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        try:
            if server.stdout.readline() != "mounted\n":
                pytest.skip("no FUSE here")
            yield server
        finally:
            server.stdin.close()
            server.wait(PATIENCE)


@pytest.mark.root
def test_a_dead_file_system(path: Path, tmp_path: Path) -> None:
    """No command waits for a file system that hangs: listing, watching, opening or removing."""
    with daemon_process(path), fuse(tmp_path / "mount") as server:
        assert server.stdin is not None
        assert server.stdout is not None
        with (tmp_path / "mount" / "file").open("r+b", buffering=0) as file:
            server.stdin.write("GETATTR,POLL,FLUSH,RELEASE,STATFS,LOOKUP,IOCTL\n")
            server.stdin.flush()
            assert server.stdout.readline() == "told\n"
            got = None
            try:
                got = trio.run(_use, path, file.fileno(), str(tmp_path / "mount" / "file"))
            finally:  # the test's own closes must not hang
                server.stdin.write("\n")
                server.stdin.flush()
                assert server.stdout.readline() == "told\n"
                if got is not None:
                    got.close()


async def _use(path: Path, number: int, target: str) -> Fd:
    with trio.fail_after(PATIENCE / 2):
        async with qmpfd.connect(path) as client:
            await client.add_fd(number)
            [found] = await client.query_fds()
            assert (found.target, found.kind, found.access) == (target, "file", "rdwr")
            with pytest.raises(qmpfd.InvalidParameterValue, match="watch-hangup"):
                await client.add_fds([number], watch_hangup=True)
            fd = await client.open_fdset(0)
            await client.remove_fd(0)
            assert await client.query_fdsets() == []
            return fd


def test_as_json(path: Path) -> None:
    """``qmpfd ls --json`` prints the value of the command."""

    def run(*words: str) -> bytes:
        command = [sys.executable, "-m", "qmpfd", *words, "--socket", str(path)]
        return subprocess.check_output(command, cwd=ROOT, timeout=PATIENCE)

    with daemon_process(path):
        run("add", "--opaque", "\u20ac", "/dev/null")
        [found] = json.loads(run("ls", "--long", "--json"))
        assert (found["target"], found["opaque"]) == ("/dev/null", "\u20ac")
