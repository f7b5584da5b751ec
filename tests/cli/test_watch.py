"""``qmpfd watch``: prints events when they arrive."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from helpers import PATIENCE, ROOT, Pipe, daemon_thread

from qmpfd.cli.options import RETRY
from qmpfd.client.blocking import BlockingClient

from .command import ENV, NO_DAEMON, Cli


@contextmanager
def watching(cli: Cli, *words: str) -> Iterator[Any]:
    """Run ``qmpfd watch`` as a process."""
    process = subprocess.Popen(
        cli.argv("watch", *words),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENV,
    )
    with process:
        try:
            with BlockingClient(cli.path, PATIENCE) as client:
                # It prints nothing before the first event.
                while not any(
                    each["name"] == "watch-fdsets"
                    for each in client.execute("query-stats")["commands"]
                ):
                    assert process.poll() is None
            yield process
        finally:
            process.kill()


def test_watch(cli: Cli, tmp_path: Path) -> None:
    """Each event is printed at once, also into a pipe."""
    with watching(cli) as process:
        number = cli.add(tmp_path / "file", os.O_RDWR, opaque="two\nlines")
        line = process.stdout.readline()
        assert re.fullmatch(
            rf"\d\d:\d\d:\d\d  added +fd set 0, fd {number}  two\\nlines\n", line
        ), line
        cli.done("rm", 0)
        assert "removed  fd set 0" in process.stdout.readline()
        with BlockingClient(cli.path, PATIENCE) as client, Pipe() as pipe:
            client.execute("add-fds", {"lifetime": "connection"}, [pipe])
        assert "added" in process.stdout.readline()
        assert process.stdout.readline().endswith("(connection)\n")


def test_watch_as_json(cli: Cli, tmp_path: Path) -> None:
    """One line of JSON for each event."""
    with watching(cli, "--json") as process:
        number = cli.add(tmp_path / "file", os.O_RDWR, opaque="two\nlines")
        data = {"fdset-id": 0, "fd": number, "opaque": "two\nlines"}
        event = json.loads(process.stdout.readline())
        assert event.pop("timestamp") > 1e9
        assert event == {"event": "FD_ADDED", "data": data}
        cli.done("rm", 0)
        event = json.loads(process.stdout.readline())
        assert event["data"] == {**data, "reason": "removed"}


@pytest.mark.parametrize(
    "number, status", [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)]
)
def test_watch_is_interrupted(cli: Cli, number: signal.Signals, status: int) -> None:
    with watching(cli) as process:
        process.send_signal(number)
        assert process.wait(PATIENCE) == status
        assert process.stderr.read() == ""


def test_watch_when_nobody_reads_any_more(cli: Cli, tmp_path: Path) -> None:
    """``qmpfd watch | head -1`` ends silently with the next event."""
    with watching(cli, "--json") as process:
        process.stdout.close()
        cli.add(tmp_path / "file", os.O_RDWR)
        assert process.wait(PATIENCE) == 128 + signal.SIGPIPE
        assert process.stderr.read() == ""


def test_watch_when_the_daemon_ends(path: Path) -> None:
    with daemon_thread(path):
        cli = Cli(path)
        with watching(cli, "--timeout", "0.5") as process:
            with BlockingClient(path, PATIENCE) as client:
                client.execute("quit")
            assert process.wait(PATIENCE) == NO_DAEMON
            first, last = process.stderr.read().splitlines()
            assert first.endswith("closed the connection: connecting again")
            assert last.startswith("qmpfd: no daemon at")


def test_watch_goes_on_after_a_restart(path: Path, tmp_path: Path) -> None:
    cli = Cli(path)
    with ExitStack() as end:
        with daemon_thread(path):
            process = end.enter_context(watching(cli))
        assert process.stderr.readline().endswith(": connecting again\n")
        with daemon_thread(path):
            assert "connected again" in process.stderr.readline()
            watches = False
            with BlockingClient(path, PATIENCE) as client:
                while not watches:
                    peers = client.execute("query-stats")["peers"]
                    watches = any(peer["watching"] for peer in peers)
            number = cli.add(tmp_path / "file", os.O_RDWR)
            assert f"added    fd set 0, fd {number}" in process.stdout.readline()


def test_no_daemon(path: Path) -> None:
    Cli(path).fails(NO_DAEMON, "watch")


def test_a_server_that_closes_each_connection(path: Path) -> None:
    """Watch waits before each reconnection."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        process = subprocess.Popen(
            Cli(path).argv("watch"), cwd=ROOT, stderr=subprocess.DEVNULL, env=ENV
        )
        with process:
            lost = None
            for _ in range(3):
                with listener.accept()[0] as sock, sock.makefile("rw") as wire:
                    assert lost is None or time.monotonic() - lost >= RETRY
                    wire.write('{"QMP": {"version": {}, "capabilities": []}}\n')
                    for number in (1, 2):
                        wire.flush()
                        wire.readline()
                        wire.write(f'{{"return": {{}}, "id": {number}}}\n')
                    wire.flush()
                    lost = time.monotonic()
            process.kill()
