"""``qmpfd serve``: options, errors, and inherited descriptors.

Tests of cli/inheritance.py and cli/serve_options.py.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from helpers import PATIENCE, ROOT, Pipe, Wire, daemon_process, pipes, value

from qmpfd.cli import main

from .command import USAGE, run


def _fails(*words: str, pass_fds: Sequence[int] = (), env: dict[str, str] | None = None) -> str:
    """Run a daemon that must fail to start with one line; return that line."""
    ran = run("serve", *words, pass_fds=pass_fds, env={**os.environ, **(env or {})})
    assert (ran.returncode, ran.stdout) == (USAGE, ""), ran
    assert re.fullmatch(r"qmpfd[^\n]*: [^\n]+\n", ran.stderr), ran.stderr
    return ran.stderr


# -- bad values --------------------------------------------------------------------------------

BAD = {
    "--socket-mode": ["", "8", "1777", "-1", "rw"],
    "--dialect": ["", "qapi"],
    "--policy": [""],
    "--metrics": [""],
    "--audit": [""],
    "--max-connections": ["", "0", "-1", "1.5", "many", "\u0663x"],
    "--max-request-bytes": ["0", "1023", "67108865", "1M"],
    "--write-timeout": ["0", "-1", "nan", "inf", "1e300", "soon"],
    "--drain-timeout": ["0", "-1", "nan", "inf", "1e300", "soon"],
    "--log-level": ["", "loud"],
    "--add-fd": [
        "",
        "3",
        "fd=3",
        "set=1",
        "fd=3,set=",
        "fd=,set=1",
        "fd=x,set=1",
        "fd=3,set=x",
        "fd=0,set=1",
        "fd=2,set=1",
        "fd=-1,set=1",
        "fd=3,set=1,opaque=caf\udce9",
        "fd=2147483648,set=1",
        "fd=3,set=-1",
        "fd=3,set=9223372036854775808",
        "fd=3,set=1,more=1",
        "fd=3,fd=4,set=1",
        "fd=3,set=1,",
        "fd=3,set=1,opaque",
        "fd=3,set=1,opaque=a,b",
        "fd=900,set=1",
        "fd=3,set=1,opaque=\udcff",
    ],
    "--no-such-option": ["x"],
}


@pytest.mark.parametrize(
    "option, bad", [(option, bad) for option, values in BAD.items() for bad in values]
)
def test_bad_values(option: str, bad: str, path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A bad value gives one line that names the option, and exit status 2."""
    status: int | str | None
    try:
        status = main(["serve", "--socket", str(path), f"{option}={bad}"])
    except SystemExit as exc:
        status = exc.code
    out, err = capfd.readouterr()
    assert (status, out) == (USAGE, "")
    assert re.fullmatch(r"qmpfd[^\n]*: [^\n]+\n", err), err
    assert option in err
    assert not path.exists()


def test_a_bad_value_as_a_process(path: Path) -> None:
    assert "--max-connections" in _fails("--socket", str(path), "--max-connections", "0")


def test_paths_that_cannot_be_used(path: Path, tmp_path: Path) -> None:
    for bad in (Path("/"), tmp_path, tmp_path / "none" / "q.sock", tmp_path / ("x" * 256)):
        assert str(bad) in _fails("--socket", str(bad))
    path.write_text("precious")
    assert "is not a socket" in _fails("--socket", str(path))
    assert path.read_text() == "precious"
    assert str(path) in _fails(env={"QMPFD_SOCKET": str(path)})


async def test_a_live_daemon_is_in_the_way(path: Path) -> None:
    with daemon_process(path):
        assert f"{path}: a daemon is already listening" in _fails("--socket", str(path))
        with await Wire.session(path) as wire:
            assert value(await wire.call("query-name")) == {}


# -- options -----------------------------------------------------------------------------------


async def test_default_socket(tmp_path: Path) -> None:
    named, runtime = tmp_path / "named.sock", tmp_path / "qmpfd.sock"
    for path, env in [
        (named, {"QMPFD_SOCKET": str(named), "XDG_RUNTIME_DIR": str(tmp_path)}),
        (runtime, {"QMPFD_SOCKET": "", "XDG_RUNTIME_DIR": str(tmp_path)}),
    ]:
        with daemon_process(path, named=False, env=env), await Wire.session(path) as wire:
            assert value(await wire.call("query-name")) == {}


