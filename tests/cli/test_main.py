"""The short verbs, run in this process with a daemon in a thread, and once each as a process.

Tests of cli/add.py, cli/rm.py, cli/exit_codes.py and cli/options.py.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from helpers import PATIENCE, ROOT, Pipe, daemon_process, daemon_thread

from qmpfd.cli import main

from .command import DONE, NO_DAEMON, REFUSED, USAGE, run, run_on_full_disk

SHORT = ("--timeout", "0.2")


class Cli:
    """The command line, in this process."""

    def __init__(self, path: Path, capfd: pytest.CaptureFixture[str]) -> None:
        self.path = path
        self._capfd = capfd

    def __call__(self, verb: str, *words: object, at: bool = True) -> tuple[int, str, str]:
        """Run a verb; return its exit status, standard output and standard error."""
        argv = [verb, *(["--socket", str(self.path)] if at else []), *map(str, words)]
        self._capfd.readouterr()
        status: int | str | None
        try:
            status = main(argv)
        except SystemExit as exc:  # argparse
            status = exc.code
        assert isinstance(status, int)
        return status, *self._capfd.readouterr()

    def done(self, verb: str, *words: object) -> str:
        """Run a verb that must succeed; return its output."""
        status, out, err = self(verb, *words)
        assert (status, err) == (DONE, "")
        return out

    def json(self, verb: str, *words: object) -> Any:
        """Run a verb with ``--json``; return the value of its one line."""
        out = self.done(verb, "--json", *words)
        assert out.count("\n") == 1
        assert out.isascii()
        return json.loads(out)

    def fails(self, status: int, verb: str, *words: object, at: bool = True) -> str:
        """Run a verb that must fail with *status* and one line; return that line."""
        found, out, err = self(verb, *words, at=at)
        assert (found, out) == (status, "")
        assert re.fullmatch(r"qmpfd[^\n]*: [^\n]+\n", err), err
        assert "Traceback" not in err
        return err


@pytest.fixture
def cli(path: Path, capfd: pytest.CaptureFixture[str]) -> Cli:
    return Cli(path, capfd)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    found = tmp_path / "file"
    found.write_text("content")
    return found


# -- success -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("running")
def test_add_ls_rm(cli: Cli, file: Path) -> None:
    assert cli.done("ls") == "no fd sets\n"
    assert cli.json("ls") == []
    assert re.fullmatch(r"fd set 0, fd \d+\n", cli.done("add", file))
    info = cli.json("add", "--fdset", 0, "--opaque", "b:\u20ac\n", file)
    assert info["fdset-id"] == 0
    [fdset] = cli.json("ls")
    assert fdset["fdset-id"] == 0
    assert fdset["fds"][1] == {"fd": info["fd"], "opaque": "b:\u20ac\n"}
    header, *rows = cli.done("ls").splitlines()
    assert header.split() == ["FDSET", "FD", "NAME"]
    assert rows[1].split() == ["0", str(info["fd"]), "b:\u20ac\\n"]
    assert cli.done("rm", f"0/{info['fd']}") == f"removed fd set 0, fd {info['fd']}\n"
    assert cli.json("rm", "0") == [{"fdset-id": 0}]
    assert cli.json("ls") == []


@pytest.mark.usefixtures("running")
@pytest.mark.parametrize(
    "mode, flags", [(None, os.O_RDONLY), ("r", os.O_RDONLY), ("w", os.O_WRONLY), ("rw", os.O_RDWR)]
)
def test_add_opens_in_the_mode(cli: Cli, file: Path, mode: str | None, flags: int) -> None:
    info = cli.json("add", *(["--mode", mode] if mode else []), file)
    # The daemon is a thread of this process: its descriptor numbers are valid here.
    text = Path(f"/proc/self/fdinfo/{info['fd']}").read_text()
    found = re.search(r"^flags:\s*(\d+)$", text, re.MULTILINE)
    assert found is not None
    status_flags = int(found[1], 8)
    assert status_flags & os.O_ACCMODE == flags
    assert not status_flags & os.O_NONBLOCK
    assert file.read_text() == "content"


@pytest.mark.usefixtures("running")
def test_add_of_an_inherited_descriptor(cli: Cli) -> None:
    with Pipe() as pipe:
        cli.json("add", "--fd", pipe.fileno())
        pipe.release()
        assert pipe.held()
        cli.done("rm", "0")
        assert not pipe.held()


@pytest.mark.usefixtures("running")
def test_add_of_a_fifo_does_not_wait(cli: Cli, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    cli.done("add", tmp_path / "fifo")


# -- errors ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("running")
def test_refused(cli: Cli, file: Path) -> None:
    output = cli.fails(REFUSED, "rm", "7")
    assert output == (
        "qmpfd: FdNotFound: File descriptor named 'fdset-id:7' not found "
        "(qmpfd ls lists the stored descriptors)\n"
    )
    assert "fdset-id:7, fd:3" in cli.fails(REFUSED, "rm", "7/3")
    assert "existing fdset-id" in cli.fails(REFUSED, "add", "--fdset", "7", file)
    assert cli.json("ls") == []


@pytest.mark.usefixtures("running")
@pytest.mark.parametrize(
    "words",
    [
        ["add"],
        ["add", "/no/such/file"],
        ["add", "--mode", "w", "/"],
        ["add", "--mode", "x", "/dev/null"],
        ["add", "--fd", "1000"],
        ["add", "--fd", "-1"],
        ["add", "--fd", "x"],
        ["add", "--fd", "99999999999999999999"],
        ["add", "--fd", "0", "/dev/null"],
        ["add", "--fd", "0", "--mode", "r"],
        ["add", "--fdset", "-1", "/dev/null"],
        ["add", "--fdset", "9223372036854775808", "/dev/null"],
        ["add", "--fdset", "99999999999999999999", "/dev/null"],
        ["add", "--opaque", "\udcff", "/dev/null"],
        ["add", "no\nsuch\nfile"],
        ["rm"],
        ["rm", ""],
        ["rm", "x"],
        ["rm", "0:"],
        ["rm", "0:x"],
        ["rm", "-1"],
        ["rm", "99999999999999999999"],
        ["rm", "0/99999999999999999999"],
        ["rm", "0/"],
        ["rm", "0:r"],
        ["rm", "@"],
        ["rm", "--all", "0"],
        ["rm", "--pid", "0"],
        ["ls", "more"],
        ["ls", "two\nlines"],
        ["ls", "--no-such-option"],
        ["ls", "--timeout", "0"],
        ["ls", "--timeout", "-1"],
        ["ls", "--timeout", "nan"],
        ["ls", "--timeout", "inf"],
        ["ls", "--timeout", "soon"],
        ["ls", "--socket", ""],
        ["ls", "--socket", "a\0b"],
    ],
    ids=" ".join,
)
def test_usage(cli: Cli, words: list[str]) -> None:
    cli.fails(USAGE, *words)
    assert cli.json("ls") == []


def test_usage_without_a_verb(cli: Cli) -> None:
    cli.fails(USAGE, "no-such-verb", at=False)
    cli.fails(USAGE, "--no-such-option", at=False)


@pytest.mark.usefixtures("running")
@pytest.mark.parametrize("timeout", ["1e-9", "1e9", "1e18", "1e300"])
def test_any_time_is_a_timeout(cli: Cli, timeout: str) -> None:
    status, _, err = cli("ls", "--timeout", timeout)
    assert status in (DONE, NO_DAEMON if timeout == "1e-9" else DONE, USAGE)
    assert err.count("\n") == (status != DONE)


# -- no daemon, or one that does not answer ----------------------------------------------------


def test_no_daemon(cli: Cli, path: Path, file: Path) -> None:
    for verb in (["ls"], ["add", file], ["rm", "0"]):
        assert "qmpfd serve" in cli.fails(NO_DAEMON, *map(str, verb))
    path.write_text("no socket")
    cli.fails(NO_DAEMON, "ls")
    path.unlink()
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(os.fspath(path))
    cli.fails(NO_DAEMON, "ls")
    cli.path = path / ("x" * 200)
    cli.fails(NO_DAEMON, "ls")


@contextmanager
def _listening(path: Path, backlog: int = 5) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(os.fspath(path))
        listener.listen(backlog)
        yield listener


def _does_not_answer(cli: Cli) -> None:
    """Check that a verb fails soon after --timeout."""
    start = time.monotonic()
    assert "does not answer" in cli.fails(NO_DAEMON, "ls", *SHORT)
    assert 0.2 <= time.monotonic() - start < 5


def test_silent_daemon(cli: Cli, path: Path) -> None:
    with _listening(path):
        _does_not_answer(cli)


def test_full_backlog(cli: Cli, path: Path) -> None:
    with _listening(path, 0), ExitStack() as stack, suppress(BlockingIOError):
        while True:
            client = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            client.setblocking(False)
            try:
                client.connect(os.fspath(path))
            except BlockingIOError:
                _does_not_answer(cli)
                start = time.monotonic()
                cli.fails(NO_DAEMON, "ls", "--timeout", "1e-7")  # not 0, no timeout
                assert time.monotonic() - start < 5
                return


def test_stopped_daemon(cli: Cli, path: Path) -> None:
    with daemon_process(path) as process:
        process.signal(signal.SIGSTOP)
        _does_not_answer(cli)
        process.signal(signal.SIGCONT)
        assert cli.done("ls") == "no fd sets\n"


@contextmanager
def _saying(path: Path, *pieces: bytes) -> Iterator[None]:
    """Run a server that sends the next of *pieces* for each request, and then closes."""

    def serve() -> None:
        client, _ = listener.accept()
        with client:
            for piece in pieces:
                client.sendall(piece)
                client.recv(1 << 16)

    with _listening(path) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield
        finally:
            thread.join(PATIENCE)


GREETING = b'{"QMP": {"version": {}, "capabilities": []}}\r\n'


@pytest.mark.parametrize(
    "status, pieces",
    [
        (NO_DAEMON, [b"220 smtp.example.org\r\n"]),
        (NO_DAEMON, [b"\0\xff\n"]),
        (NO_DAEMON, []),
        (NO_DAEMON, [GREETING]),
        (NO_DAEMON, [GREETING, b'{"return": {}, "id": 1}\r\n']),
        (NO_DAEMON, [GREETING, b'{"return": {}, "id": 1}\r\n', b'{"return": [}\r\n']),
        (REFUSED, [b'{"error": {"class": "GenericError", "desc": "Too many"}}\r\n']),
        (REFUSED, [GREETING, b'{"error": {"class": "A", "desc": "two\\nlines"}, "id": 1}\r\n']),
    ],
)
def test_odd_servers(cli: Cli, path: Path, status: int, pieces: Sequence[bytes]) -> None:
    with _saying(path, *pieces):
        cli.fails(status, "ls", "--timeout", "1")  # one line never ends


@pytest.mark.parametrize("version", ["{}", "[]", '{"qemu": 7}', '{"package": "\\u001b[31m"}'])
def test_status_of_an_odd_server(cli: Cli, path: Path, version: str) -> None:
    reply = f'{{"return": {version}, "id": 2}}\r\n'
    with _saying(path, GREETING, b'{"return": {}, "id": 1}\r\n', reply.encode()):
        shown = cli.done("status")
    assert "QEMU" in shown
    assert "\x1b" not in shown


@pytest.mark.parametrize(
    "reply", ["5", "null", "{}", '[{"fdset-id": {}, "fds": [5]}]', '{"fdset-id": 1e999, "fd": []}']
)
@pytest.mark.parametrize(
    "words", ["ls -l", "rm --all", "rm @x", "add /dev/null", "exec --take 0 -- true", "push 0 --to"]
)
def test_a_reply_that_the_command_does_not_have(
    cli: Cli, path: Path, tmp_path: Path, words: str, reply: str
) -> None:
    text = [GREETING, b'{"return": {}, "id": 1}\r\n', b'{"return": %s, "id": 2}\r\n']
    text[-1] %= reply.encode()
    with _saying(path, *text), daemon_thread(tmp_path / "other"):
        arguments = [*words.split(), tmp_path / "other"] if words.endswith("to") else words.split()
        status, _, output = cli(*arguments)
    assert status in (DONE, NO_DAEMON)  # rm ignores the value
    assert status == DONE or output.startswith("qmpfd: ")


@pytest.mark.parametrize("verb", ["ls", "rm --all", "rm @*", "completion fish -- 'qmpfd rm '"])
def test_control_characters_of_a_server(
    cli: Cli, path: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    """Whatever a reply says instead of numbers and names, no control character is printed."""
    odd = r'"a\u001b[31m\n"'
    sets = f'[{{"fdset-id": {odd}, "fds": [{{"fd": {odd}, "opaque": {odd}}}]}}]'
    output = [GREETING, b'{"return": {}, "id": 1}\r\n']
    output += [f'{{"return": {sets}, "id": 2}}\r\n'.encode()]
    output += [b'{"return": {}, "id": 3}\r\n'] if verb.startswith("rm") else []
    monkeypatch.setenv("QMPFD_SOCKET", str(path))
    with _saying(path, *output):
        status, shown, error = cli(*shlex.split(verb), at=False)
    assert (status, error) == (DONE, "")
    assert r"a\x1b[31m\n" in shown or verb.startswith("completion")
    assert all(line.isprintable() for line in shown.splitlines())


def test_what_was_removed_before_an_error(cli: Cli, path: Path) -> None:
    sets = b'{"return": [{"fdset-id": 8, "fds": [{"fd": 3}]}, {"fdset-id": 7, "fds": [{"fd": 4}]}]'
    output = [
        GREETING,
        b'{"return": {}, "id": 1}\r\n',
        sets + b', "id": 2}\r\n',
        b'{"return": {}, "id": 3}\r\n',
        b'{"error": {"class": "PermissionDenied", "desc": "no"}, "id": 4}\r\n',
    ]
    with _saying(path, *output):
        status, shown, error = cli("rm", "--all")
    assert (status, shown) == (REFUSED, "removed fd set 8\n")
    assert error.startswith("qmpfd: PermissionDenied: no")
    path.unlink()
    with _saying(path, *output[:-1]):  # then closes the connection
        assert cli("rm", "--all")[:2] == (NO_DAEMON, "removed fd set 8\n")


@pytest.mark.parametrize("error_class", ["FdNotFound", "GenericError"])
@pytest.mark.parametrize("target, shown", [("--all", "8\n"), ("@*", "8, fd 4  y\n")])
def test_what_another_client_has_removed_meanwhile(
    cli: Cli, path: Path, target: str, shown: str, error_class: str
) -> None:
    sets = '{"fdset-id": 9, "fds": [{"fd": 3, "opaque": "x"}]}, '
    sets += '{"fdset-id": 8, "fds": [{"fd": 4, "opaque": "y"}]}'
    gone = f"""{{"class": "{error_class}", "desc": "File descriptor named 'x' not found"}}"""
    output = [
        GREETING,
        b'{"return": {}, "id": 1}\r\n',
        f'{{"return": [{sets}], "id": 2}}\r\n'.encode(),
        f'{{"error": {gone}, "id": 3}}\r\n'.encode(),
        b'{"return": {}, "id": 4}\r\n',
    ]
    with _saying(path, *output):
        assert cli.done("rm", target) == f"removed fd set {shown}"


def test_a_refusal_does_not_end_the_removal_of_all(cli: Cli, path: Path) -> None:
    sets = b'{"return": [{"fdset-id": 9, "fds": []}, {"fdset-id": 8, "fds": []}], "id": 2}\r\n'
    output = [
        GREETING,
        b'{"return": {}, "id": 1}\r\n',
        sets.replace(b"[]", b'[{"fd": 3}]'),
        b'{"error": {"class": "PermissionDenied", "desc": "no"}, "id": 3}\r\n',
        b'{"return": {}, "id": 4}\r\n',
    ]
    with _saying(path, *output):
        status, shown, error = cli("rm", "--all")
    assert (status, shown) == (REFUSED, "removed fd set 8\n")
    assert error.startswith("qmpfd: PermissionDenied: no")


@pytest.mark.usefixtures("running")
def test_rm_of_missing_sets_prints_nothing(cli: Cli) -> None:
    assert cli("rm", "98", "99")[:2] == (REFUSED, "")


# -- the path of the socket --------------------------------------------------------------------


def test_default_socket(path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    named, runtime = path.with_name("named.sock"), path.with_name("qmpfd.sock")
    monkeypatch.setenv("QMPFD_SOCKET", str(named))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime.parent))
    assert f" {named}:" in cli.fails(NO_DAEMON, "ls", at=False)
    monkeypatch.delenv("QMPFD_SOCKET")
    assert f" {runtime}:" in cli.fails(NO_DAEMON, "ls", at=False)
    with daemon_thread(runtime):
        assert cli("ls", at=False) == (DONE, "no fd sets\n", "")
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    if not Path("/run/qmpfd.sock").exists():
        assert " /run/qmpfd.sock:" in cli.fails(NO_DAEMON, "ls", at=False)


# -- as processes ------------------------------------------------------------------------------


def _run(
    path: Path, *words: str, status: int = DONE, pass_fds: Sequence[int] = ()
) -> tuple[str, str]:
    ran = run(*words, "--socket", os.fspath(path), pass_fds=pass_fds)
    assert ran.returncode == status, ran
    return ran.stdout, ran.stderr


@pytest.mark.usefixtures("running")
def test_each_verb_as_a_process(path: Path, file: Path) -> None:
    assert json.loads(_run(path, "add", "--json", str(file))[0])["fdset-id"] == 0
    assert len(json.loads(_run(path, "ls", "--json")[0])) == 1
    with Pipe() as pipe:
        number = pipe.fileno()
        _run(path, "add", "--fd", str(number), "--fdset", "0", pass_fds=[number])
        pipe.release()
        assert pipe.held()
        assert _run(path, "rm", "0") == ("removed fd set 0\n", "")
        assert not pipe.held()
    assert _run(path, "rm", "0", status=REFUSED)[1].count("\n") == 1
    assert _run(path.with_name("none"), "ls", status=NO_DAEMON)[1].count("\n") == 1
    assert _run(path, "rm", status=USAGE)[1].count("\n") == 1


@pytest.mark.usefixtures("running")
def test_short_verbs_do_without_trio(path: Path, file: Path) -> None:
    """Nor do they import pathlib, which takes an eighth of the time of ``qmpfd ls``."""
    script = (
        "import sys; from qmpfd.cli import main\n"
        f"for words in (['add', {str(file)!r}], ['ls'], ['ls', '--json'], ['rm', '0']):\n"
        f"    assert main([*words, '--socket', {str(path)!r}]) == 0\n"
        "assert not {'trio', 'msgspec', 'pathlib'} & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, timeout=PATIENCE)


@pytest.mark.usefixtures("running")
def test_nobody_reads_the_output(path: Path) -> None:
    """A write error gives one line of error; a closed pipe gives none."""
    command = [sys.executable, "-m", "qmpfd", "ls", "--socket", os.fspath(path)]
    with open("/dev/full", "w") as full:
        ran = subprocess.run(
            command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, timeout=PATIENCE, check=False
        )
    assert ran.returncode != DONE
    assert ran.stderr.count(b"\n") == 1, ran.stderr
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as pipe:
        ran = subprocess.run(
            command, cwd=ROOT, stdout=pipe, stderr=subprocess.PIPE, timeout=PATIENCE, check=False
        )
    assert ran.returncode != DONE
    assert ran.stderr == b""


@pytest.mark.usefixtures("running")
@pytest.mark.parametrize(
    "words", ["help", "--help", "--version", "add --help", "ls --json", "status", "status --json"]
)
def test_the_disk_is_full(path: Path, words: str) -> None:
    """A full disk (/dev/full) gives one line of error."""
    env = {**os.environ, "QMPFD_SOCKET": str(path)}
    ran = run_on_full_disk([sys.executable, "-m", "qmpfd", *words.split()], env=env)
    assert (ran.returncode, ran.stderr) == (REFUSED, "qmpfd: No space left on device\n")


def _limited(limit: str, *words: str) -> tuple[int, str]:
    """Run a verb with a limit of prlimit(1); return its exit status and errors."""
    script = (
        "import sys, threading, qmpfd.client.blocking\n"
        "from resource import RLIMIT_NOFILE, setrlimit\n"
        "from qmpfd.cli import main\n"
        f"{limit}\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    command = [sys.executable, "-c", script, *words]
    with open("/dev/null", "w") as null:
        ran = subprocess.run(
            command,
            cwd=ROOT,
            stdout=null,
            stderr=subprocess.PIPE,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
    return ran.returncode, ran.stderr


@pytest.mark.usefixtures("running")
def test_a_process_that_may_open_nothing(path: Path) -> None:
    output = _limited(
        "import argparse, encodings.idna, qmpfd.cli.status, qmpfd.cli.ls; "
        "setrlimit(RLIMIT_NOFILE, (3, 3))",
        "ls",
        "--socket",
        str(path),
    )
    assert output == (REFUSED, "qmpfd: Too many open files\n")


@pytest.mark.usefixtures("running")
def test_a_process_that_may_start_no_thread(path: Path) -> None:
    """No thread can be started, for want of memory for its stack."""
    words = ["shell", "--socket", str(path), "-c", "query-name"]
    output = _limited("threading.stack_size(1 << 46)", *words)
    assert output == (REFUSED, "qmpfd: can't start new thread (ulimit -u)\n")


@pytest.mark.usefixtures("running")
@pytest.mark.parametrize(
    "words, status",
    [
        ("ls --socket /nowhere", NO_DAEMON),
        ("check-policy /nowhere", USAGE),
        ("rm 7", REFUSED),
        ("ls --nothing", USAGE),
        ("exec 0 -- true", REFUSED),
        ("ls 7 8", REFUSED),
        ("rm 7 8", REFUSED),
        ("ls", DONE),
    ],
)
def test_the_status_does_not_depend_on_standard_error(path: Path, words: str, status: int) -> None:
    with open("/dev/full", "w") as full:
        ran = subprocess.run(
            [sys.executable, "-m", "qmpfd", *words.split()],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=full,
            timeout=PATIENCE,
            check=False,
            env={**os.environ, "QMPFD_SOCKET": str(path)},
        )
    assert ran.returncode == status


@pytest.mark.usefixtures("running")
@pytest.mark.parametrize("closed", ["0", "1", "2", "1 2", "0 1 2"])
def test_closed_streams(path: Path, closed: str) -> None:
    """Output to a closed stream is not written into another descriptor with its number."""

    def run(verb: str) -> subprocess.CompletedProcess[str]:
        redirections = " ".join(f"{number}>&-" for number in closed.split())
        command = f'exec "$0" -m qmpfd {verb} {redirections}'
        return subprocess.run(
            ["sh", "-c", command, sys.executable],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
            env={**os.environ, "QMPFD_SOCKET": str(path)},
        )

    assert run("add /dev/null").returncode == DONE
    for verb in ("ls", "ls --long", "ls --json", "status", "shell -c query-name", "--help"):
        ran = run(verb)
        assert ran.returncode == DONE
        assert ran.stderr == ""
        assert bool(ran.stdout) == ("1" not in closed)
    ran = run("rm 7")
    assert (ran.returncode, ran.stdout) == (REFUSED, "")
    assert bool(ran.stderr) == ("2" not in closed)
    assert run(f"add --fd {closed[0]}").returncode == USAGE
    assert run("exec 0 -- /nowhere").returncode == 127


@pytest.mark.usefixtures("running")
@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_any_encoding(path: Path, file: Path, encoding: str) -> None:
    """Characters that the encoding lacks are written as escapes."""
    _run(path, "add", str(file), "--opaque", "\u6f22 \x1b[31m\u202e")
    for verb in (["ls"], ["ls", "--long"], ["shell", "-c", "query-fdsets"]):
        ran = subprocess.run(
            [sys.executable, "-m", "qmpfd", *verb, "--socket", str(path)],
            cwd=ROOT,
            capture_output=True,
            timeout=PATIENCE,
            check=True,
            env={**os.environ, "PYTHONIOENCODING": encoding},
        )
        assert ran.stderr == b""
        shown = ran.stdout.decode(encoding)
        assert ("\u6f22" if encoding == "utf-8" else r"\u6f22") in shown
        assert "\x1b" not in shown
        assert "\u202e" not in shown


# -- interrupts --------------------------------------------------------------------------------

#: Program that sends itself SIGINT at the import of the module $AT, or at the end.
_INTERRUPTS_ITSELF = """
import atexit, os, signal, sys

