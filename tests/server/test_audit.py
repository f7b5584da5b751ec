"""``--audit``: a record of each descriptor added, removed, handed out or refused.

Tests of commands/audit.py.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import trio
from helpers import Pipe, Wire, daemon, daemon_process, error, pipes, request, settle, value
from trio.testing import MockClock

import qmpfd
from qmpfd.commands.audit import Audit
from qmpfd.fdsets import PERMANENT, FdSet, StoredFd
from qmpfd.kernel.fd import Fd
from qmpfd.limits import TAKEOVER_FORMAT
from qmpfd.policy import Access, Grant
from qmpfd.server.audit import AuditWriter

ME = {"pid": os.getpid(), "uid": os.geteuid()}


def lines(path: Path) -> list[dict[str, Any]]:
    """Return the records without their times, which must ascend."""
    records = [json.loads(line) for line in path.read_text("ascii").splitlines()]
    times = [line.pop("time") for line in records]
    assert times == sorted(times)
    for stamp in times:
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", stamp)
    return records


async def test_additions_removals_and_openings(path: Path, tmp_path: Path) -> None:
    file = tmp_path / "audit"
    with file.open("w") as out, pipes(2) as made:
        async with daemon(path, audit=out):
            with await Wire.session(path) as wire:
                fd = value(await wire.call("add-fd", {"opaque": "caf\u00e9\n"}, made[:1]))["fd"]
                value(await wire.call("query-fdsets"))
                value(await wire.call("open-fdset", {"fdset-id": 0}))
                value(await wire.call("getfd", {"fdname": "n"}, made[:1]))
                value(await wire.call("closefd", {"fdname": "n"}))
                value(await wire.call("remove-fd", {"fdset-id": 0, "fd": fd}))
                assert error(await wire.call("remove-fd", {"fdset-id": 0})) == "FdNotFound"
                assert error(await wire.call("add-fd", {"opaque": "x"})) == "FdNotSupplied"
                added = value(await wire.call("add-fds", {"opaque": "web"}, made))["fds"]
                replaced = {"opaque": "web", "if-exists": "replace"}
                last = value(await wire.call("add-fds", replaced, made[:1]))["fds"][0]["fd"]
    named = lines(file)
    number = named[2].pop("fd")
    assert named.pop(3).pop("fd") == number
    first = {"set": 0, "fd": fd, "opaque": "caf\u00e9\n"}
    desc = "File descriptor named 'fdset-id:0' not found"
    assert named == [
        {**ME, "command": "add-fd", **first, "outcome": "added"},
        {**ME, "command": "open-fdset", **first, "outcome": "opened"},
        {**ME, "command": "getfd", "name": "n", "outcome": "added"},
        {**ME, "command": "remove-fd", **first, "outcome": "removed"},
        {**ME, "command": "remove-fd", "set": 0, "outcome": f"FdNotFound: {desc}"},
        {
            **ME,
            "command": "add-fd",
            "opaque": "x",
            "outcome": "FdNotSupplied: No file descriptor supplied via SCM_RIGHTS",
        },
        *(
            {**ME, "command": "add-fds", "set": 0, **each, "outcome": "added"}
            for each in (*added, {"fd": last, "opaque": "web"})
        ),
        *({**ME, "command": "add-fds", "set": 0, **each, "outcome": "replaced"} for each in added),
        {"set": 0, "fd": last, "opaque": "web", "outcome": "ended"},
    ]


async def test_expiry_hangup_and_end_of_a_connection(
    path: Path, tmp_path: Path, autojump_clock: MockClock
) -> None:
    """The daemon closes descriptors on expiry, on a hang-up, and at the end of a connection."""
    file = tmp_path / "audit"
    with file.open("w") as out:
        async with daemon(path, audit=out):
            with await Wire.session(path) as wire, Pipe() as pipe:
                value(await wire.call("add-fds", {"expires": 5}, [pipe]))
                value(await wire.call("add-fds", {"lifetime": "connection"}, [pipe]))
                value(await wire.call("getfd", {"fdname": "n"}, [pipe]))
                ours, theirs = socket.socketpair()
                with ours:
                    value(await wire.call("add-fds", {"watch-hangup": True}, [ours]))
                theirs.close()
                await trio.sleep(6)
            await settle()
    records = [(line.get("pid"), line.get("command"), line["outcome"]) for line in lines(file)[4:]]
    assert sorted(records, key=str) == sorted(
        [
            (None, None, "expired"),
            (None, None, "hangup"),
            (os.getpid(), None, "connection"),
            (os.getpid(), None, "removed"),
        ],
        key=str,
    )


async def test_refusals(path: Path, tmp_path: Path) -> None:
    file = tmp_path / "audit"
    with file.open("w") as out, Pipe() as pipe:
        async with daemon(path, audit=out) as server:
            with await Wire.session(path) as wire:
                [session] = server.sessions
                session.context.change_access(Access((Grant(frozenset({"query"})),)))
                assert error(await wire.call("add-fd", {"opaque": "a"}, [pipe]))
                assert error(await wire.call("quit"))
                assert error(await wire.call("open-fdset", {"fdset-id": 3, "fd": 4}))
    records = lines(file)
    assert [line["outcome"].partition(":")[0] for line in records] == ["PermissionDenied"] * 3
    assert [line["command"] for line in records] == ["add-fd", "quit", "open-fdset"]
    assert (records[2]["set"], records[2]["fd"]) == (3, 4)


async def test_a_refused_takeover(path: Path, tmp_path: Path) -> None:
    """A command that fails after its execution is recorded with its name."""
    file = tmp_path / "audit"
    takeover = {"format": TAKEOVER_FORMAT}
    with file.open("w") as out:
        async with daemon(path, audit=out):
            with await Wire.session(path) as first, await Wire.session(path) as second:
                value(await first.call("takeover", takeover))
                assert error(await second.call("takeover", takeover))
    (record,) = lines(file)
    assert record["command"] == "takeover"
    assert record["outcome"].startswith("GenericError: The daemon is being taken over")


async def test_refused_requests(path: Path, tmp_path: Path) -> None:
    """The descriptor of a request that no command executes is recorded as refused."""
    bad = (
        b'{"execute": "add-fd", "arguments": {"fdset-id": "0"}}',
        b'{"execute": "nonsense"}',
        b"[1,, 2]",
        b'{"execute": "qmp_capabilities"}',
    )
    file = tmp_path / "audit"
    with file.open("w") as out, Pipe() as pipe:
        async with daemon(path, audit=out):
            with await Wire.session(path) as wire:
                records = []
                for text in bad:
                    wire.send(text, [pipe])
                    records.append((await wire.reply())["error"])
    found = lines(file)
    assert [line.pop("outcome") for line in found] == [
        f"{error['class']}: {error['desc']}" for error in records
    ]
    assert found == [ME, ME, ME, {**ME, "command": "qmp_capabilities"}]


#: SO_PASSRIGHTS (Linux 6.16): whether a socket receives descriptors.
SO_PASSRIGHTS = 83


@pytest.mark.parametrize("request_id", [1, "x" * 5000])
async def test_a_client_that_refuses_descriptors(
    request_id: int | str, path: Path, tmp_path: Path
) -> None:
    """The failed send is a refusal: in the records, the counters and the log."""
    file = tmp_path / "audit"
    with file.open("w") as out, Pipe() as pipe:
        async with daemon(path, audit=out):
            with await Wire.session(path) as wire:
                value(await wire.call("add-fd", None, [pipe]))
                try:
                    wire.sock.setsockopt(socket.SOL_SOCKET, SO_PASSRIGHTS, 0)
                except OSError as exc:
                    pytest.skip(f"no SO_PASSRIGHTS: {exc}")
                wire.send(request("open-fdset", {"fdset-id": 0}, id=request_id))
                reply = await wire.reply()
                assert error(reply) == "GenericError"
                stats = value(await wire.call("query-stats"))
                assert stats["errors"] == [{"name": "GenericError", "count": 1}]
    outcome = f"GenericError: {reply['error']['desc']}"
    assert [line["outcome"] for line in lines(file)] == ["added", "opened", outcome, "ended"]


async def test_a_rejected_client(path: Path, tmp_path: Path) -> None:
    file = tmp_path / "audit"
    with file.open("w") as out:
        async with daemon(path, audit=out, limits=qmpfd.Limits(max_connections=1)):
            with await Wire.session(path), await Wire.connect(path) as other:
                assert "error" in await other.reply()
    [records] = lines(file)
    assert records.pop("outcome").startswith("GenericError: ")
    assert records == ME


async def test_long_texts_are_cut(path: Path, tmp_path: Path) -> None:
    file = tmp_path / "audit"
    with file.open("w") as out, Pipe() as pipe:
        async with daemon(path, audit=out):
            with await Wire.session(path) as wire:
                value(await wire.call("add-fd", {"opaque": "\u20ac" * 3000}, [pipe]))
    assert lines(file)[0]["opaque"] == "\u20ac" * 1024


def test_a_text_that_json_cannot_carry() -> None:
    """An opaque text of the command line may have bytes that are not UTF-8."""
    written: list[bytes] = []
    with Pipe() as pipe:
        fd = Fd(os.dup(pipe.fileno()))
        stored = StoredFd(fd, FdSet(7), "caf\udce9", None, 0.0, PERMANENT)
        Audit(written.append).record("added", stored)
        fd.close()
    [line] = written
    assert json.loads(line)["opaque"] == "caf\\udce9"


# -- the file cannot be written ----------------------------------------------------------------


async def test_a_pipe_without_reader_loses_records_only(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Clients are served; when the pipe is read, the log has the number of lost records."""
    reader, writer = os.pipe2(os.O_CLOEXEC)
    with Pipe() as pipe, open(reader, "rb", buffering=0) as end:
        with open(writer, "wb", buffering=0) as out:
            fcntl.fcntl(out, fcntl.F_SETPIPE_SZ, 4096)
            async with daemon(path, audit=out):
                with await Wire.session(path) as wire:
                    text = "x" * 1024
                    while "lines are left out" not in caplog.text:
                        value(await wire.call("add-fd", {"opaque": text}, [pipe]))
                        value(await wire.call("remove-fd", {"fdset-id": 0}))
                    out.close()
                    seen = b""
                    while "lines were left out" not in caplog.text:
                        # The log line comes after the first record that was written again.
                        seen += await trio.to_thread.run_sync(end.read, 1 << 20)
                        value(await wire.call("query-name"))
                        await wire.call("closefd", {"fdname": "none"})
                # The daemon waits a second for the writer thread, then leaves it behind.
        while more := end.read(1 << 20):
            seen += more
    for line in seen.splitlines():
        json.loads(line)


