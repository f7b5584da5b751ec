"""The daemon's log: as text, for the journal, and as JSON.

Tests of kernel/streams.py.
"""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import tty
from collections.abc import Iterator
from io import FileIO, StringIO
from pathlib import Path

import pytest
from helpers import PATIENCE, ROOT, Pipe, Wire, daemon_process, open_fds, pipes, request, value

from qmpfd.cli import logs
from qmpfd.client.blocking import BlockingClient
from qmpfd.kernel.fd import pipe

TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")


async def _some_commands(path: Path) -> int:
    """Send some commands; return the number of the descriptor added."""
    with pipes(1) as made, await Wire.session(path) as wire:
        info = value(await wire.call("add-fd", {"opaque": "x"}, made))
        await wire.call("remove-fd", {"fdset-id": 7})
        value(await wire.call("remove-fd", {"fdset-id": info["fdset-id"]}))
        wire.send(b"]")
        await wire.reply()
        return int(info["fd"])


async def test_nothing_for_each_command_by_default(path: Path) -> None:
    with daemon_process(path) as process:
        await _some_commands(path)
        process.signal(signal.SIGTERM)
        process.wait()
    assert process.log == [
        f"qmpfd: listening on {path}",
        "qmpfd: SIGTERM: stopping after the received requests",
    ]


async def test_every_command_where_that_is_asked_for(path: Path) -> None:
    with daemon_process(path, "--log-level", "debug") as process:
        await _some_commands(path)
        process.signal(signal.SIGTERM)
        process.wait()
    who = f"qmpfd: pid {os.getpid()}, uid {os.getuid()}: "
    assert process.log[1:-1] == [
        f"{who}qmp_capabilities: done",
        f"{who}add-fd: done",
        f"{who}remove-fd: File descriptor named 'fdset-id:7' not found",
        f"{who}remove-fd: done",
        f"{who}bad request: JSON parse error, expecting value",
    ]


async def test_json(path: Path) -> None:
    with daemon_process(path, "--log-level", "debug", "--log-format", "json") as process:
        number = await _some_commands(path)
        process.signal(signal.SIGTERM)
        process.wait()
    lines = [json.loads(line) for line in process.log]
    for line in lines:
        assert TIME.fullmatch(line.pop("time"))
    assert lines[0] == {"level": "info", "message": f"listening on {path}"}
    added, missing, removed, broken = lines[2:6]
    assert {**added, "message": ""} == {
        "level": "debug",
        "message": "",
        "pid": os.getpid(),
        "uid": os.getuid(),
        "command": "add-fd",
        "fdset-id": 0,
        "fd": number,
        "outcome": "done",
    }
    assert (missing["fdset-id"], missing["outcome"][:15]) == (7, "File descriptor")
    assert (removed["fdset-id"], removed["outcome"]) == (0, "done")
    assert "command" not in broken
    assert "JSON parse error" in broken["outcome"]


@pytest.mark.parametrize("options", [[], ["--supervise"]], ids=["plain", "supervised"])
def test_the_journal_is_told_the_priority(path: Path, options: list[str]) -> None:
    """Priorities are logged if $JOURNAL_STREAM names this stream: the variable is inherited."""
    for reads_along in (True, False):
        reader, writer = os.pipe2(os.O_CLOEXEC)
        with open(reader) as output, open(writer, "w") as stream:
            found = os.fstat(writer)
            inode = found.st_ino if reads_along else found.st_ino + 1
            env = {**os.environ, "JOURNAL_STREAM": f"{found.st_dev}:{inode}"}
            command = [sys.executable, "-m", "qmpfd", "serve", "--socket", str(path), *options]
            process = subprocess.Popen(command, cwd=ROOT, stderr=stream, env=env)
            stream.close()
            lines = [output.readline()]
            process.send_signal(signal.SIGHUP)
            lines.append(output.readline())
            process.send_signal(signal.SIGTERM)
            lines.append(output.readline())
            assert process.wait(PATIENCE) == 0
        starts = ["<6>qmpfd:", "<4>qmpfd:", "<6>qmpfd:"] if reads_along else ["qmpfd: "] * 3
        assert [line[: len(start)] for line, start in zip(lines, starts, strict=True)] == starts


