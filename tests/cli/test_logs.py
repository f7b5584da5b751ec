"""What the daemon says of itself: to people, to the journal, to programs."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
from collections.abc import Iterator
from io import StringIO
from pathlib import Path

import pytest
from helpers import Wire, daemon_process, open_fds, pipes, value

from qmpfd.cli import logs

TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")


async def _some_commands(path: Path) -> int:
    """Use the daemon; the descriptor that was added."""
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
        "qmpfd: SIGTERM: ending once all is answered",
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


def test_the_journal_is_told_the_priority(path: Path) -> None:
    env = {"JOURNAL_STREAM": "1:2"}
    with daemon_process(path, env=env) as process:
        process.signal(signal.SIGHUP)
        process.await_line(lambda line: "no policy file" in line)
        process.signal(signal.SIGTERM)
        process.wait()
    assert [line[:9] for line in process.log] == ["<6>qmpfd:", "<4>qmpfd:", "<6>qmpfd:"]


def test_less(path: Path) -> None:
    """At the level of warnings it does not even say where it listens."""
    with daemon_process(path, "--log-level", "info") as process:
        process.signal(signal.SIGHUP)
        process.await_line(lambda line: "no policy file" in line)
    assert process.log[0] == f"qmpfd: listening on {path}"


async def test_who_is_turned_away(path: Path) -> None:
    """Named, but not each of a flood."""
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


# -- where nobody takes it ---------------------------------------------------------------------


@pytest.fixture
def log() -> Iterator[logging.Logger]:
    """The daemon's log, as it was afterwards."""
    log = logging.getLogger("qmpfd")
    handlers, level, propagate = log.handlers[:], log.level, log.propagate
    yield log
    log.handlers[:], log.propagate = handlers, propagate
    log.setLevel(level)


def test_a_full_pipe(log: logging.Logger, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for whoever should read it; what was left out is counted."""
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
    assert left_out == b"qmpfd: %d lines were left out: nobody took them" % (2000 - len(before))
    assert after == b"qmpfd: after"


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
    with daemon_process(path, "--log-level", "debug") as process:
        assert process.process.stderr is not None
        process.process.stderr.close()
        await _some_commands(path)
        process.signal(signal.SIGTERM)
        assert process.process.wait() == 0