def test_a_full_disk(path: Path) -> None:
    """/dev/full: each write fails with ENOSPC."""
    with daemon_process(path, "--audit", "/dev/full") as process:

        async def use() -> None:
            with await Wire.session(path) as wire, Pipe() as pipe:
                value(await wire.call("add-fd", None, [pipe]))
                await trio.to_thread.run_sync(
                    process.await_line, lambda line: "No space left" in line
                )
                for _ in range(20):
                    value(await wire.call("add-fd", None, [pipe]))
                assert len(value(await wire.call("query-fdsets"))) == 21

        trio.run(use)
        process.signal(signal.SIGTERM)
        process.wait()
        output = [line for line in process.log if "audit trail" in line]
    assert len(output) == 1


def test_a_short_write_ends_its_line(tmp_path: Path) -> None:
    """After a short write, the next record begins on a line of its own."""
    limit = 100

    reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    with open(reader, "rb", buffering=0) as end, open(writer, "wb", buffering=0) as out:
        size = fcntl.fcntl(out, fcntl.F_SETPIPE_SZ, 4096)
        made = AuditWriter(out)
        line = b'"' + b"x" * (size + limit) + b'"\n'
        made.write(line)  # more than the pipe holds: a short write, then EAGAIN
        while not made._torn:
            os.sched_yield()
        assert len(end.read(1 << 20)) == size
        made.write(b'"whole"\n')
        made.close()
        assert end.read(1 << 20) == b'\n"whole"\n'


