"""The verbs that hand descriptors on: exec, push, watch; and what goes with them."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from conformance.peers import Wire as QemuWire
from conformance.peers import start_qemu
from helpers import PATIENCE, ROOT, Pipe, daemon_thread

from qmpfd.client.blocking import BlockingClient

DONE, REFUSED, USAGE, NO_DAEMON = range(4)
NOT_EXECUTABLE, NOT_FOUND = 126, 127

#: As a user has it: output to a pipe or file is buffered.
ENV = {name: text for name, text in os.environ.items() if name != "PYTHONUNBUFFERED"}

#: Prints the numbers of its open descriptors and what they are; its own listing's is closed.
SHOW_PROGRAM = """
import json, os
found = {}
for number in os.listdir("/proc/self/fd"):
    try:
        found[number] = os.readlink(f"/proc/self/fd/{number}")
    except OSError:
        pass
print(json.dumps(found))
"""
SHOW = [sys.executable, "-c", SHOW_PROGRAM]


class Cli:
    """The command line as a process."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def argv(self, verb: str, *words: object) -> list[str]:
        """How it is started."""
        command = [sys.executable, "-m", "qmpfd", verb, "--socket", str(self.path)]
        return [*command, *map(str, words)]

    def __call__(
        self, verb: str, *words: object, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run it to its end."""
        options = {"stdin": subprocess.DEVNULL, "env": ENV, **options}
        return subprocess.run(
            self.argv(verb, *words),
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
            **options,
        )

    def done(self, verb: str, *words: object, **options: Any) -> str:
        """What it says when it succeeds."""
        ran = self(verb, *words, **options)
        assert (ran.returncode, ran.stderr) == (DONE, "")
        return ran.stdout

    def fails(self, status: int, verb: str, *words: object, **options: Any) -> str:
        """What it says when it fails so: one line."""
        ran = self(verb, *words, **options)
        assert (ran.returncode, ran.stdout) == (status, ""), ran
        assert re.fullmatch(r"qmpfd[^\n]*: [^\n]+\n", ran.stderr), ran.stderr
        return ran.stderr

    def add(self, file: Path, flags: int, fdset_id: int | None = None, **more: object) -> int:
        """Open *file* and add it; its number in the daemon."""
        number = os.open(file, flags | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            with BlockingClient(self.path, PATIENCE) as client:
                members = {**more, **({} if fdset_id is None else {"fdset-id": fdset_id})}
                return int(client.execute("add-fd", members, [number])["fd"])
        finally:
            os.close(number)


@pytest.fixture
def cli(path: Path) -> Iterator[Cli]:
    """With a daemon that runs."""
    with daemon_thread(path):
        yield Cli(path)


@pytest.fixture
def file(cli: Cli, tmp_path: Path) -> Path:
    """A file that is in set 0, first to read and then to read and write."""
    found = tmp_path / "file"
    found.write_text("content\n")
    cli.add(found, os.O_RDONLY)
    cli.add(found, os.O_RDWR, 0)
    return found


# -- exec --------------------------------------------------------------------------------------


def shown(out: str) -> dict[int, str]:
    """What SHOW printed, without the standard streams."""
    return {int(n): link for n, link in json.loads(out).items() if int(n) > 2}


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
def test_exactly_these(cli: Cli, file: Path, words: list[str], numbers: set[int]) -> None:
    """At these numbers, whatever else was open here: the connection, what was inherited."""
    with Pipe() as pipe:
        number = pipe.fileno()
        out = cli.done("exec", *words, "--", *SHOW, pass_fds=[number])
        assert shown(out) == dict.fromkeys(numbers, str(file))


def test_the_one_asked_for(cli: Cli, tmp_path: Path) -> None:
    """By set and access mode, each at its own number, though all of them have to move."""
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
    """One command goes on where the other stopped."""
    file.write_text("first\nsecond\n")
    read = ["sh", "-c", "read line <&3 && echo $line"]
    # dash reads a byte at a time, so as not to take what is another's.
    assert cli.done("exec", "0:r", "--", *read) == "first\n"
    assert cli.done("exec", "0:r", "--", *read) == "second\n"


@pytest.mark.usefixtures("file")
def test_the_highest_number_there_is(cli: Cli) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))

    assert shown(cli.done("exec", "0=63", "--", *SHOW, preexec_fn=limit)).keys() == {63}
    said = cli.fails(USAGE, "exec", "0=64", "--", "true", preexec_fn=limit)
    assert "0 to 63" in said


@pytest.mark.usefixtures("file")
@pytest.mark.parametrize("closed", ["0", "1", "2", "012"])
def test_with_closed_standard_streams(cli: Cli, closed: str) -> None:
    """Nothing of ours takes their place."""
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
        kept = [n for n in (0, 1, 2) if str(n) not in closed]
        assert json.loads(os.read(reader, 100)) == [*kept, 5]
    finally:
        os.close(reader)
        os.close(writer)


@pytest.mark.usefixtures("file")
@pytest.mark.parametrize("status", [0, 1, 2, 42, 255])
def test_its_exit_status(cli: Cli, status: int) -> None:
    ran = cli("exec", "0", "--", "sh", "-c", f"exit {status}")
    assert (ran.returncode, ran.stdout, ran.stderr) == (status, "", "")


@pytest.mark.usefixtures("file")
def test_its_own_arguments(cli: Cli) -> None:
    """As they are: options, dashes, nothing at all."""
    out = cli.done("exec", "0", "--", "printf", "%s|", "--", "-x", "--socket", "", "a b", "0:r=3")
    assert out == "--|-x|--socket||a b|0:r=3|"


@pytest.mark.usefixtures("file")
@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGPIPE]
)
def test_signals_reach_it(cli: Cli, number: signal.Signals) -> None:
    """It is the process that was started; and none is ignored on its way there."""
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
    # Not Python's signal.pause(): a signal that comes just before it is not seen in there.
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
    """What Python ignores for itself, it must not hand down: ``yes | head`` has to end."""
    out = cli.done("exec", "0", "--", "grep", "SigIgn", "/proc/self/status")
    mask = int(out.split()[1], 16)
    ignored = {number for number in range(1, 65) if mask & 1 << (number - 1)}
    assert not ignored & {signal.SIGPIPE, signal.SIGXFSZ}


@pytest.mark.usefixtures("file")
def test_no_such_command(cli: Cli, tmp_path: Path) -> None:
    """As a shell answers (POSIX, sh, 2.8.2)."""
    said = cli.fails(NOT_FOUND, "exec", "0", "--", "no-such-command")
    assert "no-such-command" in said
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
    """With no standard error, its number must not be the file's when the error is written."""
    argv = cli.argv("exec", "0:rw", "--", "no-such-command")
    program = f"import os; os.close(2); os.execv({argv[0]!r}, {argv!r})"
    ran = subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=PATIENCE, check=False)
    assert ran.returncode != 0
    assert file.read_text() == "content\n"