async def test_options_reach_the_daemon(path: Path) -> None:
    other = path.with_name("other.sock")
    options = ["--socket", str(other), "--dialect", "qemu", "--max-connections", "2"]
    options += ["--socket-mode", "640", "--max-request-bytes", "2000"]
    with daemon_process(path, *options), Pipe() as pipe:
        assert path.stat().st_mode & 0o7777 == other.stat().st_mode & 0o7777 == 0o640
        with await Wire.session(path) as one, await Wire.session(other) as two:
            assert value(await one.call("add-fd", {"fdset-id": 7}, [pipe]))["fdset-id"] == 7
            assert len(value(await two.call("query-fdsets"))) == 1
            too_long = await one.call("add-fd", {"opaque": "x" * 3000})
            assert "limit exceeded" in too_long["error"]["desc"]
            with await Wire.connect(path) as three:
                [output] = await three.rest()
                assert "the limit is 2" in output["error"]["desc"]


# -- --add-fd ----------------------------------------------------------------------------------


async def test_add_fd(path: Path) -> None:
    """Descriptors of --add-fd are stored before the first client is served, in order; the daemon
    has one descriptor for each.
    """
    with pipes(4) as made:
        a, b, c, unused = [pipe.fileno() for pipe in made]
        options = [f"fd={a},set=5", f"fd={b},set=0,opaque=x,,y=z", f"fd={c},set=5,opaque="]
        options += [f"set=9,fd={a}"]
        words = [word for option in options for word in ("--add-fd", option)]
        with daemon_process(path, *words, pass_fds=[a, b, c, unused]):
            for pipe in made:
                pipe.release()
            with await Wire.session(path) as wire:
                sets = value(await wire.call("query-fdsets"))
                assert [fdset["fdset-id"] for fdset in sets] == [9, 5, 0]
                opaques = [[fd.get("opaque") for fd in fdset["fds"]] for fdset in sets]
                assert opaques == [[None], [None, ""], ["x,y=z"]]
                assert all(pipe.held() for pipe in made[:3])
                await wire.call("remove-fd", {"fdset-id": 5})
                assert [pipe.held() for pipe in made[:3]] == [True, True, False]
                await wire.call("remove-fd", {"fdset-id": 9})
                await wire.call("remove-fd", {"fdset-id": 0})
                assert not any(pipe.held() for pipe in made[:3])


def test_add_fd_that_was_not_passed(path: Path) -> None:
    """A number that was not inherited: closed, or one of the interpreter, with close-on-exec."""
    with Pipe() as pipe:
        output = _fails("--socket", str(path), "--add-fd", f"fd={pipe.fileno()},set=0")
        assert f"this process has not inherited descriptor {pipe.fileno()}" in output
        passed = pipe.fileno()
        words = ["--add-fd", f"fd={passed},set=0", "--add-fd", "fd=900,set=0"]
        assert "descriptor 900" in _fails("--socket", str(path), *words, pass_fds=[passed])
    assert not path.exists()


# -- its streams -------------------------------------------------------------------------------


def test_without_standard_streams(path: Path) -> None:
    """With closed standard streams, no socket gets the number of one."""
    command = 'exec "$0" -m qmpfd serve --socket "$1" <&- >&- 2>&-'
    with subprocess.Popen(["sh", "-c", command, sys.executable, path], cwd=ROOT) as daemon:
        try:
            while not path.exists():
                assert daemon.poll() is None
                time.sleep(0.01)
            for number in range(3):
                assert os.readlink(f"/proc/{daemon.pid}/fd/{number}") == os.devnull
        finally:
            daemon.terminate()
        assert daemon.wait(PATIENCE) == 0


def test_the_hint_on_a_terminal(path: Path) -> None:
    """On a terminal the log says how to end the daemon; for a service manager it does not."""
    master, slave = os.openpty()
    command = [sys.executable, "-m", "qmpfd", "serve", "--socket", str(path)]
    with subprocess.Popen(command, cwd=ROOT, stderr=slave, stdin=subprocess.DEVNULL) as daemon:
        os.close(slave)
        shown = b""
        while b"Ctrl-C" not in shown:
            shown += os.read(master, 1 << 12)
        daemon.send_signal(signal.SIGINT)
        assert daemon.wait(PATIENCE) == 0
    os.close(master)
    assert f"listening on {path}" in shown.decode()
    with daemon_process(path) as process:
        pass
    assert not any("Ctrl-C" in line for line in process.log)