def test_a_file_that_ends_in_a_line(tmp_path: Path) -> None:
    """The daemon before was killed after a short write: the next record begins on a new line."""
    path = tmp_path / "audit"
    for content, expected in ((b"", b""), (b'"whole"\n', b'"whole"\n'), (b'"to', b'"to\n')):
        path.write_bytes(content)
        with path.open("ab") as file:
            made = AuditWriter(file)
            made.write(b'"new"\n')
            made.close()
        assert path.read_bytes() == expected + b'"new"\n'


async def test_a_descriptor_that_is_not_open(path: Path) -> None:
    """A daemon that cannot start closes what it has opened."""
    with pipes(1) as (pipe,):
        reader = Fd(os.dup(pipe.fileno()))
        with pytest.raises(OSError, match="Bad file descriptor"):
            await qmpfd.serve([path], audit=1 << 20, initial_fds=[(reader, None, None)])
        assert reader.closed


@pytest.mark.parametrize("where", ["none/audit", ".", "fifo"])
def test_a_path_that_cannot_be_opened(path: Path, tmp_path: Path, where: str) -> None:
    """One line and status 2; a FIFO without reader does not block the start."""
    os.mkfifo(tmp_path / "fifo")
    words = ["serve", "--socket", str(path), "--audit", str(tmp_path / where)]
    ran = subprocess.run(
        [sys.executable, "-m", "qmpfd", *words], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 2
    assert ran.stderr.count("\n") == 1
    assert "--audit" in ran.stderr


def test_appended_to_by_each_start(path: Path, tmp_path: Path) -> None:
    """Each start appends to the file, which has mode 600; standard output works too."""
    file = tmp_path / "audit"

    async def add() -> None:
        with await Wire.session(path) as wire, Pipe() as pipe:
            value(await wire.call("add-fd", None, [pipe]))

    for _ in range(2):
        with daemon_process(path, "--audit", str(file)) as process:
            trio.run(add)
            process.signal(signal.SIGTERM)
            process.wait()
    assert file.stat().st_mode & 0o777 == 0o600
    assert [line["outcome"] for line in lines(file)] == ["added", "ended"] * 2


def test_a_takeover_gives_no_records(path: Path, tmp_path: Path) -> None:
    """Neither daemon records the descriptors that go over to the successor."""
    file = tmp_path / "audit"

    async def add() -> None:
        with await Wire.session(path) as wire, Pipe() as pipe:
            value(await wire.call("add-fd", None, [pipe]))

    with daemon_process(path, "--audit", str(file)) as old:
        trio.run(add)
        with daemon_process(path, "--audit", str(file), "--takeover") as new:
            assert old.wait() == 0
            trio.run(add)
            new.signal(signal.SIGTERM)
            new.wait()
    outcomes = [(line["outcome"], line["set"]) for line in lines(file)]
    assert outcomes == [("added", 0), ("added", 1), ("ended", 1), ("ended", 0)]


def test_the_log_at_level_debug_has_opened_descriptors(path: Path) -> None:
    """Fd set, number and opaque text, in one line, whatever the text contains."""
    with daemon_process(path, "--log-level", "debug") as process:

        async def use() -> int:
            with await Wire.session(path) as wire, Pipe() as pipe:
                text = "a\nb" + "x" * 100
                number = value(await wire.call("add-fd", {"opaque": text}, [pipe]))["fd"]
                value(await wire.call("open-fdset", {"fdset-id": 0}))
                return int(number)

        number = trio.run(use)
        shown = "'a\\nb" + "x" * 61 + "'"
        expected = f"open-fdset fdset-id=0 fd={number} opaque={shown}: done"
        process.await_line(lambda line: expected in line)
