"""``qmpfd status``: the state of a daemon, and each kind of failure."""

from __future__ import annotations

import ctypes
import json
import os
import re
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conformance.peers import start_qemu
from helpers import PATIENCE, Pipe, daemon_process, daemon_thread
from terminal import on_a_terminal

import qmpfd
from qmpfd.cli.status import _peer_row, _print_peers
from qmpfd.client.blocking import BlockingClient

from .command import DONE, NO_DAEMON, REFUSED, run, run_as_nobody


def status(path: Path, *words: str) -> tuple[int, str, str]:
    """Run the verb; return its exit status, standard output and standard error."""
    ran = run("status", "--socket", os.fspath(path), *words)
    assert ran.stderr.count("\n") == (ran.returncode != DONE), ran.stderr
    return ran.returncode, ran.stdout, ran.stderr


def shown(path: Path) -> dict[str, str]:
    """Return the lines before the table as a mapping."""
    found, out, _ = status(path)
    assert found == DONE
    lines = out.partition("\n\n")[0].splitlines()
    return dict(re.split(r"  +", line, maxsplit=1) for line in lines)


# -- a daemon ----------------------------------------------------------------------------------


def test_what_it_tells(path: Path) -> None:
    limits = qmpfd.Limits(max_fds=2, max_connections=9, idle_timeout=1.5)
    running = daemon_thread(path, limits=limits, dialect="qemu")
    with running, Pipe() as pipe, BlockingClient(path, PATIENCE) as client:
        client.execute("add-fds", {"opaque": "x"}, [pipe])
        output = shown(path)
        assert output["socket"] == str(path)
        assert output["server"].startswith("qmpfd ")
        assert output["process"] == str(os.getpid())
        assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d, for \d+s", output["since"])
        assert output["dialect"] == "qemu"
        assert output["fd sets"] == "1"
        assert output["descriptors"].startswith("1 of 2,")
        assert output["connections"].startswith("2 of 9,")
        assert output["timeouts"] == "idle 1.5 s, write 30 s, drain 5 s"
        client.execute("add-fd", {}, [pipe])
        assert shown(path)["descriptors"].startswith("FULL: 2 of 2,")


def test_who_is_connected(path: Path) -> None:
    with daemon_thread(path), Pipe() as pipe, BlockingClient(path, PATIENCE) as client:
        client.execute("watch-fdsets", {"enable": True})
        client.execute("getfd", {"fdname": "x"}, [pipe])
        header, *rows = status(path)[1].partition("\n\n")[2].splitlines()
        assert header.split() == [
            "PID",
            "USER",
            "COMMAND",
            "CONNECTIONS",
            "AGE",
            "IDLE",
            "FDS",
            "WATCHES",
        ]
        comm = Path("/proc/self/comm").read_text().strip()
        ours, its = rows
        assert ours.startswith(str(os.getpid()))
        assert comm in ours
        assert ours.split()[-5:] == ["1", "0s", "0s", "1", "yes"]
        assert "(this one)" in its


def test_a_name_that_would_disturb_the_terminal(path: Path) -> None:
    """A process name may have any bytes: PR_SET_NAME (prctl(2))."""
    before = Path("/proc/self/comm").read_bytes().strip()
    libc = ctypes.CDLL(None)
    with daemon_thread(path), BlockingClient(path, PATIENCE):
        libc.prctl(15, b"\x1b[31m\xff\n  a")
        try:
            shown = on_a_terminal(["status", "--socket", str(path)], env={"TERM": "dumb"})
        finally:
            libc.prctl(15, before)
    assert "\x1b" not in shown
    assert "\\x1b[31m\ufffd\\n  a" in shown


PEER = {
    "pid": 1,
    "uid": 4_000_000,
    "gid": 0,
    "connections": 3,
    "age": 7,
    "idle": 0,
    "fds": 0,
    "watching": False,
}


def test_process_numbers_of_another_namespace(capsys: pytest.CaptureFixture[str]) -> None:
    """The client is not listed under its own pid: the daemon is in another pid namespace."""
    _print_peers({"connections": 5, "peers": [PEER, {**PEER, "pid": 0}]})
    _, first, second = capsys.readouterr().out.strip().splitlines()
    assert first.split() == ["1", "4000000", "-", "3", "7s", "0s", "0", "no"]
    assert second.split()[:3] == ["-", "4000000", "-"]
    assert _peer_row(PEER, True)[2] == Path("/proc/1/comm").read_text().strip()


