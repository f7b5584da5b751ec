"""``qmpfd tap``: relay and print lines and descriptors between a client and a server.

Tests of cli/tapping.py.
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import PATIENCE, ROOT, daemon_process

from qmpfd.client.blocking import BlockingClient, NoDaemon

from .command import DONE, NO_DAEMON, REFUSED, run

INTERRUPTED = 130


def test_a_socket_file_on_which_nobody_listens(path: Path) -> None:
    """A tap that is killed leaves its file; the next one replaces it."""
    listen = path.with_name("tap.sock")
    with daemon_process(path):
        for number in (signal.SIGTERM, signal.SIGINT):
            command = [sys.executable, "-m", "qmpfd", "tap", os.fspath(listen), os.fspath(path)]
            tap = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
            try:
                at = ["--socket", os.fspath(listen)]
                waited = run("status", *at, "--wait", str(PATIENCE))
                assert waited.returncode == DONE, waited.stderr
                again = run("tap", os.fspath(listen), os.fspath(path))
                assert (again.returncode, again.stderr.count("\n")) == (REFUSED, 1)
            finally:
                tap.send_signal(number)
                tap.wait(PATIENCE)
            assert listen.exists() == (number == signal.SIGTERM)


@pytest.mark.parametrize("output", ["full", "closed"])
def test_where_the_output_fails(path: Path, output: str) -> None:
    """The tap ends, as each verb does; it does not merely drop the client."""
    listen = path.with_name("tap.sock")
    command = [sys.executable, "-m", "qmpfd", "tap", os.fspath(listen), os.fspath(path)]
    reader, writer = os.pipe()
    os.close(reader)
    with daemon_process(path), open("/dev/full", "w") as full, open(writer, "w") as closed:
        tap: Any = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=full if output == "full" else closed,
            stderr=subprocess.PIPE,
            text=True,
        )
        with tap:
            while tap.poll() is None:
                ran = run("status", "--socket", os.fspath(listen), "--wait", "0.1")
                assert ran.returncode == NO_DAEMON
            error = tap.stderr.read()
    expected = {
        "full": (REFUSED, "qmpfd: No space left on device\n"),
        "closed": (128 + signal.SIGPIPE, ""),
    }
    assert (tap.returncode, error) == expected[output]
    assert not listen.exists()


def test_an_error_names_the_obstacle(tmp_path: Path) -> None:
    for listen in (tmp_path, tmp_path / "no" / "folder"):
        ran = run("tap", str(listen), "/nowhere")
        assert (ran.returncode, ran.stderr.count("\n")) == (REFUSED, 1)
        assert f"cannot listen on {listen}: " in ran.stderr


def test_descriptors_that_the_tap_cannot_receive(path: Path) -> None:
    """The server must not get a part of them: the connection ends, and no other one."""
    listen = path.with_name("tap.sock")
    command = [sys.executable, "-m", "qmpfd", "tap", os.fspath(listen), os.fspath(path)]
    with daemon_process(path):
        tap = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        with tap:
            try:
                assert run("status", "--socket", str(listen), "--wait", "60").returncode == DONE
                with BlockingClient(listen, PATIENCE) as other:
                    resource.prlimit(tap.pid, resource.RLIMIT_NOFILE, (40, 40))
                    with BlockingClient(listen, PATIENCE) as client, pytest.raises(NoDaemon):
                        client.execute("add-fds", {}, [0] * 100)
                    assert other.execute("query-fdsets") == []
            finally:
                tap.terminate()
            assert tap.stderr is not None
            assert "descriptors were lost" in tap.stderr.read()


def test_tap(path: Path) -> None:
    """All lines and descriptors pass in both directions, and no descriptor is left."""
    listen = path.with_name("tap.sock")
    with daemon_process(path):
        command = [sys.executable, "-m", "qmpfd", "tap", os.fspath(listen), os.fspath(path)]
        tap = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        try:
            at = ["--socket", os.fspath(listen)]
            waited = run("status", *at, "--wait", str(PATIENCE))
            assert waited.returncode == DONE, waited.stderr
            assert run("add", *at, "--name", "seen", "/dev/null").returncode == DONE
            assert run("ls", "--socket", os.fspath(path)).stdout.split()[-1] == "seen"
        finally:
            tap.send_signal(signal.SIGINT)
            out, _ = tap.communicate(timeout=PATIENCE)
    assert tap.returncode == INTERRUPTED
    lines = out.splitlines()
    (asked,) = (n for n, line in enumerate(lines) if '"execute": "add-fd"' in line)
    assert lines[asked].startswith('  -> {"execute": "add-fd", "arguments": {"opaque": "seen"}')
    assert lines[asked + 1] == "     + 1 descriptor, by SCM_RIGHTS"
    assert lines[asked + 2].startswith('  <- {"return": {"fdset-id": 0, "fd": ')
    assert not listen.exists()