def test_a_file_has_times(path: Path, tmp_path: Path) -> None:
    """Log lines in a file begin with the time."""
    file = tmp_path / "log"
    command = [sys.executable, "-m", "qmpfd", "serve", "--socket", str(path / "none")]
    with file.open("w") as stream:
        assert subprocess.run(command, cwd=ROOT, stderr=stream, check=False).returncode == 2
    command[-1] = str(path)
    with file.open("a") as stream, subprocess.Popen(command, cwd=ROOT, stderr=stream) as process:
        try:
            while not path.exists():
                assert process.poll() is None
                os.sched_yield()
            BlockingClient(path, PATIENCE).__enter__().close()
        finally:
            process.terminate()
    lines = file.read_text().splitlines()[1:]
    assert [line.split(" ", 1)[1] for line in lines] == [
        f"qmpfd: listening on {path}",
        "qmpfd: SIGTERM: stopping after the received requests",
    ]
    assert all(TIME.fullmatch(line.split()[0]) for line in lines)


async def test_text_of_clients_is_escaped(path: Path) -> None:
    """Line ends and escape sequences in clients' texts are escaped."""
    names = ["a\nqmpfd: forged", "\x1b]0;title\x07", "\u202eright to left", "\u2028", "\x7f"]
    with daemon_process(path, "--log-level", "debug") as process:
        with await Wire.session(path) as wire:
            for name in names:
                await wire.call("closefd", {"fdname": name})
                wire.send(request(name))
                await wire.reply()
        process.signal(signal.SIGTERM)
        process.wait()
    assert len(process.log) == 3 + 2 * len(names)
    assert all(line.startswith("qmpfd: ") and line.isprintable() for line in process.log)
    assert "a\\nqmpfd: forged" in process.log[2]
    assert "\\x1b]0;title\\x07" in process.log[4]


@pytest.mark.parametrize("form", ["text", "json"])
async def test_long_texts_of_clients_are_cut(form: str, path: Path) -> None:
    """Long texts are cut: a request may have 1 MiB, and errors quote it."""
    long = "x" * 100_000
    with daemon_process(path, "--log-level", "debug", "--log-format", form) as process:
        with await Wire.session(path) as wire, Pipe() as pipe:
            wire.send(request(long))
            assert len((await wire.reply())["error"]["desc"]) > len(long)
            wire.send(request("add-fd", {"opaque": long}), [pipe])
            wire.send(request("open-fdset", {"fdset-id": 0}))
            for reply in await wire.replies(2):
                assert "return" in reply
        process.signal(signal.SIGTERM)
        process.wait()
    assert max(map(len, process.log)) < 4000


def test_level_warning(path: Path) -> None:
    """At level warning, not even the listening sockets are logged."""
    with daemon_process(path, "--log-level", "info") as process:
        process.signal(signal.SIGHUP)
        process.await_line(lambda line: "no policy file" in line)
    assert process.log[0] == f"qmpfd: listening on {path}"


async def test_rejected_clients_are_named(path: Path) -> None:
    """Rejected clients are logged, but not each of a flood."""
    with daemon_process(path, "--max-connections", "1") as process:
        with await Wire.session(path):
            for _ in range(100):
                with await Wire.connect(path) as other:
                    await other.rest()
        process.signal(signal.SIGTERM)
        process.wait()
    lines = [line for line in process.log if "turned away" in line]
    first = f"qmpfd: turned away pid {os.getpid()}, uid {os.getuid()}: Too many connections"
    assert lines[0].startswith(first)
    assert len(lines) < 20


# -- a log that nobody reads -------------------------------------------------------------------


@pytest.fixture
def log() -> Iterator[logging.Logger]:
    """The daemon's logger; its handlers are restored afterwards."""
    log = logging.getLogger("qmpfd")
    handlers, level, propagate = log.handlers[:], log.level, log.propagate
    yield log
    log.handlers[:], log.propagate = handlers, propagate
    log.setLevel(level)


