"""Other projects' clients with the daemon; the client library with a QEMU."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conformance.peers import start_qemu
from helpers import PATIENCE, Pipe, daemon_thread, pipes
from qemu.qmp import ExecuteError, QMPClient

import qmpfd

pytestmark = pytest.mark.filterwarnings("default::DeprecationWarning:qemu")

QMP_SHELL = Path(sys.executable).with_name("qmp-shell")


@pytest.fixture(params=["spec", "qemu"])
def dialect(request: pytest.FixtureRequest, path: Path) -> Iterator[str]:
    """Run a daemon with each dialect."""
    with daemon_thread(path, dialect=request.param):
        yield request.param


# -- qemu.qmp, as QEMU's own tests and many programs use it ------------------------------------


async def _connect(path: Path) -> QMPClient:
    client = QMPClient("test")
    await client.connect(os.fspath(path))
    return client


def test_qemu_qmp(path: Path, dialect: str) -> None:
    """All fd set commands with qemu.qmp, which sends a descriptor on a blank of its own."""

    async def main() -> None:
        client = await _connect(path)
        try:
            with pipes(2) as made:
                for pipe in made:
                    client.send_fd_scm(pipe.fileno())
                    added = await client.execute("add-fd", {"opaque": "rdwr:disk"})
                    assert isinstance(added, dict)
                    assert added.keys() == {"fdset-id", "fd"}
                    pipe.release()
                listed: Any = await client.execute("query-fdsets")
                assert [fdset["fdset-id"] for fdset in listed] == [1, 0]
                for number in (0, 1):
                    assert await client.execute("remove-fd", {"fdset-id": number}) == {}
                    assert [pipe.held() for pipe in made] == [False, number == 0]
        finally:
            await client.disconnect()

    asyncio.run(asyncio.wait_for(main(), PATIENCE))


def test_qemu_qmp_sees_the_classes(path: Path, dialect: str) -> None:
    async def main() -> None:
        client = await _connect(path)
        try:
            for command, arguments, error_class in [
                ("remove-fd", {"fdset-id": 7}, "FdNotFound"),
                ("add-fd", None, "FdNotSupplied"),
                ("open-fdset", {"fdset-id": 7}, "FdNotFound"),
                ("no-such", None, "CommandNotFound"),
                ("remove-fd", None, "GenericError"),
            ]:
                with pytest.raises(ExecuteError) as info:
                    await client.execute(command, arguments)
                stored = dialect == "spec" or error_class == "CommandNotFound"
                assert info.value.error_class == (error_class if stored else "GenericError")
            assert await client.execute("query-fdsets") == []
        finally:
            await client.disconnect()

    asyncio.run(asyncio.wait_for(main(), PATIENCE))


@pytest.mark.usefixtures("dialect")
def test_qemu_qmp_hears_the_events(path: Path) -> None:
    """The listener of qemu.qmp gets the daemon's events, if enabled."""

    async def main() -> None:
        client = await _connect(path)
        try:
            with client.listener() as heard, Pipe() as pipe:
                client.send_fd_scm(pipe.fileno())
                await client.execute("add-fd")
                await client.execute("remove-fd", {"fdset-id": 0})
                assert heard.empty()
                await client.execute("watch-fdsets", {"enable": True})
                client.send_fd_scm(pipe.fileno())
                await client.execute("add-fd", {"opaque": "o"})
                await client.execute("remove-fd", {"fdset-id": 0})
                added: Any = await heard.get()
                removed: Any = await heard.get()
                assert added["event"] == "FD_ADDED"
                assert added["data"]["opaque"] == "o"
                assert removed["event"] == "FD_REMOVED"
                assert removed["data"]["reason"] == "removed"
        finally:
            await client.disconnect()

    asyncio.run(asyncio.wait_for(main(), PATIENCE))