def test_some_are_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    _print_peers({"connections": 5, "peers": [PEER]})
    assert capsys.readouterr().out.endswith("\n2 more connections are not shown\n")


def test_no_connection_left(path: Path) -> None:
    """The advice does not name status, which needs a connection itself."""
    limits = qmpfd.Limits(max_connections=1)
    with daemon_thread(path, limits=limits), BlockingClient(path, PATIENCE):
        found, out, output = status(path)
    assert (found, out) == (REFUSED, "")
    assert output.endswith("the limit is 1 (serve --max-connections sets the limit)\n")


@pytest.mark.root
def test_a_user_who_may_not_query_everything() -> None:
    """Missing members of query-stats are not shown as 0."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        path, policy = Path(folder, "q.sock"), Path(folder, "policy")
        policy.write_text('[[rule]]\nallow = ["query"]\nfdsets = [0]\n')
        with daemon_process(path, "--policy", str(policy), "--socket-mode", "666"):
            ran = run_as_nobody("status", "--socket", str(path))
    assert ran.returncode == DONE, ran.stderr
    rows = dict(re.findall(r"^(served|refused|fd sets) +(.*)$", ran.stdout, re.MULTILINE))
    assert rows["fd sets"] == "hidden: this user may not query all descriptors"
    assert "command" not in rows["served"] + rows["refused"]


def test_json(path: Path) -> None:
    with daemon_thread(path):
        found, out, _ = status(path, "--json")
    output = json.loads(out)
    assert found == DONE
    assert output["socket"] == str(path)
    assert output["stats"]["peers"][0]["connections"] == 1


@pytest.mark.parametrize("columns", [200, 80, 40, 20, 5])
def test_in_a_terminal(path: Path, columns: int) -> None:
    with daemon_thread(path):
        shown = on_a_terminal(["status", "--socket", str(path)], columns)
    assert "Traceback" not in shown
    assert "WATC" in shown


# -- another server, or none -------------------------------------------------------------------


@pytest.mark.qemu
def test_qemu_has_an_unrelated_query_stats() -> None:
    """QEMU has an unrelated query-stats."""
    with start_qemu(1) as qemu:
        output = shown(Path(qemu.paths[0]))
        assert output["server"].startswith("QEMU ")
        assert output["statistics"] == "none: this is not qmpfd"
        assert json.loads(status(Path(qemu.paths[0]), "--json")[1])["stats"] is None


def test_no_daemon(path: Path) -> None:
    found, _, output = status(path)
    assert found == NO_DAEMON
    assert f"qmpfd serve --socket {path}" in output
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(os.fspath(path))
    found, _, output = status(path)
    assert found == NO_DAEMON
    assert f"has ended (start one: qmpfd serve --socket {path}; or name another socket)" in output
    path.unlink()
    path.write_text("a file")
    found, _, output = status(path)
    assert found == NO_DAEMON
    assert "not a socket (name another path)" in output


@contextmanager
def silent(path: Path) -> Iterator[None]:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.fspath(path))
        listener.listen()
        yield


def test_a_silent_daemon(path: Path) -> None:
    with silent(path):
        found, _, output = status(path, "--timeout", "0.2")
    assert found == NO_DAEMON
    assert "does not answer" in output
    assert "--timeout" in output


@pytest.mark.root
def test_no_access() -> None:
    """No access: by file permissions, by the policy, or by a policy without the right to query."""

    def ask() -> tuple[int, str, str]:
        ran = run_as_nobody("status", "--socket", str(path))
        return ran.returncode, ran.stdout, ran.stderr

    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        path = Path(name, "q.sock")
        with daemon_process(path):
            found, out, output = ask()
            assert (found, out) == (NO_DAEMON, ""), output
            assert "Permission denied" in output
            assert "--socket-mode" in output
            path.chmod(0o666)
            found, out, output = ask()
            assert (found, out) == (REFUSED, ""), output
            assert "may not connect" in output
            assert "check-policy" in output
        policy = Path(name, "policy")
        policy.write_text('[[rule]]\nallow = ["add"]\n')
        with daemon_process(path, "--policy", str(policy), "--socket-mode", "666"):
            found, out, output = ask()
            assert (found, output) == (DONE, "")
            assert re.search(r"^statistics +none: PermissionDenied: .*'query'", out, re.MULTILINE)