class Interrupts:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == os.environ["AT"]:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupts)
if os.environ["AT"] == "end":
    atexit.register(os.kill, os.getpid(), signal.SIGINT)
"""


@pytest.mark.parametrize(
    "at, status",
    [
        ("qmpfd.cli.main", -signal.SIGINT),
        ("qmpfd.protocol.client", -signal.SIGINT),
        ("qmpfd.cli.check_policy", 130),
        ("end", -signal.SIGINT),
    ],
)
@pytest.mark.parametrize("ignored", [False, True])
def test_interrupted_at_any_time(tmp_path: Path, at: str, status: int, ignored: bool) -> None:
    """SIGINT gives no traceback; background jobs, which ignore it, continue (POSIX, sh, 2.11)."""
    (tmp_path / "sitecustomize.py").write_text(_INTERRUPTS_ITSELF)
    (tmp_path / "policy").touch()
    ran = run(
        "check-policy",
        str(tmp_path / "policy"),
        env={**os.environ, "PYTHONPATH": str(tmp_path), "AT": at},
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.SIG_IGN if ignored else signal.SIG_DFL
        ),
    )
    assert (ran.returncode, ran.stderr) == (DONE if ignored else status, "")


# -- values ------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", ["1_0", "+10", " 10", "10 ", "\u0661\u0660", "9" * 5000])
def test_what_only_python_takes_for_a_number(cli: Cli, path: Path, number: str) -> None:
    for words in (
        ["ls", number],
        ["rm", f"0/{number}"],
        ["rm", "--pid", number],
        ["exec", f"0={number}", "--", "true"],
        ["add", "--fd", number],
        ["add", "--listen", f"127.0.0.1:{number}"],
        ["serve", "--max-fds", number],
        ["serve", "--add-fd", f"fd={number},set=0"],
    ):
        status, shown, error = cli(words[0], *words[1:])
        assert (status, shown, error.count("\n")) == (USAGE, "", 1), words


@pytest.mark.parametrize("number", ["1_0", " 10", "\u0661", "0o600", "infinity"])
def test_what_only_python_takes_for_a_time_or_a_mode(cli: Cli, number: str) -> None:
    cli.fails(USAGE, "ls", "--timeout", number)
    cli.fails(USAGE, "status", "--wait", number)
    cli.fails(USAGE, "serve", "--idle-timeout", number)
    cli.fails(USAGE, "serve", "--socket-mode", number)


def test_columns_without_end(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "9" * 5000)
    assert cli.done("ls", "--help").startswith("usage: ")