@pytest.mark.usefixtures("file")
@pytest.mark.parametrize(
    "status, words, text",
    [
        (USAGE, ["0"], "TARGET... -- CMD"),
        (USAGE, ["--", "true"], "TARGET... -- CMD"),
        (USAGE, ["0", "--"], "TARGET... -- CMD"),
        (USAGE, ["0", "true"], "'true' is no fd set id"),
        (USAGE, ["x", "--", "true"], "'x' is no fd set id"),
        (USAGE, ["-1", "--", "true"], ""),
        (USAGE, ["0:x", "--", "true"], "r, w or rw"),
        (USAGE, ["0:", "--", "true"], "r, w or rw"),
        (USAGE, ["0=", "--", "true"], "a descriptor's number"),
        (USAGE, ["0=-1", "--", "true"], "a descriptor's number"),
        (USAGE, ["0=x", "--", "true"], "a descriptor's number"),
        (USAGE, ["0=99999999999", "--", "true"], "is no descriptor"),
        (USAGE, ["0=3", "0:r=3", "--", "true"], "same number"),
        (REFUSED, ["7", "--", "true"], "FdNotFound: File descriptor named 'fdset-id:7' not found"),
        (REFUSED, ["0", "7", "--", "true"], "'fdset-id:7'"),
        (REFUSED, ["0:w", "--", "true"], "only 'rdonly', 'rdwr'"),
    ],
)
def test_usage(cli: Cli, status: int, words: list[str], text: str) -> None:
    assert text in cli.fails(status, "exec", *words)


