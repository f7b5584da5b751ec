"""``query-fds``: what each descriptor is, whose, how old, and for how long."""

from __future__ import annotations

import json
import os
import signal
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

#: What ``kinds.py`` makes, by what we call it, and how it was opened.
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
}


@pytest.mark.parametrize("kind", KINDS)
async def test_kind_and_access(kind: str, path: Path, tmp_path: Path) -> None:
    with open_kind(kind, tmp_path) as number:
        async with daemon(path), qmpfd.connect(path) as client:
            await client.add_fd(number)
            [found] = await client.query_fds()
            assert (found.kind, found.access) == EXPECTED[kind]


async def test_the_reply(path: Path, tmp_path: Path) -> None:
    """All members, with their types; those that there are not are left out."""
    (tmp_path / "file").touch()
    async with daemon(path):
        with await Wire.session(path) as wire, (tmp_path / "file").open("r+") as file:
            added = value(await wire.call("add-fd", {"opaque": "o"}, [file]))
            terms = {"expires": 10, "lifetime": "connection"}
            value(await wire.call("add-fds", terms, [file]))
            me = {"pid": os.getpid(), "uid": os.geteuid(), "gid": os.getegid()}
            common = {"access": "rdwr", "kind": "file", "target": str(tmp_path / "file")}
            common |= {"age": 0, "watch-hangup": False, "added-by": me}
            newer, older = value(await wire.call("query-fds"))
            assert older == {**added, **common, "opaque": "o", "lifetime": "daemon"}
            number = newer.pop("fd")
            assert isinstance(number, int)
            assert newer == {"fdset-id": 1, **common, "lifetime": "connection", "expires": 10}


async def test_the_target_follows_the_file(path: Path, tmp_path: Path) -> None:
    """Renamed, unlinked: as /proc/PID/fd shows it."""
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
    """Whatever a file is called, it is listed, and so are all others."""
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
    """One user's odd file does not keep others from a list."""
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
            assert await found(opaque="vm1") == ["vm10:disk", "vm1:disk", "vm1:net"]
            assert await found(opaque="vm1:") == ["vm1:disk", "vm1:net"]
            assert await found(opaque="vm1:disk+") == []
            assert await found(opaque="m1") == []
            assert await found(opaque="*") == []
            # Whatever begins with nothing has a text, be it empty.
            assert await found(opaque="") == ["Vm1:", "", "vm10:disk", "vm1:disk", "vm1:net"]
            assert await found(fdset_id=0) == ["vm1:disk", None, "vm1:net"]
            assert await found(fdset_id=0, opaque="vm1:n") == ["vm1:net"]
            assert await found(fdset_id=1, opaque="vm1:n") == []
            with pytest.raises(qmpfd.FdNotFound, match="'fdset-id:7' not found"):
                await found(fdset_id=7)
            with pytest.raises(qmpfd.FdNotFound, match="'fdset-id:7' not found"):
                await found(fdset_id=7, opaque="vm1")


async def test_arguments(path: Path) -> None:
    async with daemon(path):
        with await Wire.session(path) as wire:
            assert value(await wire.call("query-fds")) == []
            for arguments in ({"fdset-id": "0"}, {"opaque": 0}, {"fd": 0}):
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
    """As the kernel vouches, and also once it is gone."""
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


@pytest.mark.root
def test_added_by_another_user(tmp_path: Path) -> None:
    """Who connected counts, not who opened the file."""
    tmp_path.chmod(0o755)
    for parent in list(tmp_path.parents)[:2]:
        parent.chmod(0o755)
    path = tmp_path / "q.sock"
    policy = tmp_path / "policy.toml"
    policy.write_text('[[rule]]\nuid = 65534\nallow = ["query", "add"]\n')
    with daemon_process(path, "--policy", str(policy), "--socket-mode", "666"):
        child = os.fork()
        if child == 0:
            os.setgroups([])
            os.setgid(65533)
            os.setuid(65534)
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
                sock.connect(os.fspath(path))
                sock.sendall(b'{"execute": "qmp_capabilities"}')
                sock.sendmsg([b'{"execute": "add-fd"}'], [(1, socket.SCM_RIGHTS, b"\0" * 4)])
                while sock.recv(1 << 16).count(b"fdset-id") == 0:
                    pass
            os.kill(os.getpid(), signal.SIGKILL)
        os.waitpid(child, 0)
        [found] = trio.run(_query, path)
        assert found.added_by is not None
        assert found.added_by.pid == child
        assert (found.added_by.uid, found.added_by.gid) == (65534, 65533)


def test_there_from_the_start(path: Path) -> None:
    """Nobody has added it, so ``added-by`` is left out."""
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
def hung_fuse(folder: Path) -> Iterator[int]:
    """A directory of a FUSE file system whose server never answers anything."""
    mount = folder / "mount"
    mount.mkdir()
    device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    try:
        options = f"fd={device},rootmode=40000,user_id=0,group_id=0"
        command = ["mount", "-i", "-t", "fuse", "-o", options, "hung", str(mount)]
        ran = subprocess.run(command, pass_fds=[device], capture_output=True, check=False)
        if ran.returncode:
            pytest.skip(f"no FUSE here: {ran.stderr.decode().strip()}")
        try:
            # O_PATH, because opening would have to ask.
            number = os.open(mount, os.O_PATH | os.O_CLOEXEC)
            try:
                yield number
            finally:
                os.close(number)
        finally:
            os.close(device)
            device = -1
            subprocess.run(["umount", "-l", str(mount)], check=True)
    finally:
        if device >= 0:
            os.close(device)


@pytest.mark.root
def test_a_dead_file_system(path: Path, tmp_path: Path) -> None:
    """None of our commands waits for it."""
    if not os.access("/dev/fuse", os.R_OK):
        pytest.skip("no FUSE here")
    with hung_fuse(tmp_path) as number, daemon_process(path):

        async def main() -> None:
            with trio.fail_after(PATIENCE):
                async with qmpfd.connect(path) as client:
                    await client.add_fd(number)
                    [found] = await client.query_fds()
                    assert found.target == str(tmp_path / "mount")
                    assert (found.kind, found.access) == ("dir", "path")
                    with pytest.raises(qmpfd.InvalidParameterValue, match="watch-hangup"):
                        await client.add_fds([number], watch_hangup=True)
                    (await client.open_fdset(0)).close()
                    await client.remove_fd(0)
                    await client.query_fdsets()

        trio.run(main)


def test_as_json(path: Path) -> None:
    """What a shell gets is what the command returns."""
    with daemon_process(path, "--add-fd", "fd=0,set=0") if False else daemon_process(path):
        program = [sys.executable, "-m", "qmpfd"]
        for words in (["add", "--opaque", "\u20ac", "/dev/null"], ["ls", "--long", "--json"]):
            ran = subprocess.run(
                [*program, *words, "--socket", str(path)],
                cwd=ROOT,
                check=True,
                capture_output=True,
                timeout=PATIENCE,
            )
        [found] = json.loads(ran.stdout)
        assert (found["target"], found["opaque"]) == ("/dev/null", "\u20ac")
