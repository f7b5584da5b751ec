"""``qmpfd shell``: its input, from a script and on a terminal.

Tests of cli/shell/prompt.py, cli/shell/schema.py, cli/shell/session.py and cli/shell/syntax.py.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conformance.peers import qemu_at
from helpers import PATIENCE, ROOT

from qmpfd.cli import main
from qmpfd.cli.exit_codes import UsageError
from qmpfd.cli.shell.schema import Schema
from qmpfd.cli.shell.syntax import Passed, parse, unfinished
from qmpfd.client.blocking import BlockingClient
from qmpfd.commands import TABLE
from qmpfd.commands.schema import schema
from qmpfd.errors import GenericError

from .command import DONE, NO_DAEMON, REFUSED, run, run_on_full_disk

SCHEMA = Schema(schema(TABLE))


# -- parsing -----------------------------------------------------------------------------------


def arguments_of(text: str) -> dict[str, Any]:
    return parse(text, SCHEMA.convert).arguments


@pytest.mark.parametrize(
    "text, found",
    [
        ("add-fd", {}),
        ("add-fd opaque=x", {"opaque": "x"}),
        ("add-fd opaque=5", {"opaque": "5"}),
        ("add-fd fdset-id=5", {"fdset-id": 5}),
        ("add-fd fdset-id=five", {"fdset-id": "five"}),
        ("add-fd opaque=", {"opaque": ""}),
        ("add-fd opaque=a=b", {"opaque": "a=b"}),
        ('add-fd opaque="it\'s"', {"opaque": "it's"}),
        ("add-fd opaque='a b'", {"opaque": "a b"}),
        ("add-fd opaque='a '\"b\"'<'\\ c", {"opaque": "a b< c"}),
        ("watch-fdsets enable=on", {"enable": True}),
        ("watch-fdsets enable=false", {"enable": False}),
        ("open-fdset access=rdwr", {"access": "rdwr"}),
        ("other n=5 s=five", {"n": 5, "s": "five"}),
        ("other a.b=1 a.c=[1, 2]", {"a": {"b": 1, "c": [1, 2]}}),
        ('other a={"b": "} \\"<"} c=d', {"a": {"b": '} "<'}, "c": "d"}),
        ("other a=[1,2] b='[1, 2]'", {"a": [1, 2], "b": [1, 2]}),
        ('other a=\'{"b": "} "}\'', {"a": {"b": "} "}}),
        ('{"execute": "x", "arguments": {"a": 1}}', {"a": 1}),
        ('{"execute": "x"}', {}),
    ],
)
def test_arguments(text: str, found: dict[str, Any]) -> None:
    assert arguments_of(text) == found


def test_descriptors() -> None:
    typed = parse("add-fd < a <>b --fd 5 --fd=6 > 'c d' >>e", SCHEMA.convert)
    creating = os.O_CREAT
    assert typed.passed == [
        Passed("a", os.O_RDONLY),
        Passed("b", os.O_RDWR | creating),
        Passed(number=5),
        Passed(number=6),
        Passed("c d", os.O_WRONLY | creating | os.O_TRUNC),
        Passed("e", os.O_WRONLY | creating | os.O_APPEND),
    ]
    assert parse('{"execute": "add-fd"} < a', SCHEMA.convert).passed == [Passed("a")]


def test_an_id_is_kept() -> None:
    typed = parse('{"execute": "x", "id": null}', SCHEMA.convert)
    assert typed.id == {"id": None}
    assert parse('{"execute": "x"}', SCHEMA.convert).id == {}


@pytest.mark.parametrize(
    "text, why",
    [
        ("add-fd x", "'x' is neither"),
        ("add-fd =x", "'=x' is neither"),
        ("add-fd <", "< needs a file name"),
        ("add-fd --fd", "--fd needs"),
        ("add-fd --fd x", "--fd needs"),
        ("add-fd --fd 99999999999", "--fd needs"),
        ("add-fd opaque=1 opaque=2", "'opaque' is given twice"),
        ("other a=1 a.b=2", "'a' is given twice"),
        ("other a=[1}]", "not JSON"),
        ("other a=[1", "not JSON"),
        ("other a='1", "the quoting is wrong"),
        ('{"execute": "x"', "not JSON"),
        ("{'execute': 'x'}", "not JSON"),
        ('{"execute": 1}', "looks like this"),
        ('{"arguments": {}}', "looks like this"),
        ('{"execute": "x", "exec": 1}', "no member 'exec'"),
        ('{"execute": "x"} a=1', "'a=1' is neither"),
    ],
)
def test_what_is_no_command(text: str, why: str) -> None:
    with pytest.raises(UsageError, match=why.replace("(", r"\(")):
        parse(text, SCHEMA.convert)


def test_where_another_line_follows() -> None:
    whole = '{"execute": "x", "arguments": {"a": ["}", "\\""]}}'
    for cut in range(1, len(whole)):
        assert unfinished(whole[:cut])
    for text in (whole, f"{whole} < b", '{"execute": x', "other a='1", "[", "{" * 10_000):
        assert not unfinished(text)


# -- the schema --------------------------------------------------------------------------------


def test_every_command_is_known() -> None:
    assert SCHEMA.commands() == sorted(TABLE.commands)
    for name, command in TABLE.commands.items():
        assert SCHEMA.help(name).split()[0] == name
        assert ("< FILE" in SCHEMA.help(name)) == (command.fds > 0)


@pytest.mark.parametrize(
    "before, found",
    [
        ("add", ["add-fd", "add-fds"]),
        ("help clo", ["closefd"]),
        ("remove-fd ", ["fdset-id=", "fd="]),
        ("remove-fd fdset-id=1 ", ["fd="]),
        ("open-fdset access=rd", ["access=rdonly", "access=rdwr"]),
        ("watch-fdsets enable=", ["enable=true", "enable=false"]),
        ("add-fd --", ["--fd"]),
        ("no-such x", []),
        ("open-fdset other=", []),
        ('{"execute": "clo', ['"closefd"']),
    ],
)
def test_completion(before: str, found: list[str]) -> None:
    completed = [text.rpartition(" ")[2] for text, _ in SCHEMA.complete(before)]
    assert completed == found


def test_completion_of_files(tmp_path: Path) -> None:
    (tmp_path / "disk[1].img").touch()
    assert SCHEMA.complete(f"add-fd < {tmp_path}/disk[") == [(f"{tmp_path}/disk[1].img", "")]


# -- as a script -------------------------------------------------------------------------------


def shell(path: Path, *words_: str) -> list[str]:
    return [sys.executable, "-m", "qmpfd", "shell", "--socket", os.fspath(path), *words_]


def script(path: Path, text: str, *words_: str) -> subprocess.CompletedProcess[str]:
    return run("shell", "--socket", os.fspath(path), *words_, input=text)


@pytest.mark.usefixtures("running")
def test_commands_from_a_pipe(path: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("content")
    ran = script(
        path,
        f"add-fd opaque='the file' < {tmp_path}/file\n"
        "# a comment with a [\n\n"
        '{"execute": "query-fdsets",\n "id": [1]}\n'
        "remove-fd fdset-id=7\n"
        "open-fdset fdset-id=0\n"
        "remove-fd fdset-id=0\n",
        "--json",
    )
    added, listed, refused, opened, removed = map(json.loads, ran.stdout.splitlines())
    assert listed["id"] == [1]
    fds = [{"fd": added["return"]["fd"], "opaque": "the file"}]
    assert listed["return"] == [{"fdset-id": 0, "fds": fds}]
    assert refused["error"]["class"] == "FdNotFound"
    assert len(opened["fds"]) == 1
    assert removed == {"return": {}}
    assert ran.stderr == (
        "qmpfd: line 6: FdNotFound: File descriptor named 'fdset-id:7' not found\n"
    )
    assert ran.returncode == REFUSED


@pytest.mark.usefixtures("running")
def test_what_was_done_is_said_where_the_output_fails(path: Path) -> None:
    ran = run_on_full_disk(shell(path, "-c", "add-fd < /dev/null"))
    assert ran.returncode == REFUSED
    assert 'the output failed; this was done: {"fdset-id": 0, "fd": ' in ran.stderr


@pytest.mark.usefixtures("running")
def test_what_was_handed_out_can_be_passed_on(
    path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    ran = script(path, "add-fd < /dev/null\nopen-fdset fdset-id=0\nhelp add-fd\nexit\nnonsense\n")
    assert (ran.returncode, ran.stderr) == (DONE, "")
    assert "passes it on)" in ran.stdout
    number = ran.stdout.partition("descriptor ")[2].partition(":")[0]
    again = script(path, f"open-fdset fdset-id=0\nadd-fd --fd {number}\n")
    assert (again.returncode, again.stderr) == (DONE, "")


@pytest.mark.usefixtures("running")
def test_commands_as_words(path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    at = ["shell", "--socket", str(path)]
    assert main([*at, "-c", "query-name", "-c", "help"]) == DONE
    out, err = capfd.readouterr()
    assert out.startswith("{}\n")
    assert "query-qmp-schema" in out
    assert err == ""
    unsendable = ["a b=[NaN]", "a b=1e999", '{"execute": "a", "arguments": {"b": "\\ud800"}}']
    for text in ("add-fd --fd 999", "add-fd < /nonexistent", "help nonesuch", "a b", *unsendable):
        assert main([*at, "-c", text]) == REFUSED
        out, err = capfd.readouterr()
        assert out == ""
        assert err.startswith("qmpfd: command 1: ")
        assert err.count("\n") == 1


@pytest.mark.usefixtures("running")
def test_bytes_that_no_one_meant(path: Path) -> None:
    """Any bytes from a pipe give no traceback."""
    lines = [b"\xff\xfe", b"add-fd opaque=\xff < /dev/null", b"add-fd < a\x00b", b"[[[", b"\x1b"]
    for line in [*lines, b"add-fd " * 1000, b'{"execute": "x", "id": ' + b"[" * 5000]:
        ran = subprocess.run(
            shell(path), cwd=ROOT, input=line, capture_output=True, timeout=PATIENCE, check=False
        )
        assert (ran.returncode, ran.stdout) == (REFUSED, b""), line
        assert ran.stderr.startswith(b"qmpfd: line 1: "), line
        assert ran.stderr.count(b"\n") == 1, line


@pytest.mark.usefixtures("running")
def test_a_request_of_many_lines(path: Path) -> None:
    request = {"execute": "query-name", "id": list(range(50_000))}
    ran = script(path, json.dumps(request, indent=0), "--json")
    assert (ran.returncode, ran.stderr) == (DONE, "")
    assert json.loads(ran.stdout) == {"return": {}, "id": request["id"]}


def test_no_daemon(path: Path) -> None:
    ran = script(path, "query-name\n")
    assert (ran.returncode, ran.stdout) == (NO_DAEMON, "")
    assert ran.stderr.count("\n") == 1


@pytest.mark.usefixtures("running")
def test_a_script_does_not_outlive_its_connection(path: Path) -> None:
    ran = script(path, "quit\nquery-name\n", "--json")
    assert ran.stdout == '{"return": {}}\n'
    assert ran.returncode == NO_DAEMON
    assert ran.stderr.count("\n") == 1
    assert not path.exists()


@pytest.mark.usefixtures("running")
def test_events_are_shown_as_they_come(path: Path) -> None:
    process = subprocess.Popen(
        shell(path, "--json"), cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with process, BlockingClient(path, PATIENCE) as other:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("watch-fdsets enable=true\n")
        process.stdin.flush()
        assert json.loads(process.stdout.readline()) == {"return": {}}
        info = other.execute("add-fd", {}, [0])
        event = json.loads(process.stdout.readline())
        assert event.pop("timestamp") > 1e9
        assert event == {"event": "FD_ADDED", "data": info}
        process.stdin.close()
        assert process.wait(PATIENCE) == DONE


@pytest.mark.usefixtures("running")
def test_nobody_reads_the_events_any_more(path: Path) -> None:
    """The thread that shows them ends without a word; the next command ends the verb."""
    process = subprocess.Popen(
        shell(path),
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process, BlockingClient(path, PATIENCE) as other:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdin.write("watch-fdsets enable=true\nhelp query-name\n")
        process.stdin.flush()
        assert process.stdout.readline() == "{}\n"
        while not process.stdout.readline().startswith("returns"):
            assert process.poll() is None
        process.stdout.close()
        other.execute("add-fd", {}, [0])
        while len(os.listdir(f"/proc/{process.pid}/task")) > 1:
            assert process.poll() is None
        process.stdin.write("query-name\n")
        process.stdin.close()
        assert process.wait(PATIENCE) == 128 + signal.SIGPIPE
        assert process.stderr.read() == ""


@pytest.mark.qemu
def test_a_real_qemu(path: Path) -> None:
    with qemu_at(path) as start:
        process = start()
        ran = script(path, "add-fd opaque=x --fd 2\nquery-fdsets\nhelp blockdev-add\nquit\n")
        assert (ran.returncode, ran.stderr) == (DONE, "")
        assert process.wait(PATIENCE) == 0
    assert '"opaque": "x"' in ran.stdout
    assert "\n  node-name " in ran.stdout


# -- on a terminal -----------------------------------------------------------------------------


class Terminal:
    """A shell that runs on a pseudo-terminal."""

    def __init__(self, master: int, process: subprocess.Popen[bytes]) -> None:
        self._master = master
        self.process = process
        self.seen = b""

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def until(self, text: str) -> None:
        """Read the output up to *text*, and drop it."""
        while text.encode() not in self.seen:
            data = os.read(self._master, 4096)
            if b"\x1b[6n" in data:  # query of the cursor position
                os.write(self._master, b"\x1b[1;1R")
            self.seen += data
        self.seen = self.seen.partition(text.encode())[2]


@contextmanager
def terminal(path: Path, home: Path, *, plain: bool) -> Iterator[Terminal]:
    env = {**os.environ, "XDG_STATE_HOME": str(home), "TERM": "xterm", "PYTHONPATH": str(ROOT)}
    if plain:
        (home / "prompt_toolkit.py").write_text("raise ImportError\n")
        env["PYTHONPATH"] += f":{home}"
    else:
        pytest.importorskip("prompt_toolkit")
    master, slave = os.openpty()
    termios.tcsetwinsize(master, (24, 80))
    try:
        process = subprocess.Popen(
            shell(path), cwd=home, env=env, stdin=slave, stdout=slave, stderr=slave
        )
    finally:
        os.close(slave)
    ended = threading.Timer(PATIENCE, process.kill)  # makes a hanging read fail
    ended.start()
    try:
        with process:
            yield Terminal(master, process)
            process.kill()
    finally:
        ended.cancel()
        ended.join()
        os.close(master)


@pytest.mark.usefixtures("running")
@pytest.mark.parametrize("plain", [False, True], ids=["prompt_toolkit", "readline"])
def test_on_a_terminal(path: Path, tmp_path: Path, plain: bool) -> None:
    with terminal(path, tmp_path, plain=plain) as shown, BlockingClient(path, PATIENCE) as other:
        shown.until("Ctrl-D leaves")
        shown.until("qmp>")
        shown.type("query-vers\t")
        shown.until("ion")
        shown.type("\r")
        shown.until('"package": "qmpfd')
        shown.until("qmp>")
        shown.type("remove-fd fdset-id=7\r")
        shown.until("FdNotFound: ")
        shown.until("qmp>")
        shown.type('{"execute":\r')
        shown.until("...>")
        shown.type('"query-fdsets"}\r')
        shown.until("[]")
        shown.until("qmp>")
        shown.type("watch-fdsets enable=on\r")
        shown.until("{}")
        shown.until("qmp>")
        other.execute("add-fd", {}, [0])
        shown.until("FD_ADDED")
        shown.type("quit\r")
        shown.until("[y/N]")
        shown.type("n\r")
        shown.until("qmp>")
        shown.type("\x04")
        assert shown.process.wait(PATIENCE) == DONE
    [history] = (tmp_path / "qmpfd").iterdir()
    assert "query-version" in history.read_text()
    assert history.stat().st_mode & 0o077 == 0


@pytest.mark.usefixtures("running")
def test_a_request_that_the_server_cannot_read_is_answered(path: Path) -> None:
    """The error for a request that the server cannot read has no id, and is shown."""
    twice: dict[Any, int] = {1: 0, "1": 0}  # both become the member "1"
    with BlockingClient(path, PATIENCE) as client, pytest.raises(GenericError, match="JSON parse"):
        client.execute("query-name", twice)