def test_a_full_pipe(log: logging.Logger, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full pipe does not block the daemon; lost lines are counted."""
    reader, writer = os.pipe2(os.O_CLOEXEC)
    with open(reader, "rb", buffering=0) as taken, open(writer, "w") as stream:
        monkeypatch.setattr("sys.stderr", stream)
        logs.set_up("text", "info")
        for number in range(2000):
            log.info("%d %s", number, "x" * 100)
        before = taken.read(1 << 20).splitlines()
        log.info("after")
        left_out, after = taken.read(1 << 20).splitlines()
    assert len(before) < 2000
    assert before[-1].split()[1] == b"%d" % (len(before) - 1)
    assert left_out == b"qmpfd: %d log lines are missing here: standard error was full" % (
        2000 - len(before)
    )
    assert after == b"qmpfd: after"


def test_a_line_that_cannot_be_made(
    log: logging.Logger, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An error while a line is made, such as a lack of memory, costs that line."""

    class Heavy:
        def __str__(self) -> str:
            raise MemoryError

    with (tmp_path / "log").open("w+") as stream:
        monkeypatch.setattr("sys.stderr", stream)
        logs.set_up("json", "info")
        log.info("%s", Heavy())
        log.info("after")
        lines = (tmp_path / "log").read_text().splitlines()
    output = [json.loads(line)["message"] for line in lines]
    assert output == ["1 log lines are missing here: standard error was full", "after"]


def _log_until_room(taken: FileIO, log: logging.Logger) -> bytes:
    """Log "after" until it is written; return all that was written."""
    output = b""
    os.set_blocking(taken.fileno(), False)
    while not output.endswith(b"after\n"):
        while chunk := _read(taken):
            output += chunk
        log.info("after")
    return output


def test_a_full_disk(log: logging.Logger, monkeypatch: pytest.MonkeyPatch) -> None:
    """The end of a cut line is written once there is room again; lost lines are counted."""
    reader, writer = os.pipe2(os.O_CLOEXEC)
    disk = os.dup(writer)
    with open(reader, "rb", buffering=0) as taken, open(writer, "w") as stream:
        monkeypatch.setattr("sys.stderr", stream)
        logs.set_up("text", "info")
        log.info("%s", "x" * (1 << 20))
        with open("/dev/full", "w") as full:
            os.dup2(full.fileno(), writer)
        log.info("lost")
        os.dup2(disk, writer)
        os.close(disk)
        output = _log_until_room(taken, log)
    cut, left_out, *after = output.splitlines()
    assert cut == b"qmpfd: " + b"x" * (1 << 20)
    assert left_out.endswith(b"log lines are missing here: standard error was full")
    assert set(after) == {b"qmpfd: after"}


@pytest.mark.parametrize("kind", ["pipe", "stream", "terminal"])
def test_a_long_line_for_a_reader_that_stalls(
    kind: str, log: logging.Logger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line longer than the pipe's room does not block; its rest is written when there is room."""
    if kind == "pipe":
        reader, writer = os.pipe2(os.O_CLOEXEC)
    elif kind == "terminal":
        reader, writer = os.openpty()
        tty.setraw(writer)
    else:
        ours, theirs = socket.socketpair()
        reader, writer = ours.detach(), theirs.detach()
    with open(reader, "rb", buffering=0) as taken, open(writer, "w") as stream:
        monkeypatch.setattr("sys.stderr", stream)
        logs.set_up("text", "info")
        long = "x" * (4 << 20)
        log.info("%s", long)
        log.info("left out")
        log.info("left out too")
        output = _log_until_room(taken, log)
    lines = [line[line.index(b"qmpfd") :] for line in output.decode().encode().splitlines()]
    assert lines[0] == b"qmpfd: " + long.encode()
    assert lines[1].endswith(b"log lines are missing here: standard error was full")
    assert set(lines[2:]) == {b"qmpfd: after"}


def _read(stream: FileIO) -> bytes:
    try:
        return stream.read(1 << 16) or b""
    except BlockingIOError:
        return b""


def test_a_stream_without_a_descriptor(
    log: logging.Logger, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    logs.set_up("json", "warning")
    log.info("no")
    try:
        raise ValueError("bad")
    except ValueError:
        log.exception("it failed")
    line = json.loads(stream.getvalue())
    assert (line["level"], line["message"]) == ("error", "it failed")
    assert line["exception"].endswith("ValueError: bad")
    assert open_fds()


async def test_a_reader_that_is_gone(path: Path) -> None:
    reader, writer = pipe()
    redirected = ["sh", "-c", f'exec "$@" 2> /proc/self/fd/{writer.number}', "sh"]
    options = ["--log-level", "debug"]
    with (
        writer,
        daemon_process(path, *options, prefix=redirected, pass_fds=[writer.number]) as process,
    ):
        reader.close()
        await _some_commands(path)
        process.signal(signal.SIGTERM)
        assert process.process.wait() == 0