def test_nobody_there(path: Path) -> None:
    Cli(path).fails(NO_DAEMON, "exec", "0", "--", "true")
    Cli(path).fails(NO_DAEMON, "push", "0", "--to", "/nowhere")
    Cli(path).fails(NO_DAEMON, "watch")


# -- push --------------------------------------------------------------------------------------


def test_push(cli: Cli, file: Path, tmp_path: Path) -> None:
    """All of a set, the oldest first, with their texts, and nothing is removed here."""
    cli.add(file, os.O_WRONLY, 0, opaque="o\u20ac")
    to = tmp_path / "other.sock"
    with daemon_thread(to):
        there = Cli(to)
        out = cli.done("push", 0, "--to", to)
        assert re.fullmatch(rf"fd set 0 of {to}: fd \d+, \d+, \d+\n", out)
        described = json.loads(there.done("ls", "--long", "--json"))
        assert [fd["access"] for fd in described] == ["rdonly", "rdwr", "wronly"]
        assert {fd["target"] for fd in described} == {str(file)}
        assert [fd.get("opaque") for fd in described] == [None, None, "o\u20ac"]
        again = json.loads(cli.done("push", 0, "--to", to, "--fdset", 0, "--json"))
        assert again["fdset-id"] == 0
        assert [fd.get("opaque") for fd in again["fds"]] == [None, None, "o\u20ac"]
        assert all(isinstance(fd["fd"], int) for fd in again["fds"])
        [fdset] = json.loads(there.done("ls", "--json"))
        assert fdset["fds"][3:] == [dict(sorted(fd.items())) for fd in again["fds"]]
        assert len(json.loads(cli.done("ls", "--json"))[0]["fds"]) == 3


def test_push_what_cannot_be(cli: Cli, file: Path, tmp_path: Path) -> None:
    to = tmp_path / "other.sock"
    with daemon_thread(to):
        assert "'fdset-id:7' not found" in cli.fails(REFUSED, "push", 7, "--to", to)
        assert "existing" in cli.fails(REFUSED, "push", 0, "--to", to, "--fdset", 7)
        assert Cli(to).done("ls", "--json") == "[]\n"
    assert str(to) in cli.fails(NO_DAEMON, "push", 0, "--to", to)
    cli.fails(NO_DAEMON, "push", 0, "--to", file)
    cli.fails(USAGE, "push", 0)
    cli.fails(USAGE, "push", "x", "--to", to)
    cli.fails(USAGE, "push", 0, "--to", to, "--fdset", "x")


def qmp(wire: QemuWire, command: str, arguments: Any = None) -> Any:
    """Carry out a command of a QEMU; what it returns."""
    request = {"execute": command, **({"arguments": arguments} if arguments else {})}
    [line] = wire.call(json.dumps(request).encode())
    reply = json.loads(line)
    assert "return" in reply, reply
    return reply["return"]


@pytest.mark.qemu
def test_push_to_qemu(cli: Cli, tmp_path: Path) -> None:
    """QEMU opens the image that it could not have named, to read and to write, and closes it."""
    image = tmp_path / "disk.img"
    image.write_bytes(b"boot sector".ljust(1 << 20, b"\0"))
    cli.add(image, os.O_RDONLY, opaque="rdonly:disk")
    cli.add(image, os.O_RDWR, 0, opaque="rdwr:disk")
    image.unlink()
    # Who watches over the machine is connected all the time: QEMU up to 9.0 drops what nobody has
    # opened when its last monitor connection ends.
    with start_qemu(2) as qemu, qemu.session(1) as wire:
        ran = cli("push", 0, "--to", qemu.paths[0], "--fdset", 5, "--json")
        assert json.loads(ran.stdout)["fdset-id"] == 5
        with BlockingClient(qemu.paths[0], PATIENCE) as sink:
            version = sink.greeting["version"]["qemu"]
        forgets = (version["major"], version["minor"]) <= (9, 0)
        assert ("--hold stays connected" in ran.stderr) == forgets
        [fdset] = qmp(wire, "query-fdsets")
        assert fdset["fdset-id"] == 5
        assert [fd["opaque"] for fd in fdset["fds"]] == ["rdonly:disk", "rdwr:disk"]
        for read_only in (True, False):
            node = {"driver": "file", "node-name": "disk", "filename": "/dev/fdset/5"}
            qmp(wire, "blockdev-add", {**node, "read-only": read_only})
            [block] = qmp(wire, "query-named-block-nodes")
            assert (block["node-name"], block["ro"]) == ("disk", read_only)
            assert block["image"]["virtual-size"] == 1 << 20
            qmp(wire, "blockdev-del", {"node-name": "disk"})


