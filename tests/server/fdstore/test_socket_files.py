"""Socket files of a supervised daemon: kept in a restart, removed at the end; others stay.

Tests of server/fdstore/listeners.py.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from contextlib import ExitStack
from pathlib import Path

import pytest
from helpers import ROOT
from supervised import COMMAND, DEADLINE, connected, lasting, supervised, until

from qmpfd.client.blocking import BlockingClient
from qmpfd.kernel.fd import Fd


def opaques(client: BlockingClient) -> list[str]:
    return [fd["opaque"] for fd in lasting(client.execute("query-fds"))]


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_a_path_that_is_not_utf8(path: Path, log_format: str) -> None:
    """A path that is not UTF-8 works: in a restart and a takeover too."""
    path = path.with_name(os.fsdecode(b"caf\xe9.sock"))
    options = "--log-format", log_format
    with supervised(path, *options) as old, old.client() as client:
        client.execute("add-fd", {"opaque": "mine"}, [0])
        old.kill_worker()
        with old.client() as again:
            assert opaques(again) == ["mine"]
            with supervised(path, "--takeover", *options) as new:
                assert old.process.wait(DEADLINE) == 0
                new.kill_worker()
                with new.client() as last:
                    assert opaques(last) == ["mine"]
    assert not path.exists()


@pytest.mark.parametrize("takeover", [False, True], ids=["started", "took over"])
def test_a_missing_socket_file_is_bound_again(path: Path, takeover: bool) -> None:
    """A worker whose socket file is missing binds the socket again."""
    with ExitStack() as stack:
        daemon = stack.enter_context(supervised(path))
        with daemon.client() as client:
            client.execute("add-fd", {"opaque": "mine"}, [0])
        if takeover:
            daemon = stack.enter_context(supervised(path, "--takeover"))
        daemon.worker()
        path.unlink()
        daemon.kill_worker()
        with connected(path) as again:
            assert opaques(again) == ["mine"]
        before = path.stat().st_ino
        daemon.kill_worker()  # the new socket is stored too
        with connected(path) as again:
            assert opaques(again) == ["mine"]
        assert path.stat().st_ino == before
    assert not path.exists()


def test_another_programs_socket_file_stays(path: Path) -> None:
    """Another program has bound the path: the log says so, the worker restarts, and the other
    program's file stays.
    """
    other = path.with_name("other.sock")
    with (
        supervised(path, "--socket", str(other)) as daemon,
        socket.socket(socket.AF_UNIX) as stranger,
    ):
        with daemon.client() as client:
            client.execute("add-fd", {"opaque": "mine"}, [0])
        path.unlink()
        stranger.bind(str(path))
        stranger.listen()
        daemon.kill_worker()
        with connected(other) as client:
            assert opaques(client) == ["mine"]
        assert f"cannot listen on {path} again: a daemon is already listening" in daemon.log
        daemon.process.terminate()
        assert daemon.process.wait(DEADLINE) == 0
        assert path.exists()
        assert not other.exists()


def test_sigterm_between_two_workers(path: Path, tmp_path: Path) -> None:
    """Without a worker, the parent removes the daemon's socket files, and no others."""
    policy, other = tmp_path / "policy.toml", path.with_name("other.sock")
    policy.write_text("")
    with supervised(path, "--socket", str(other), "--policy", str(policy)) as daemon:
        daemon.worker()
        policy.write_text("bad")
        daemon.kill_worker()
        until(lambda: "trying again" in daemon.log)
        other.unlink()
        other.touch()
        daemon.process.terminate()
        assert daemon.process.wait(DEADLINE) == 0
        assert not path.exists()
        assert other.exists()


def test_a_worker_killed_at_the_end(path: Path) -> None:
    with supervised(path, "--drain-timeout", "0.2") as daemon:
        os.kill(daemon.worker(), signal.SIGSTOP)
        daemon.process.terminate()
        assert daemon.process.wait(DEADLINE) == 0
        assert not path.exists()


@pytest.mark.parametrize("limit", ["-f 0", "-n 128"], ids=["no journal", "too many"])
def test_a_start_that_fails(path: Path, limit: str) -> None:
    """A worker that fails to start for good leaves no socket file."""
    other = path.with_name("other")
    shell = ["sh", "-c", f'ulimit {limit} && exec "$@"', "sh"]
    sockets = ["--socket", str(path), "--socket", str(other)]
    with ExitStack() as stack:
        passed = [stack.enter_context(Fd(os.dup(0))).fileno() for _ in range(60)]
        given = [f"--add-fd=fd={number},set={number}" for number in passed]
        done = subprocess.run(
            [*shell, *COMMAND, "--supervise", *sockets, *given],
            capture_output=True,
            cwd=ROOT,
            pass_fds=passed,
            timeout=DEADLINE,
            check=False,
        )
    assert done.returncode == 2, done.stderr
    assert done.stderr.count(b"\n") == 1, done.stderr
    assert not path.exists()
    assert not other.exists()


def test_sigterm_to_the_predecessor_after_a_takeover(path: Path) -> None:
    """The predecessor's parent does not remove the file, at which the successor serves."""
    with supervised(path, status=None) as old:
        old.worker()
        with supervised(path, "--takeover") as new:
            until(lambda: "took over" in new.log)
            old.process.terminate()
            old.process.wait(DEADLINE)
            assert path.exists()
            with new.client() as client:
                assert opaques(client) == []
