"""``qmpfd exec``: a command inherits descriptors from fd sets."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from helpers import PATIENCE, ROOT, Pipe

from qmpfd.client.blocking import BlockingClient

from .command import NO_DAEMON, REFUSED, SHOW, USAGE, Cli, shown

NOT_EXECUTABLE, NOT_FOUND = 126, 127


@pytest.mark.parametrize(
    "words, numbers",
    [
        (["0"], {3}),
        (["0", "0"], {3, 4}),
        (["0:r", "0:rw", "0"], {3, 4, 5}),
        (["0=3"], {3}),
        (["0=7"], {7}),
        (["0=4", "0"], {3, 4}),
        (["0", "0=3"], {3, 4}),
        (["0=5", "0=4", "0=3", "0=6"], {3, 4, 5, 6}),
        (["0=100", "0=3"], {3, 100}),
    ],
)
def test_no_other_descriptors_are_inherited(
    cli: Cli, file: Path, words: list[str], numbers: set[int]
) -> None:
    """CMD has the descriptors at the given numbers, and no others of the process."""
    with Pipe() as pipe:
        number = pipe.fileno()
        out = cli.done("exec", *words, "--", *SHOW, pass_fds=[number])
        assert shown(out) == dict.fromkeys(numbers, str(file))


def test_by_set_and_access_mode(cli: Cli, tmp_path: Path) -> None:
    """Descriptors by fd set and access mode, at numbers that make all of them move."""
    for n in range(6):
        (tmp_path / str(n)).write_text(str(n))
        cli.add(tmp_path / str(n), os.O_RDONLY if n % 2 else os.O_RDWR, n // 2 if n % 2 else None)
    out = cli.done("exec", "2:r=3", "1:rw=4", "0:r=5", "2:rw=6", "1:r", "0:rw", "--", *SHOW)
    names = ["5", "2", "1", "4", "3", "0"]
    assert shown(out) == {n + 3: str(tmp_path / name) for n, name in enumerate(names)}


@pytest.mark.usefixtures("file")
@pytest.mark.parametrize("access", ["r", "rdonly"])
def test_as_standard_input(cli: Cli, access: str) -> None:
    assert cli.done("exec", f"0:{access}=0", "--", "cat") == "content\n"


def test_as_standard_output_and_error(cli: Cli, file: Path) -> None:
    cli.add(file, os.O_WRONLY | os.O_APPEND, 0)
    assert cli.done("exec", "0:w=1", "0:w=2", "--", "sh", "-c", "echo out; echo err >&2") == ""
    assert file.read_text() == "content\nout\nerr\n"


def test_the_same_open_file_description(cli: Cli, file: Path) -> None:
    """A second command continues at the file position of the first."""
    file.write_text("first\nsecond\n")
    read = ["sh", "-c", "read line <&3 && echo $line"]
    # dash reads a byte at a time, and so not beyond the line.
    assert cli.done("exec", "0:r", "--", *read) == "first\n"
    assert cli.done("exec", "0:r", "--", *read) == "second\n"


@pytest.mark.usefixtures("file")
def test_the_highest_number_there_is(cli: Cli) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))

    assert shown(cli.done("exec", "0=63", "--", *SHOW, preexec_fn=limit)).keys() == {63}
    output = cli.fails(USAGE, "exec", "0=64", "--", "true", preexec_fn=limit)
    assert "0 to 63" in output


@pytest.mark.usefixtures("file")
@pytest.mark.parametrize("closed", ["0", "1", "2", "012"])
def test_with_closed_standard_streams(cli: Cli, closed: str) -> None:
    """With closed standard streams, no other descriptor gets their numbers."""
    look = "import os; ns = [n for n in range(9) if os.path.exists(f'/proc/self/fd/{n}')]; "
    look += "os.write(9, repr(ns).encode())"
    argv = cli.argv("exec", "0:r=5", "1:w=9", "--", sys.executable, "-I", "-c", look)
    program = "import os, sys\n"
    program += f"for n in {[*map(int, closed)]}: os.close(n)\n"
    program += f"os.execv({argv[0]!r}, {argv!r})\n"
    reader, writer = os.pipe2(os.O_CLOEXEC)
    try:
        with BlockingClient(cli.path, PATIENCE) as client:
            client.execute("add-fd", None, [writer])
        ran = subprocess.run(
            [sys.executable, "-c", program],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=PATIENCE,
            check=False,
        )
        assert ran.returncode == 0
        stored = [n for n in (0, 1, 2) if str(n) not in closed]
        assert json.loads(os.read(reader, 100)) == [*stored, 5]
    finally:
        os.close(reader)
        os.close(writer)


@pytest.mark.usefixtures("file")
@pytest.mark.parametrize("status", [0, 1, 2, 42, 255])
def test_the_exit_status_is_the_commands(cli: Cli, status: int) -> None:
    ran = cli("exec", "0", "--", "sh", "-c", f"exit {status}")
    assert (ran.returncode, ran.stdout, ran.stderr) == (status, "", "")


@pytest.mark.usefixtures("file")
def test_json_leaves_the_output_to_the_command(cli: Cli) -> None:
    assert cli.done("exec", "--json", "0", "--", "echo", "text") == "text\n"


@pytest.mark.usefixtures("file")
def test_more_targets_than_descriptors(cli: Cli) -> None:
    words = ["0"] * 30 + ["--", "true"]
    limit = partial(resource.setrlimit, resource.RLIMIT_NOFILE, (30, 30))
    ran = cli("exec", *words, preexec_fn=limit)
    assert ran.returncode == USAGE
    assert ran.stderr == "qmpfd: =32: a descriptor's number is from 0 to 29 here (ulimit -n)\n"


@pytest.mark.usefixtures("file")
def test_the_commands_arguments_are_unchanged(cli: Cli) -> None:
    """CMD's arguments are passed unchanged: options, dashes, empty ones."""
    out = cli.done("exec", "0", "--", "printf", "%s|", "--", "-x", "--socket", "", "a b", "0:r=3")
    assert out == "--|-x|--socket||a b|0:r=3|"


