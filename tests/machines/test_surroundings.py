"""The daemon from cron, in the background of a script, from a zip file, with signals blocked, in an
ASCII locale, and as a user without a name.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import zipapp
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers import ROOT, daemon_process
from supervised import children, connected, until

from .containers import DEADLINE, container, run

SUPERVISED = pytest.mark.parametrize("options", [[], ["--supervise"]], ids=["plain", "supervised"])
QMPFD = [sys.executable, "-m", "qmpfd"]

#: Environment of cron (crontab(5)) without HOME, and an empty one.
CRON = ("PATH=/usr/bin:/bin", "SHELL=/bin/sh", "LOGNAME=cron")
NO_ENV: dict[str, str] = {}

#: Environment for a program that brings the package along, but not its libraries.
WITH_LIBRARIES = {**os.environ, "PYTHONPATH": sysconfig.get_path("purelib"), "PYTHONSAFEPATH": "1"}

NAMELESS = 4242


@contextmanager
def script(
    text: str, *words: str, env: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[str]]:
    """Run a shell script with arguments; end it at the end of the block."""
    process = subprocess.Popen(
        ["sh", "-euc", text, "sh", *words],
        cwd=ROOT,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield process
    finally:
        process.terminate()
        process.communicate(timeout=DEADLINE)


def verb(path: Path, *words: str, env: Mapping[str, str] | None = None, text: str = "") -> str:
    """Run a verb that must succeed; return its output and errors."""
    name, *rest = words
    done = subprocess.run(
        [*QMPFD, name, "--socket", str(path), *rest],
        cwd=ROOT,
        env=env,
        input=text,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        timeout=DEADLINE,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@SUPERVISED
def test_the_background_of_a_script(path: Path, options: Sequence[str]) -> None:
    """Background jobs ignore SIGINT and SIGQUIT (POSIX, sh, 2.11); SIGTERM ends the daemon."""
    serve = [*QMPFD, "serve", "--socket", str(path), *options]
    text = 'trap "" INT QUIT; "$@" & daemon=$!; echo $daemon; wait $daemon; echo status $?'
    with script(text, *serve) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        with connected(path) as client:
            client.execute("add-fd", fds=[0])
        os.kill(pid, signal.SIGTERM)
        assert "status 0" in process.communicate(timeout=DEADLINE)[0]
    assert not path.exists()


def test_a_signal_after_all_is_done(path: Path) -> None:
    """A second SIGTERM while the interpreter exits does not change the exit status."""
    program = (
        "import os, signal, sys; from qmpfd.cli.main import main; "
        "status = main(sys.argv[1:]); os.kill(os.getpid(), signal.SIGTERM); sys.exit(status)"
    )
    serve = [sys.executable, "-c", program, "serve", "--socket", str(path)]
    with subprocess.Popen(serve, cwd=ROOT, stderr=subprocess.DEVNULL) as process:
        with connected(path) as client:
            client.execute("query-fdsets")
        process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE) == 0


@SUPERVISED
def test_started_with_signals_blocked(path: Path, options: Sequence[str]) -> None:
    """The signal mask is inherited, for instance from a thread that starts the daemon."""
    block = (
        "import os, signal, sys; signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals()); "
        "os.execvp(sys.argv[1], sys.argv[1:])"
    )
    with daemon_process(path, *options, prefix=[sys.executable, "-c", block]) as process:
        with connected(path) as client:
            client.execute("query-fdsets")
        process.signal(signal.SIGHUP)
        process.await_line(lambda line: "no policy file to read again" in line)
        process.signal(signal.SIGTERM)
        assert process.wait() == 0


@SUPERVISED
def test_signals_that_mean_nothing(path: Path, options: Sequence[str]) -> None:
    """Signals without a meaning for the daemon, such as SIGQUIT and SIGIO, do not end it."""
    mean_something = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL}
    faults = {signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGABRT}
    stops = {signal.SIGSTOP, signal.SIGTSTP}
    others = signal.valid_signals() - mean_something - faults - stops
    others -= {signal.SIGTRAP, signal.SIGSYS}
    with daemon_process(path, *options) as process:
        for number in sorted(others):
            process.signal(number)
        process.await_line(lambda line: "SIGQUIT is ignored: SIGTERM ends the daemon" in line)
        with connected(path) as client:
            client.execute("query-fdsets")
        process.signal(signal.SIGTERM)
        assert process.wait() == 0


def test_cron(path: Path) -> None:
    """The environment is empty, also without HOME."""
    with daemon_process(path, prefix=["env", "-i", *CRON]):
        (path.parent / "file").touch()
        assert "fd set 0" in verb(path, "add", "--name", "a", str(path.parent / "file"), env=NO_ENV)
        assert json.loads(verb(path, "ls", "--json", env=NO_ENV))[0]["fds"][0]["opaque"] == "a"
        assert '"a"' in verb(path, "shell", env=NO_ENV, text="query-fdsets\n")
        assert "a" in verb(path, "exec", "@a=0", "--", "echo", "a", env=NO_ENV)


@pytest.mark.parametrize(
    "locale",
    [{"LC_ALL": "C"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}],
    ids=["C", "ASCII"],
)
def test_a_locale_without_the_signs(path: Path, locale: Mapping[str, str]) -> None:
    name = "d\u00e9j\u00e0 \u20ac"
    with daemon_process(path, env=locale):
        with connected(path) as client:
            client.execute("add-fd", {"opaque": name}, [0])
        output = verb(path, "ls", "--json", env={**os.environ, **locale})
        assert json.loads(output)[0]["fds"][0]["opaque"] == name
        shown = verb(path, "ls", env={**os.environ, **locale})
        assert name in shown.encode().decode("unicode_escape") or name in shown
        assert "qmpfd" in verb(path, "status", env={**os.environ, **locale})


def store_and_crash(path: Path, pid: int, options: Sequence[str]) -> None:
    """Store standard input; with a parent, which *options* asks for, kill its worker."""
    with connected(path) as client:
        client.execute("add-fd", {"opaque": "kept"}, [0])
    if options:
        (worker,) = children(pid)
        os.kill(worker, signal.SIGKILL)


@SUPERVISED
def test_an_argv0_that_is_no_program(path: Path, options: Sequence[str]) -> None:
    """Python does not know its own path then: sys.executable is empty."""
    python = os.path.realpath(sys.executable)
    serve = [python, "-m", "qmpfd", "serve", "--socket", str(path), *options]
    env = {**WITH_LIBRARIES, "PYTHONPATH": f"{WITH_LIBRARIES['PYTHONPATH']}:{ROOT}"}
    process = subprocess.Popen(["bash", "-c", 'exec -a nowhere "$@"', "bash", *serve], env=env)
    try:
        store_and_crash(path, process.pid, options)
        assert json.loads(verb(path, "ls", "--json"))[0]["fds"][0]["opaque"] == "kept"
    finally:
        process.terminate()
        assert process.wait(DEADLINE) == 0


@SUPERVISED
def test_no_bytecode_is_written(path: Path, tmp_path: Path, options: Sequence[str]) -> None:
    package = tmp_path / "package"
    skip = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "qmpfd", package / "qmpfd", ignore=skip)
    env = {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(package), "PYTHONSAFEPATH": "1"}
    with daemon_process(path, *options, env=env):
        assert json.loads(verb(path, "ls", "--json")) == []
    assert not list(package.rglob("__pycache__"))


@SUPERVISED
def test_a_zipapp(path: Path, tmp_path: Path, options: Sequence[str]) -> None:
    """A zipapp of the package alone: a shared library, msgspec's, cannot be in a zip file."""
    package, program = tmp_path / "package", tmp_path / "qmpfd.pyz"
    skip = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "qmpfd", package / "qmpfd", ignore=skip)
    zipapp.create_archive(package, program, sys.executable, "qmpfd.__main__:program")
    serve = [str(program), "serve", "--socket", str(path), *options]
    process = subprocess.Popen(serve, cwd=tmp_path, env=WITH_LIBRARIES, stderr=subprocess.PIPE)
    try:
        store_and_crash(path, process.pid, options)
        listed = [str(program), "ls", "--json", "--socket", str(path)]
        output = subprocess.check_output(listed, cwd=tmp_path, env=WITH_LIBRARIES)
        assert json.loads(output)[0]["fds"][0]["opaque"] == "kept"
    finally:
        process.terminate()
        _, text = process.communicate(timeout=DEADLINE)
    assert process.returncode == 0
    assert b"Traceback" not in text


@pytest.mark.root
@SUPERVISED
def test_a_user_without_a_name(tmp_path: Path, options: Sequence[str]) -> None:
    """The user is not in passwd(5), and has no home; root may connect too, other users may not."""
    folder = tmp_path / "volume"
    folder.mkdir()
    os.chown(folder, NAMELESS, NAMELESS)
    path = folder / "q.sock"
    become = f"exec setpriv --reuid={NAMELESS} --regid={NAMELESS} --clear-groups"
    at = "--socket /run/qmpfd/q.sock"
    serve = f"{become} $QMPFD serve {at} --socket-mode 666 {' '.join(options)}"
    with container(folder, serve) as process:
        until(path.exists, "a socket")
        store_and_crash(path, process.pid, options)
        mine = run(folder, f"{become} $QMPFD ls --json {at}")
        assert json.loads(mine.stdout)[0]["fds"][0]["opaque"] == "kept"
        somebody = become.replace(str(NAMELESS), str(NAMELESS + 1))
        other = run(folder, f"{somebody} $QMPFD ls {at}")
        assert (other.returncode, "PermissionDenied" in other.stderr) == (1, True)
        process.terminate()
        assert process.wait(DEADLINE) == 0
