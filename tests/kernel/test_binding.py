"""Binding of Unix sockets: one process at a time binds a path, and a failure leaves no file."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from helpers import PATIENCE, ROOT

from qmpfd.client.blocking import connect_blocking
from qmpfd.kernel.binding import Permissions, SocketInUse
from qmpfd.server.listen.listener import UnixListener


def stale(path: Path) -> None:
    """Make a socket file without a listening process."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.bind(os.fspath(path))


#: Program that binds each path that it reads, prints the outcome, and closes it at the next path.
CONTENDER = """
import sys
from contextlib import closing, nullcontext
import trio
from qmpfd.kernel.binding import Permissions, SocketInUse
from qmpfd.server.listen.listener import UnixListener

async def main():
    path = sys.stdin.readline().strip()
    while path:
        try:
            held = closing(UnixListener.bind(path))
        except SocketInUse:
            held = nullcontext()
        with held:
            print("in use" if isinstance(held, nullcontext) else "bound", flush=True)
            path = sys.stdin.readline().strip()

trio.run(main)
"""


def test_one_of_several_processes_replaces_a_stale_file(tmp_path: Path) -> None:
    """One process binds the path and accepts clients; all others report that it is in use."""
    contenders = [
        subprocess.Popen(
            [sys.executable, "-c", CONTENDER],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        for _ in range(4)
    ]
    try:
        for number in range(100):
            path = tmp_path / str(number)
            stale(path)
            for contender in contenders:
                assert contender.stdin is not None
                contender.stdin.write(f"{path}\n")  # also closes the socket of the last path
            output = [each.stdout.readline() for each in contenders if each.stdout is not None]
            assert sorted(output) == ["bound\n", *["in use\n"] * 3]
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
                client.connect(os.fspath(path))
    finally:
        for contender in contenders:
            contender.communicate(timeout=PATIENCE)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_bind_leaves_nothing(tmp_path: Path) -> None:
    for path in (tmp_path / "new", tmp_path / "stale"):
        if path.name == "stale":
            stale(path)
        with pytest.raises(OverflowError):
            UnixListener.bind(path, Permissions(group=1 << 32))  # chown(2) fails, after bind(2)
    assert list(tmp_path.iterdir()) == []


async def test_a_lock_that_a_killed_process_left(tmp_path: Path) -> None:
    (tmp_path / ".q.sock.lock").touch()
    with closing(UnixListener.bind(tmp_path / "q.sock")):
        assert [entry.name for entry in tmp_path.iterdir()] == ["q.sock"]


async def test_a_socket_in_use_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "q.sock"
    with closing(UnixListener.bind(path)):
        with pytest.raises(SocketInUse, match="already listening"):
            UnixListener.bind(path)
        assert [entry.name for entry in tmp_path.iterdir()] == ["q.sock"]


@pytest.mark.parametrize("kind", ["abstract", "long", "not UTF-8"])
def test_sockets_of_every_kind(tmp_path: Path, kind: str) -> None:
    path = {
        "abstract": f"@qmpfd-test-{secrets.token_hex(8)}",
        "long": os.fspath(tmp_path / ("d" * 200) / ("n" * 240)),
        "not UTF-8": os.fspath(tmp_path / os.fsdecode(b"caf\xe9.sock")),
    }[kind]
    if kind == "long":
        Path(path).parent.mkdir()
    command = [sys.executable, "-m", "qmpfd", "serve", "--socket", path]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE) as process:
        try:
            assert process.stderr is not None
            assert b"listening on" in process.stderr.readline()
            with connect_blocking(path) as client:
                assert client.query_fdsets() == []
        finally:
            process.terminate()
            process.wait(PATIENCE)
        assert b"Traceback" not in process.stderr.read()
        assert process.returncode == 0
    assert not Path(path).exists()