@pytest.mark.qemu
def test_qemu_has_none_of_ours() -> None:
    """What only qmpfd can do fails on a QEMU with its own words, and no traceback."""
    with start_qemu(2) as qemu:
        other = Cli(Path(qemu.paths[0]))
        text = "CommandNotFound: The command open-fdset has not been found"
        assert text in other.fails(REFUSED, "exec", "0", "--", "true")
        assert text in other.fails(REFUSED, "push", 0, "--to", qemu.paths[1])
        assert "watch-fdsets" in other.fails(REFUSED, "watch")
        assert "query-fds" in other.fails(REFUSED, "ls", "--long")
        assert "open-fdset" in other.fails(REFUSED, "exec", "@web", "--", "true")


# -- watch -------------------------------------------------------------------------------------


@contextmanager
def watching(cli: Cli, *words: str) -> Iterator[Any]:
    """``qmpfd watch``, as a process."""
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
                # It says nothing before there is something to say.
                while not any(
                    each["name"] == "watch-fdsets"
                    for each in client.execute("query-stats")["commands"]
                ):
                    assert process.poll() is None
            yield process
        finally:
            process.kill()


def test_watch(cli: Cli, tmp_path: Path) -> None:
    """Each event is there when it happens, though it goes into a pipe."""
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
    """One line each."""
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
    """``qmpfd watch | head -1``: it ends with the next event, and says nothing."""
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


# -- ls --long, add --fd -----------------------------------------------------------------------


def test_ls_long(cli: Cli, tmp_path: Path) -> None:
    name = "file\x1b[31m"
    cli.add(tmp_path / name, os.O_RDWR, opaque="o")
    with Pipe() as pipe, BlockingClient(cli.path, PATIENCE) as client:
        terms = {"lifetime": "connection", "expires": 90, "watch-hangup": True}
        client.execute("add-fds", {"fdset-id": 0, **terms}, [pipe])
        header, first, second = cli.done("ls", "--long").splitlines()
        columns = "FDSET FD ACCESS KIND SIZE AGE KEPT PID UID NAME TARGET"
        assert header.split() == columns.split()
        one = dict(zip(header.split(), first.split(), strict=True))
        assert (one["ACCESS"], one["KIND"], one["KEPT"], one["NAME"]) == (
            "rdwr",
            "file",
            "-",
            "o",
        )
        assert one["PID"] == str(os.getpid())
        assert one["UID"] == str(os.geteuid())
        assert one["TARGET"] == f"{tmp_path}/file\\x1b[31m"
        two = dict(zip(header.split(), second.split(), strict=True))
        assert (two["ACCESS"], two["KIND"], two["NAME"]) == ("wronly,nonblock", "pipe", "-")
        assert re.fullmatch(r"connection,1m(30|29|28)s,hangup", two["KEPT"])
        assert cli.done("ls", "-l").splitlines()[0] == header
        described = json.loads(cli.done("ls", "--long", "--json"))
        assert described[0]["target"] == f"{tmp_path}/{name}"
        assert described[1]["watch-hangup"] is True


def test_ls_long_of_nothing(cli: Cli) -> None:
    assert cli.done("ls", "--long") == "no fd sets\n"
    assert cli.done("ls", "--long", "--json") == "[]\n"


def test_add_fd_then_exec(cli: Cli) -> None:
    """What the shell opened goes in by number, and comes out in another program."""
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