@pytest.mark.usefixtures("file")
@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGPIPE]
)
def test_signals_reach_it(cli: Cli, number: signal.Signals) -> None:
    """CMD replaces the process of qmpfd, and no signal is ignored."""
    program = "echo here; exec cat"
    process = subprocess.Popen(
        cli.argv("exec", "0", "--", "sh", "-c", program),
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"here\n"
        process.send_signal(number)
        assert process.wait(PATIENCE) == -number


@pytest.mark.usefixtures("file")
def test_a_handler_of_its_own(cli: Cli) -> None:
    # Not Python's signal.pause(): a signal just before it would not end the pause.
    program = "trap 'exit 7' TERM; echo here; while :; do sleep 0.1; done"
    process = subprocess.Popen(
        cli.argv("exec", "0", "--", "sh", "-c", program),
        cwd=ROOT,
        stdout=subprocess.PIPE,
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"here\n"
        process.terminate()
        assert process.wait(PATIENCE) == 7


@pytest.mark.usefixtures("file")
def test_no_signal_is_ignored(cli: Cli) -> None:
    """SIGPIPE, which Python ignores, is not ignored in CMD: ``yes | head`` must end."""
    out = cli.done("exec", "0", "--", "grep", "SigIgn", "/proc/self/status")
    mask = int(out.split()[1], 16)
    ignored = {number for number in range(1, 65) if mask & 1 << (number - 1)}
    assert not ignored & {signal.SIGPIPE, signal.SIGXFSZ}


@pytest.mark.usefixtures("file")
def test_no_such_command(cli: Cli, tmp_path: Path) -> None:
    """Exit status 127, as of a shell (POSIX, sh, 2.8.2)."""
    output = cli.fails(NOT_FOUND, "exec", "0", "--", "no-such-command")
    assert "no-such-command" in output
    assert "No such file" in cli.fails(NOT_FOUND, "exec", "0", "--", tmp_path / "no\nsuch")
    cli.fails(NOT_FOUND, "exec", "0", "--", "")


@pytest.mark.usefixtures("file")
def test_not_executable(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no program")
    assert "Permission denied" in cli.fails(NOT_EXECUTABLE, "exec", "0", "--", tmp_path / "text")
    (tmp_path / "text").chmod(0o700)
    cli.fails(NOT_EXECUTABLE, "exec", "0", "--", tmp_path / "text")
    cli.fails(NOT_EXECUTABLE, "exec", "0", "--", tmp_path)


def test_the_error_goes_to_nobody_elses_file(cli: Cli, file: Path) -> None:
    """With standard error closed, the error is not written into a descriptor at number 2."""
    argv = cli.argv("exec", "0:rw", "--", "no-such-command")
    program = f"import os; os.close(2); os.execv({argv[0]!r}, {argv!r})"
    ran = subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=PATIENCE, check=False)
    assert ran.returncode != 0
    assert file.read_text() == "content\n"


@pytest.mark.usefixtures("file")
def test_its_status_does_not_depend_on_who_reads_the_error(cli: Cli) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as pipe:
        ran = subprocess.run(
            cli.argv("exec", "0", "--", "no-such-command"),
            cwd=ROOT,
            stderr=pipe,
            timeout=PATIENCE,
            check=False,
        )
    assert ran.returncode == NOT_FOUND


@pytest.mark.usefixtures("file")
@pytest.mark.parametrize(
    "status, words, text",
    [
        (USAGE, ["0"], "TARGET... -- CMD"),
        (USAGE, ["--", "true"], "TARGET... -- CMD"),
        (USAGE, ["0", "--"], "TARGET... -- CMD"),
        (USAGE, ["0", "true"], "'true': the fd set id is a whole number"),
        (USAGE, ["x", "--", "true"], "'x': the fd set id is a whole number"),
        (USAGE, ["-1", "--", "true"], ""),
        (USAGE, ["0:x", "--", "true"], "r, w or rw"),
        (USAGE, ["0:", "--", "true"], "r, w or rw"),
        (USAGE, ["0=", "--", "true"], "a descriptor's number"),
        (USAGE, ["0=-1", "--", "true"], "a descriptor's number"),
        (USAGE, ["0=x", "--", "true"], "a descriptor's number"),
        (USAGE, ["0=99999999999", "--", "true"], "the descriptor is a whole number"),
        (USAGE, ["0=3", "0:r=3", "--", "true"], "same number"),
        (REFUSED, ["7", "--", "true"], "FdNotFound: File descriptor named 'fdset-id:7' not found"),
        (REFUSED, ["0", "7", "--", "true"], "'fdset-id:7'"),
        (REFUSED, ["0:w", "--", "true"], "only 'rdonly', 'rdwr'"),
    ],
)
def test_usage(cli: Cli, status: int, words: list[str], text: str) -> None:
    assert text in cli.fails(status, "exec", *words)


def test_add_fd_then_exec(cli: Cli) -> None:
    """A descriptor that the shell has opened is added by number, and passed to a program."""
    with Pipe() as pipe:
        number = pipe.fileno()
        inode = os.fstat(number).st_ino
        cli.done("add", "--fd", number, "--opaque", "inherited", pass_fds=[number])
        pipe.release()
        assert pipe.held()
        program = "import os, sys; sys.exit(os.fstat(9).st_ino % 256)"
        ran = cli("exec", "0:w=9", "--", sys.executable, "-c", program)
        assert ran.returncode == inode % 256
        cli.done("rm", 0)
        assert not pipe.held()


def test_no_daemon(path: Path) -> None:
    Cli(path).fails(NO_DAEMON, "exec", "0", "--", "true")
