"""The parent alone, with workers that are told what to do: it survives whatever they send."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from supervised import DEADLINE, children

import qmpfd.supervisor
from qmpfd.supervisor import Log, good_name

PARENT = [sys.executable, "-I", "-S", "-W", "ignore", qmpfd.supervisor.__file__]

#: What each worker begins with: the socket to its parent, and what it was given.
_PRELUDE = """
import array, os, signal, socket, sys, time
parent = socket.socket(fileno=int(os.environ["QMPFD_NOTIFY_FD"]))
names = os.environ.get("LISTEN_FDNAMES", "").split(":")
count = int(os.environ.get("LISTEN_FDS", "0"))
assert count == 0 or os.environ["LISTEN_PID"] == str(os.getpid())
given = dict(zip(names, range(3, 3 + count)))
def tell(data, fds=()):
    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))
    parent.sendmsg([data], [rights] if fds else [])
def barrier():
    r, w = os.pipe()
    tell(b"BARRIER=1", [w])
    os.close(w)
    assert os.read(r, 1) == b""
    os.close(r)
def note(text):
    os.write(1, f"{text}\\n".encode())
"""


def supervise(work: str, **environment: str) -> tuple[int, list[str], str]:
    """Run a parent whose workers do that; its status, what they note, and what it says."""
    program = _PRELUDE + textwrap.dedent(work)
    command = [*PARENT, "text", "info", "", sys.executable, "-c", program]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
        env={**os.environ, **environment},
    )
    return done.returncode, done.stdout.split(), done.stderr


def test_junk(tmp_path: Path) -> None:
    status, notes, said = supervise(
        """
        if "x" in given:
            assert os.pread(given["x"], 10, 0) == b"content"
            note(",".join(sorted(names)))
            sys.exit(0)
        fd = os.open(os.environ["FILE"], os.O_RDONLY)
        parent_fds = f"/proc/{os.getppid()}/fd"
        before = len(os.listdir(parent_fds))
        for junk in (b"\\0", b"\\xff" * 60000, b"=", b"\\n\\n", b"FDSTORE", b"FDSTORE=1",
                     b"FDNAME=x",
                     b"FDSTORE=1\\nFDNAME=", b"FDSTORE=1\\nFDNAME=a:b", b"FDSTORE=1\\nFDNAME=\\xe9",
                     b"FDSTORE=1\\nFDNAME=" + b"n" * 256, b"FDSTORE=2\\nFDNAME=x",
                     b"FDSTOREREMOVE=1\\nFDNAME=none", b"FDSTOREREMOVE=1", b"BARRIER=1\\nFDNAME=x",
                     b"MAINPID=1", b"WATCHDOG=trigger", b"ERRNO=1"):
            tell(junk)
            tell(junk, [fd] * 253)
            tell(junk, [fd])
        barrier()
        assert len(os.listdir(parent_fds)) == before, os.listdir(parent_fds)
        # An empty message is not the end.
        parent.send(b"")
        tell(b"FDSTORE=1\\nFDNAME=x\\nFDPOLL=0", [fd])
        tell(b"FDSTORE=1\\nFDNAME=qmpfd-journal-1", [fd])
        tell(b"FDSTORE=1\\nFDNAME=" + b"n" * 255, [fd])
        tell(b"FDSTOREREMOVE=1\\nFDNAME=" + b"n" * 255)
        tell(b"READY=1")
        os.kill(os.getpid(), signal.SIGKILL)
        """,
        FILE=str(_file(tmp_path)),
    )
    assert (status, notes) == (0, ["qmpfd-journal-1,x"]), said
    assert said == "qmpfd: the worker was killed by signal 9: starting it again\n"


def _file(folder: Path) -> Path:
    path = folder / "file"
    path.write_text("content")
    return path


def test_what_was_sent_last_counts() -> None:
    """A worker that dies right behind its message: whoever was told of it was told the truth."""
    status, notes, said = supervise(
        """
        turn = len(given)
        if turn < 300:
            tell(b"READY=1")
            for number in range(turn, turn + 100):
                tell(b"FDSTORE=1\\nFDNAME=qmpfd-journal-%d" % number, [0])
            os.kill(os.getpid(), signal.SIGKILL)
        note(turn)
        """
    )
    assert (status, notes) == (0, ["300"]), said


def test_statuses() -> None:
    assert supervise("sys.exit(0)")[0] == 0
    status, _, said = supervise("sys.exit(3)")  # it has said why
    assert (status, said) == (3, "")
    status, _, said = supervise("os.closerange(0, 3); tell(b'READY=1'); note")
    assert status == 0


def test_a_program_that_cannot_be_run() -> None:
    done = subprocess.run(
        [*PARENT, "text", "info", "", "/nowhere"],
        capture_output=True,
        timeout=DEADLINE,
        check=False,
    )
    assert done.returncode == 126
    assert done.stderr == b"qmpfd: /nowhere cannot be run: No such file or directory\n"


def test_what_is_kept_means_nothing_without_a_journal() -> None:
    """A first worker that dies before it has told what it has: the next one begins anew."""
    status, notes, said = supervise(
        """
        if os.path.exists(os.environ["MARK"]):
            note(count)
            sys.exit(0)
        open(os.environ["MARK"], "w").close()
        tell(b"FDSTORE=1\\nFDNAME=x", [0])
        os.kill(os.getpid(), signal.SIGKILL)
        """,
        MARK=f"/tmp/qmpfd-test-{os.getpid()}",
    )
    os.unlink(f"/tmp/qmpfd-test-{os.getpid()}")
    assert (status, notes) == (0, ["0"]), said


def test_a_close_that_may_hang_is_done_beside() -> None:
    status, notes, _ = supervise(
        """
        r, w = os.pipe()
        tell(b"FDSTORE=1\\nFDNAME=x", [w])
        os.close(w)
        tell(b"FDSTOREREMOVE=1\\nFDNAME=x\\nQMPFD_CLOSE=slow")
        barrier()
        note(os.read(r, 1))
        sys.exit(0)
        """
    )
    assert (status, notes) == (0, ["b''"])


def test_signals_reach_the_worker() -> None:
    program = _PRELUDE + textwrap.dedent(
        """
        def hear(number, _):
            note(number)
            if number == signal.SIGTERM: sys.exit(7)
        for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM): signal.signal(number, hear)
        tell(b"READY=1")
        barrier()
        note("ready")
        while True: signal.pause()
        """
    )
    process = subprocess.Popen(
        [*PARENT, "text", "info", "", sys.executable, "-c", program], stdout=subprocess.PIPE
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
            process.send_signal(number)
            assert int(process.stdout.readline()) == number
        assert process.wait(DEADLINE) == 7


def test_many_deaths_do_not_spin() -> None:
    """A worker that dies as soon as it serves is started again, but not as fast as can be."""
    program = _PRELUDE + "tell(b'READY=1'); os.kill(os.getpid(), signal.SIGKILL)"
    process = subprocess.Popen(
        [*PARENT, "text", "error", "", sys.executable, "-I", "-S", "-c", program]
    )
    with process:
        time.sleep(0.5)
        before = len(os.listdir(f"/proc/{process.pid}/fd"))
        time.sleep(1)
        assert abs(len(os.listdir(f"/proc/{process.pid}/fd")) - before) <= 3
        process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE) == 0
    assert not children(process.pid)


def test_what_it_passes_on(tmp_path: Path) -> None:
    """To its own service manager goes what the worker says of itself, nothing of descriptors."""
    path = tmp_path / "manager"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(path))
        manager.settimeout(DEADLINE)
        status, _, said = supervise(
            """
            assert "NOTIFY_SOCKET" not in os.environ
            assert os.environ["WATCHDOG_PID"] == str(os.getpid())
            tell(b"FDSTORE=1\\nFDNAME=x", [0])
            tell(b"READY=1\\nMAINPID=%d" % os.getpid())
            tell(b"STATUS=fine")
            tell(b"WATCHDOG=1")
            tell(b"STOPPING=1")
            """,
            NOTIFY_SOCKET=str(path),
            WATCHDOG_PID="1",
        )
        assert status == 0, said
        told = [manager.recv(100) for _ in range(4)]
    assert told == [b"READY=1", b"STATUS=fine", b"WATCHDOG=1", b"STOPPING=1"]


@pytest.mark.parametrize(
    "name, good",
    [
        (b"~1a", True),
        (b"n" * 255, True),
        (b"n" * 256, False),
        (b"a b", True),
        (b"a:b", False),
        (b"a\x7f", False),
        (b"\xe9", False),
        (b"a\n", False),
    ],
)
def test_names(name: bytes, good: bool) -> None:
    assert good_name(name) == good


def test_a_log_that_nobody_reads() -> None:
    """It is left out: the parent has better things to do than to wait."""
    reader, writer = os.pipe()
    saved = os.dup(2)
    try:
        os.dup2(writer, 2)
        os.set_blocking(writer, False)
        while True:
            try:
                os.write(writer, bytes(4096))
            except BlockingIOError:
                break
        os.set_blocking(writer, True)
        Log("text", "info").say("error", "nobody hears this")
    finally:
        os.dup2(saved, 2)
        for number in (reader, writer, saved):
            os.close(number)


def test_levels(capfd: pytest.CaptureFixture[str]) -> None:
    log = Log("text", "error")
    log.say("warning", "one")
    log.say("error", "other")
    assert capfd.readouterr().err == "qmpfd: other\n"