@pytest.mark.usefixtures("dialect")
def test_fifty_of_them_at_once(path: Path) -> None:
    """Fifty qemu.qmp clients at once add and remove their own descriptors."""

    async def one(number: int) -> int:
        client = await _connect(path)
        try:
            with Pipe() as pipe:
                client.send_fd_scm(pipe.fileno())
                added = await client.execute("add-fd", {"opaque": str(number)})
                assert isinstance(added, dict)
                pipe.release()
                for _ in range(5):
                    listed = json.dumps(await client.execute("query-fdsets"))
                    mine = {"fd": added["fd"], "opaque": str(number)}
                    assert json.dumps(mine) in listed
                assert pipe.held()
                await client.execute("remove-fd", {"fdset-id": added["fdset-id"]})
                assert not pipe.held()
            return int(added["fdset-id"])
        finally:
            await client.disconnect()

    async def main() -> list[int]:
        return await asyncio.gather(*map(one, range(50)))

    assert set(asyncio.run(asyncio.wait_for(main(), PATIENCE))) <= set(range(50))


@pytest.mark.usefixtures("dialect")
def test_qmp_shell(path: Path, tmp_path: Path) -> None:
    """qmp-shell, which reads query-commands for its completion at the start."""
    typed = "query-version\nquery-fdsets\nremove-fd fdset-id=7\nquery-fds opaque=x\nno-such\n"
    ran = subprocess.run(
        [sys.executable, str(QMP_SHELL), os.fspath(path)],
        input=typed,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
        env={**os.environ, "HOME": str(tmp_path)},
    )
    assert ran.returncode == 0, ran.stderr
    assert "Traceback" not in ran.stderr
    answers = [json.loads(line) for line in re.findall(r'\{"(?:return|error).*\}', ran.stdout)]
    assert answers[0]["return"]["package"] == f"qmpfd {qmpfd.__version__}"
    assert answers[1] == {"return": []}
    assert answers[2]["error"]["desc"] == "File descriptor named 'fdset-id:7' not found"
    assert answers[3] == {"return": []}
    assert answers[4]["error"]["class"] == "CommandNotFound"


# -- our client, against a QEMU ----------------------------------------------------------------


@pytest.mark.qemu
async def test_qemu_opens_what_our_client_adds(tmp_path: Path) -> None:
    """QEMU selects by access mode: a node for each of two descriptors of one image."""
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))
    with start_qemu() as qemu:
        async with qmpfd.connect(qemu.paths[0]) as client:
            with image.open("rb") as read_only, image.open("r+b") as both:
                info = await client.add_fd(read_only, 3, "rdonly:disk")
                await client.add_fd(both, 3, "rdwr:disk")
            image.unlink()
            assert info.fdset_id == 3
            [fdset] = await client.query_fdsets()
            assert [fd.opaque for fd in fdset.fds] == ["rdonly:disk", "rdwr:disk"]

            def node(name: str, *, read_only: bool) -> dict[str, object]:
                place = {"driver": "file", "filename": "/dev/fdset/3", "locking": "off"}
                return {**place, "node-name": name, "read-only": read_only}

            await client.execute("blockdev-add", node("ro", read_only=True))
            await client.execute("blockdev-add", node("rw", read_only=False))
            nodes = await client.execute("query-named-block-nodes")
            assert {each["node-name"]: each["ro"] for each in nodes} == {"ro": True, "rw": False}
            # Without a matching descriptor QEMU fails; its open nodes outlive the set.
            await client.remove_fd(3)
            with pytest.raises(qmpfd.GenericError):
                await client.execute("blockdev-add", node("again", read_only=True))
            for name in ("ro", "rw"):
                await client.execute("blockdev-del", {"node-name": name})
            assert await client.query_fdsets() == []


@pytest.mark.qemu
async def test_qemu_refuses_qmpfds_own_commands(tmp_path: Path) -> None:
    """QEMU refuses qmpfd's own commands; nothing leaks, and the connection continues."""
    with start_qemu(1) as qemu:
        async with qmpfd.connect(qemu.paths[0]) as client:
            with Pipe() as pipe:
                for call in (
                    lambda: client.open_fdset(0),
                    lambda: client.add_fds([pipe]),
                    client.query_fds,
                ):
                    with pytest.raises(qmpfd.CommandNotFound):
                        await call()
                with pytest.raises(qmpfd.CommandNotFound):
                    async with client.watch_fdsets():
                        pass
                assert await client.query_fdsets() == []
                flags = fcntl.fcntl(pipe, fcntl.F_GETFL)
                await client.add_fd(pipe)
                assert fcntl.fcntl(pipe, fcntl.F_GETFL) & os.O_ACCMODE == flags & os.O_ACCMODE
