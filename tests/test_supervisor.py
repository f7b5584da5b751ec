"""The parent with scripted workers: it survives whatever they send.

Tests of supervisor/parent.py, supervisor/worker.py, supervisor/store.py, supervisor/mailbox.py,
supervisor/manager.py, supervisor/program.py, supervisor/restarts.py, supervisor/signals.py,
supervisor/states.py, supervisor/log.py and supervisor/main.py.
"""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import textwrap
import time
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from installed import need
from supervised import DEADLINE, children, until

import qmpfd.supervisor
from qmpfd.kernel.fd import Fd, close_all
from qmpfd.supervisor.log import Log
from qmpfd.supervisor.store import is_good_name
from qmpfd.supervisor.worker import Worker

PARENT = [sys.executable, "-I", "-S", "-W", "ignore", *qmpfd.supervisor.__path__]

#: Start of each worker's program: it waits as a spare worker, and forks the next one when it is
#: started.  Then it has the socket to its parent, and the stored descriptors.
_PRELUDE = """
import array, os, signal, socket, sys, time
parent = socket.socket(fileno=int(os.environ["QMPFD_NOTIFY_FD"]))
def tell(data, fds=()):
    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))
    parent.sendmsg([data], [rights] if fds else [])
def hear():
    said, fds, *_ = socket.recv_fds(parent, 1 << 17, 253)
    if not said: os._exit(0)
    kind, _, value = said.decode().partition("=")
    return kind, value.split(":") if value else [], fds
def leave_spare():
    global parent
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        if pid := os.fork():
            with theirs: tell(b"QMPFD_SPARE=%d" % pid, [ours.fileno()])
            return False
    parent = theirs
    return True
names = []
while True:
    kind, listed, _ = hear()
    if kind == "NAMES": names += listed
    if kind == "START":
        if not leave_spare(): break
        names = []
given = {}
for at in range(0, len(names), 100):
    tell(b"QMPFD_FETCH=" + ":".join(names[at : at + 100]).encode())
    kind, listed, fds = hear()
    given.update(zip(listed, fds, strict=True))
def barrier():
    r, w = os.pipe()
    tell(b"BARRIER=1", [w])
    os.close(w)
    assert os.read(r, 1) == b""
    os.close(r)
def note(text):
    os.write(1, f"{text}\\n".encode())
"""


def supervise(
    work: str, *, prefix: Sequence[str] = (), **environment: str
) -> tuple[int, list[str], str]:
    """Run a parent with scripted workers; return its status, the workers' notes, and its log."""
    program = _PRELUDE + textwrap.dedent(work)
    command = [*prefix, *PARENT, "text", "info", "5", "", sys.executable, "-c", program]
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
        barrier()  # the parent has the socket to the spare worker
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
        tell(b"a line that is no assignment does not count\\nREADY=1")
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
    """The last message of a worker that dies right after it is processed."""
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
    status, _, said = supervise("sys.exit(3)")  # the worker has logged the reason
    assert (status, said) == (3, "")
    status, _, said = supervise("os.closerange(0, 3); tell(b'READY=1'); note")
    assert status == 0


def test_a_signal_after_all_is_done() -> None:
    """A signal while the interpreter exits does not change the status."""
    program = """
        import os, signal, sys
        from qmpfd.supervisor.main import main
        class Last:  # what is still there when signals are no longer handled
            def __del__(self, kill=os.kill, pid=os.getpid(), number=signal.SIGTERM):
                kill(pid, number)
        last = Last()
        sys.exit(main(sys.argv[1:]))
    """
    worker = ["text", "info", "5", "", sys.executable, "-c", ""]
    command = [sys.executable, "-c", textwrap.dedent(program), *worker]
    assert subprocess.run(command, timeout=DEADLINE, check=False).returncode == 0


def test_a_program_that_cannot_be_run() -> None:
    done = subprocess.run(
        [*PARENT, "text", "info", "5", "", "/nowhere"],
        capture_output=True,
        timeout=DEADLINE,
        check=False,
    )
    assert done.returncode == 126
    assert done.stderr == b"qmpfd: /nowhere cannot be run: No such file or directory\n"


def test_what_is_kept_means_nothing_without_a_journal() -> None:
    """If the first worker dies before its journal is stored, the next one starts empty."""
    status, notes, said = supervise(
        """
        if os.path.exists(os.environ["MARK"]):
            note(len(names))
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
        tell(b"FDSTOREREMOVE=1\\nFDNAME=x\\nQMPFD_CLOSE=lane")
        barrier()
        note(os.read(r, 1))
        sys.exit(0)
        """
    )
    assert (status, notes) == (0, ["b''"])


def test_closes_that_hang_hold_up_nothing_of_another_lane() -> None:
    status, notes, said = supervise(
        """
        import struct
        listener = socket.create_server(("127.0.0.1", 0))
        peers = []
        for number in range(40):
            sock = socket.create_connection(listener.getsockname())
            peers.append(listener.accept())
            sock.setblocking(False)
            try:
                while True: sock.send(bytes(1 << 16))
            except BlockingIOError: pass
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 60))
            tell(b"FDSTORE=1\\nFDNAME=%d" % number, [sock.fileno()])
            barrier()
            sock.close()
            tell(b"FDSTOREREMOVE=1\\nFDNAME=%d\\nQMPFD_CLOSE=a" % number)
        r, w = os.pipe()
        tell(b"FDSTORE=1\\nFDNAME=x", [w])
        os.close(w)
        tell(b"FDSTOREREMOVE=1\\nFDNAME=x\\nQMPFD_CLOSE=b")
        note(parent.recv(100).decode())
        note(os.read(r, 1))
        """
    )
    assert (status, notes) == (0, ["CLOSED=x", "b''"]), said


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
        [*PARENT, "text", "info", "5", "", sys.executable, "-c", program], stdout=subprocess.PIPE
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
            process.send_signal(number)
            assert int(process.stdout.readline()) == number
        assert process.wait(DEADLINE) == 7


def test_many_deaths_do_not_spin() -> None:
    """A worker that dies as soon as it serves is restarted with pauses."""
    program = _PRELUDE + "tell(b'READY=1'); os.kill(os.getpid(), signal.SIGKILL)"
    process = subprocess.Popen(
        [*PARENT, "text", "error", "5", "", sys.executable, "-I", "-S", "-c", program]
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
    """The parent forwards the worker's notifications to its manager, but not the descriptors."""
    path = tmp_path / "manager"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(path))
        manager.settimeout(DEADLINE)
        status, _, said = supervise(
            """
            assert "NOTIFY_SOCKET" not in os.environ
            assert "WATCHDOG_PID" not in os.environ  # the watchdog is that of any worker
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
    assert is_good_name(name) == good


def test_a_log_that_nobody_reads() -> None:
    """Log lines are dropped when the log blocks: the parent does not wait."""
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
        Log("text", "info").log("error", "nobody hears this")
    finally:
        os.dup2(saved, 2)
        for number in (reader, writer, saved):
            os.close(number)


def test_a_full_disk(tmp_path: Path) -> None:
    """The end of a line that was cut is written once there is room again."""
    path = tmp_path / "log"
    saved, limits = os.dup(2), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with path.open("wb") as file:
            os.dup2(file.fileno(), 2)
        log = Log("json", "info")
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
        log.log("error", "cut")
        log.log("error", "lost")
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        log.log("error", "after")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        os.dup2(saved, 2)
        os.close(saved)
    lines = path.read_bytes().splitlines()
    assert [json.loads(line)["message"] for line in lines] == ["cut", "after"]


def test_levels(capfd: pytest.CaptureFixture[str]) -> None:
    log = Log("text", "error")
    log.log("warning", "one")
    log.log("error", "other")
    time_, line = capfd.readouterr().err.split(" ", 1)  # standard error is a file: with times
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", time_)
    assert line == "qmpfd: other\n"


# -- a worker that does not answer -------------------------------------------------------------


def test_a_worker_that_hangs_is_killed() -> None:
    """A worker without heartbeats is killed; the next one has the stored descriptors."""
    status, notes, said = supervise(
        """
        if given:
            note(",".join(names))
            sys.exit(0)
        assert os.environ["WATCHDOG_USEC"] == "500000"
        tell(b"FDSTORE=1\\nFDNAME=qmpfd-journal-1", [0])
        tell(b"READY=1")
        for _ in range(4):
            time.sleep(0.25)
            tell(b"WATCHDOG=1")
        note("hangs")
        os.kill(os.getpid(), signal.SIGSTOP)
        """,
        WATCHDOG_USEC="500000",
    )
    assert (status, notes) == (0, ["hangs", "qmpfd-journal-1"]), said
    assert "has not answered for 0.5 s: killing it" in said


def test_both_were_stopped() -> None:
    """Parent and worker were stopped, as by a freezer: the worker gets time for a heartbeat."""
    program = _PRELUDE + textwrap.dedent(
        """
        tell(b"READY=1")
        note("ready")
        while True:
            time.sleep(0.1)
            tell(b"WATCHDOG=1")
        """
    )
    with started(program, WATCHDOG_USEC="400000") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        (worker,) = children(process.pid)
        for pid in (worker, process.pid):
            os.kill(pid, signal.SIGSTOP)
        time.sleep(2)
        process.send_signal(signal.SIGCONT)
        # The parent has noticed the missed heartbeat, and waits.
        until(lambda: Path(f"/proc/{process.pid}/stat").read_text().split()[2] == "S")
        os.kill(worker, signal.SIGCONT)
        process.terminate()
        assert process.wait(DEADLINE) == 0
        assert process.stderr is not None
        assert process.stderr.read() == b""


def test_a_worker_that_closes_its_socket() -> None:
    """A worker that closes its socket must end, or is killed."""
    status, notes, said = supervise(
        """
        if given:
            note("another")
            sys.exit(0)
        tell(b"FDSTORE=1\\nFDNAME=qmpfd-journal-1", [0])
        tell(b"READY=1")
        barrier()
        parent.close()
        while True: signal.pause()
        """
    )
    assert (status, notes) == (0, ["another"]), said
    assert "the worker has closed its socket and does not end: killing it" in said


def test_a_worker_that_does_not_end_is_killed() -> None:
    """A worker that ignores SIGTERM is killed after the drain timeout."""
    program = _PRELUDE + textwrap.dedent(
        """
        signal.signal(signal.SIGTERM, lambda *_: note("told"))
        tell(b"READY=1")
        note("ready")
        while True: signal.pause()
        """
    )
    with started(program, "1") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        (worker,) = children(process.pid)
        begun = time.monotonic()
        process.terminate()
        assert process.wait(DEADLINE) == 0
        assert time.monotonic() - begun >= 1
        assert process.stdout.readline() == b"told\n"
        assert not Path(f"/proc/{worker}").exists()
        assert process.stderr is not None
        said = re.search(
            rb"has not ended (\d+\.\d) s after it was told to: killing it", process.stderr.read()
        )
        assert said is not None
        assert float(said[1]) >= 1  # the parent, or this process, may have been without a CPU


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM])
def test_a_worker_killed_when_it_was_told_to_end(number: int, tmp_path: Path) -> None:
    """The parent ends with status 0 and removes the socket file."""
    path = tmp_path / "socket"
    status, _, said = supervise(
        f"""
        sock = socket.socket(socket.AF_UNIX)
        sock.bind({str(path)!r})
        found = os.stat({str(path)!r})
        file = f"{{found.st_dev}}:{{found.st_ino}}:" + os.fsencode({str(path)!r}).hex()
        tell(b"QMPFD_SOCKETS=" + file.encode())
        def stop(*_):
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), {int(number)})
        signal.signal(signal.SIGTERM, stop)
        tell(b"READY=1")
        os.kill(os.getppid(), signal.SIGTERM)
        while True: signal.pause()
        """
    )
    assert (status, path.exists()) == (0, False), said


@contextmanager
def started(
    program: str, drain_timeout: str = "5", stdin: int | None = None, **environment: str
) -> Iterator[subprocess.Popen[bytes]]:
    """Start a parent with scripted workers; kill it at the end if it runs."""
    process = subprocess.Popen(
        [*PARENT, "text", "info", drain_timeout, "", sys.executable, "-c", program],
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, **environment},
    )
    with process:
        try:
            yield process
        finally:
            for worker in children(process.pid):
                os.kill(worker, signal.SIGKILL)
            process.kill()


# -- a spare worker ----------------------------------------------------------------------------

#: Command that runs a parent as a child subreaper (prctl(2)).
_SUBREAPER = [
    sys.executable,
    "-c",
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(36, 1); os.execv(sys.argv[1], sys.argv[1:])",
]

#: Program of a worker that leaves a spare worker, which runs *spare*, and dies.
_SPARE = r"""
if given: note("another"); sys.exit(0)
tell(b"FDSTORE=1\nFDNAME=qmpfd-journal-1", [os.memfd_create("journal")])
tell(b"FDSTORE=1\nFDNAME=x", [os.memfd_create("x")])
tell(b"READY=1")
if leave_spare():
    SPARE
    sys.exit(0)
barrier()
os.kill(os.getpid(), signal.SIGKILL)
"""


def _with_spare(work: str) -> str:
    return _SPARE.replace("    SPARE\n", textwrap.indent(textwrap.dedent(work), "    "))


def test_a_spare_worker() -> None:
    """A spare worker gets the names, fetches the descriptors, and becomes the worker."""
    work = """
        def hear(): return socket.recv_fds(parent, 4096, 9)[:2]
        for expected in (b"NAMES=qmpfd-journal-1:x", b"START"):
            assert hear() == (expected, []), expected
        tell(b"QMPFD_FETCH=x:none:qmpfd-journal-1")
        said, fds = hear()
        assert said == b"FETCHED=x:qmpfd-journal-1", said
        for fd, name in zip(fds, ("x", "journal"), strict=True):
            assert os.readlink(f"/proc/self/fd/{fd}") == f"/memfd:{name} (deleted)"
        tell(b"QMPFD_FETCH=none")
        assert hear() == (b"FETCHED=", [])
        tell(b"READY=1")
        barrier()
        note("spare")
        sys.exit(5)
    """
    status, notes, said = supervise(_with_spare(work), prefix=_SUBREAPER)
    assert (status, notes) == (0, ["spare", "another"]), said
    assert "the worker ended with status 5: starting it again" in said


@pytest.mark.parametrize("work", ["os.kill(os.getpid(), 9)", "assert parent.recv(99) and 0"])
def test_a_spare_worker_that_dies(work: str) -> None:
    """If the spare worker dies, the parent starts a worker that inherits the descriptors."""
    status, notes, said = supervise(_with_spare(f"\n{work}\n"), prefix=_SUBREAPER)
    assert (status, notes) == (0, ["another"]), said


def test_without_a_spare_worker() -> None:
    """If a worker has forked no spare worker, the parent executes one, which waits."""
    program = _PRELUDE.replace("not leave_spare()", "True") + textwrap.dedent(
        """
        if given: note("another"); sys.exit(0)
        tell(b"FDSTORE=1\\nFDNAME=qmpfd-journal-1", [0])
        tell(b"READY=1")
        sys.stdin.readline()
        os.kill(os.getpid(), signal.SIGKILL)
        """
    )
    reader, writer = os.pipe()
    with Fd(reader), Fd(writer), started(program, stdin=reader) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stderr.readline() == b"qmpfd: no spare worker was waiting: started one\n"
        assert until(lambda: len(children(process.pid)) == 2)
        os.write(writer, b"\n")
        assert process.stdout.read() == b"another\n"
        assert process.wait(DEADLINE) == 0
        assert b"starting it again" in process.stderr.readline()


def test_names_that_do_not_fit_into_the_socket() -> None:
    """The parent sends the rest of the names when the spare worker has read some."""
    status, notes, said = supervise(
        """
        if given:
            note(len(given))
            sys.exit(0)
        tell(b"FDSTORE=1\\nFDNAME=qmpfd-journal-1", [0])
        for number in range(0, 2000, 100):
            some = ":".join(f"{each:0250}" for each in range(number, number + 100))
            tell(b"FDSTORE=1\\nFDNAME=" + some.encode(), [0] * 100)
        tell(b"READY=1")
        os.kill(os.getpid(), signal.SIGKILL)
        """
    )
    assert (status, notes) == (0, ["2001"]), said


def test_a_spare_worker_that_is_not_adopted() -> None:
    """A spare worker that the parent cannot adopt is told to end."""
    work = """
        while parent.recv(4096): pass
        note("over")
    """
    status, notes, said = supervise(_with_spare(work))
    assert (status, sorted(notes)) == (0, ["another", "over"]), said


# -- signals -----------------------------------------------------------------------------------


def test_a_hangup_while_a_worker_starts() -> None:
    """SIGHUP is forwarded when the worker can handle it."""
    program = _PRELUDE + textwrap.dedent(
        """
        note("starts")
        sys.stdin.readline()
        signal.signal(signal.SIGHUP, lambda *_: (note("reloads"), sys.exit(0)))
        tell(b"READY=1")
        while True: signal.pause()
        """
    )
    reader, writer = os.pipe()
    saved = os.dup(0)
    os.dup2(reader, 0)
    try:
        with started(program) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"starts\n"
            process.send_signal(signal.SIGHUP)
            # The parent handles the signal before any other event.
            until(lambda: not pending(process.pid, signal.SIGHUP))
            os.write(writer, b"\n")
            assert process.stdout.readline() == b"reloads\n"
            assert process.wait(DEADLINE) == 0
    finally:
        os.dup2(saved, 0)
        for number in (saved, reader, writer):
            os.close(number)


def pending(pid: int, number: signal.Signals) -> bool:
    """Return whether a signal is pending for a process (proc(5), ShdPnd)."""
    (line,) = (
        line
        for line in Path(f"/proc/{pid}/status").read_text().splitlines()
        if line.startswith("ShdPnd:")
    )
    return bool(int(line.split()[1], 16) >> (number - 1) & 1)


def test_signals_that_mean_nothing() -> None:
    """Signals without a meaning end neither parent nor worker; SIGQUIT gives a log line."""
    program = _PRELUDE + "tell(b'READY=1'); note('ready')\nwhile True: time.sleep(9)"
    with started(program) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        (worker,) = children(process.pid)
        numbers = [signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM, signal.SIGVTALRM]
        numbers += [signal.SIGPROF, signal.SIGIO, signal.SIGPWR, signal.SIGTTOU, signal.SIGTTIN]
        for number in (*numbers, signal.SIGRTMIN, signal.SIGRTMAX):
            process.send_signal(number)
            os.kill(worker, number)
        os.kill(worker, signal.SIGQUIT)
        process.send_signal(signal.SIGQUIT)
        assert process.stderr is not None
        assert b"SIGQUIT is ignored: SIGTERM ends the daemon" in process.stderr.readline()
        assert children(process.pid) == [worker]
        assert process.poll() is None


def test_a_signal_to_both_is_counted_once() -> None:
    """The parent announces the signals that it forwards: the worker does not count them twice."""
    status, notes, said = supervise(
        """
        def hear(*_):
            note(parent.recv(100).decode())
            if stop.append(1) or len(stop) == 2: sys.exit(0)
        stop = []
        signal.signal(signal.SIGTERM, hear)
        tell(b"READY=1")
        os.kill(os.getppid(), signal.SIGTERM)
        while not stop: signal.pause()
        os.kill(os.getppid(), signal.SIGTERM)
        while True: signal.pause()
        """
    )
    assert (status, notes) == (0, ["SIGNALS=1", "SIGNALS=2"]), said


def test_as_process_1(tmp_path: Path) -> None:
    """As process 1, the parent reaps all orphans."""
    program = _PRELUDE + textwrap.dedent(
        """
        assert os.getppid() == 1
        reader, writer = os.pipe()
        if os.fork() == 0:
            orphan = os.fork()
            if orphan: os.write(writer, b"%d" % orphan)
            os._exit(0)
        os.wait()
        orphan = int(os.read(reader, 20))
        while True:
            try: os.kill(orphan, 0)
            except ProcessLookupError: break
            time.sleep(0.01)
        note("reaped")
        tell(b"READY=1")
        sys.exit(0)
        """
    )
    need("unshare")
    command = [*PARENT, "text", "info", "5", "", sys.executable, "-c", program]
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child", *command],
        capture_output=True,
        timeout=DEADLINE,
        check=False,
    )
    if b"unshare failed" in done.stderr:
        pytest.skip("no namespaces here")
    assert (done.returncode, done.stdout) == (0, b"reaped\n"), done.stderr


def test_no_pidfd() -> None:
    """The parent works the same if pidfd_open(2) is forbidden, or fails once."""
    for folder in qmpfd.supervisor.__path__:
        for file in Path(folder).glob("*.py"):
            assert "pidfd" not in file.read_text()


# -- the service manager -----------------------------------------------------------------------


def test_notifications_are_repeated(tmp_path: Path) -> None:
    """Notifications are sent again when the service manager is back."""
    path = tmp_path / "manager"
    program = _PRELUDE + textwrap.dedent(
        """
        tell(b"STATUS=old")
        tell(b"READY=1")
        tell(b"STATUS=new")
        barrier()
        note("told")
        while True: time.sleep(9)
        """
    )
    with started(program, NOTIFY_SOCKET=str(path)) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"told\n"
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
            manager.bind(str(path))
            manager.settimeout(DEADLINE)
            assert [manager.recv(100) for _ in range(2)] == [b"READY=1", b"STATUS=new"]


def test_the_parent_feeds_the_watchdog(tmp_path: Path) -> None:
    """The parent sends heartbeats to the manager, also without a worker: it holds descriptors."""
    path = tmp_path / "manager"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(path))
        manager.settimeout(DEADLINE)
        program = _PRELUDE + "os.kill(os.getpid(), signal.SIGKILL)"
        with started(program, NOTIFY_SOCKET=str(path), WATCHDOG_USEC="200000") as process:
            for _ in range(20):
                assert manager.recv(100) == b"WATCHDOG=1"
            assert process.poll() is None


# -- room for descriptors ----------------------------------------------------------------------


def test_a_full_table_is_answered() -> None:
    """A descriptor without a place is reported as lost before later messages are answered."""
    status, notes, said = supervise(
        """
        import resource
        room = int(os.environ["FDSTORE"])
        assert 0 < room < 200
        for number in range(room):
            tell(b"FDSTORE=1\\nFDNAME=%d" % number, [0])
        tell(b"QMPFD_SYNC=1")
        assert parent.recv(100) == b"SYNCED=1"
        for number in range(room, 300):
            tell(b"FDSTORE=1\\nFDNAME=%d\\nQMPFD_SYNC=%d" % (number, number), [0])
            answer = parent.recv(100)
            if answer != b"SYNCED=%d" % number: break
        assert answer == b"LOST=%d" % number, answer
        assert parent.recv(100) == b"SYNCED=%d" % number
        tell(b"FDSTOREREMOVE=1\\nFDNAME=0")
        tell(b"FDSTORE=1\\nFDNAME=again\\nQMPFD_SYNC=x", [0])
        assert parent.recv(100) == b"SYNCED=x"
        note("fine")
        """,
        prefix=["sh", "-c", 'ulimit -n 200 && exec "$@"', "sh"],
    )
    assert (status, notes) == (0, ["fine"]), said
    assert "was not kept safe" in said


#: Command that runs as a user without other processes, who may read this Python.
_USER = [
    *("setpriv", "--reuid=54321", "--regid=54321", "--clear-groups"),
    *("--inh-caps=+dac_override", "--ambient-caps=+dac_override"),
]


def test_no_more_processes() -> None:
    """RLIMIT_NPROC: the descriptors stay, and a worker is started when the limit permits."""
    if os.getuid():
        pytest.skip("needs root")
    need("setpriv")
    program = _PRELUDE + textwrap.dedent(
        """
        import resource
        if given:
            note(",".join(names))
            sys.exit(0)
        tell(b"FDSTORE=1\\nFDNAME=qmpfd-journal-1", [0])
        tell(b"READY=1")
        _, hard = resource.getrlimit(resource.RLIMIT_NPROC)
        resource.prlimit(os.getppid(), resource.RLIMIT_NPROC, (1, hard))
        os.kill(os.getpid(), signal.SIGKILL)
        """
    )
    command = [*_USER, *PARENT, "text", "info", "5", "", sys.executable, "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert b"starting it again" in process.stderr.readline()
        for delay in (b"0.1", b"0.2"):
            cannot = b"cannot start a worker: Resource temporarily unavailable: trying again in "
            assert cannot + delay + b" s" in process.stderr.readline()
        subprocess.run([*_USER, "prlimit", f"--pid={process.pid}", "--nproc=99:"], check=True)
        process.send_signal(signal.SIGHUP)
        assert process.stdout.read() == b"qmpfd-journal-1\n"
        assert process.wait(DEADLINE) == 0


def test_slow_closes_are_answered() -> None:
    status, notes, said = supervise(
        """
        r, w = os.pipe()
        tell(b"FDSTORE=1\\nFDNAME=x", [w])
        os.close(w)
        tell(b"FDSTOREREMOVE=1\\nFDNAME=x\\nQMPFD_CLOSE=lane")
        note(parent.recv(100).decode())
        note(os.read(r, 1))
        """
    )
    assert (status, notes) == (0, ["CLOSED=x", "b''"]), said


def test_inherited_descriptors_keep_their_numbers(tmp_path: Path) -> None:
    """--add-fd has its numbers in each worker, beside the stored descriptors."""
    file = _file(tmp_path)
    program = _PRELUDE + textwrap.dedent(
        """
        assert os.pread(5, 10, 0) == b"content"
        if not given:
            tell(b"FDSTORE=1\\nFDNAME=qmpfd-journal-1", [0])
            for number in range(9):
                fd = os.memfd_create(f"{number}")
                tell(b"FDSTORE=1\\nFDNAME=%d" % number, [fd])
            tell(b"READY=1")
            os.kill(os.getpid(), signal.SIGKILL)
        for number in range(9):
            link = os.readlink(f"/proc/self/fd/{given[str(number)]}")
            assert link == f"/memfd:{number} (deleted)", link
        note("fine")
        """
    )
    command = [*PARENT, "text", "info", "5", "", sys.executable, "-c", program]
    shell = ["sh", "-c", 'exec "$@" 5<"$0"', str(file)]
    done = subprocess.run([*shell, *command], capture_output=True, timeout=DEADLINE, check=False)
    assert (done.returncode, done.stdout) == (0, b"fine\n"), done.stderr


def test_no_descriptors() -> None:
    status, _, log = supervise("", prefix=["sh", "-c", 'ulimit -n 5; exec "$@"', "sh"])
    assert status == 2
    assert log == "qmpfd: the parent cannot start: Too many open files\n"


class _OutOfMemory(socket.socket):
    """A socket whose first sends fail, as sendmsg(2) does where the kernel has no memory."""

    errors: Sequence[int] = ()

    def _fail(self) -> None:
        if self.errors:
            number, *self.errors = self.errors
            raise OSError(number, os.strerror(number))

    def send(self, *arguments: Any) -> int:
        self._fail()
        return super().send(*arguments)

    def sendmsg(self, *arguments: Any) -> int:
        self._fail()
        return super().sendmsg(*arguments)


@pytest.mark.parametrize("fds", [[], [0]])
def test_no_memory_to_answer_a_worker(fds: list[int]) -> None:
    """The answer is sent later: a worker that waits for it would wait for ever."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs, _OutOfMemory(fileno=ours.detach()) as sock:
        sock.errors = [errno.ENOBUFS, errno.ENOMEM]
        worker = Worker(os.getpid(), sock)
        worker.send(b"SYNCED=1", fds)
        worker.send(b"SYNCED=2")
        assert worker.flush()
        assert not worker.flush()
        data, control, _, _ = theirs.recvmsg(100, 100)
        assert (data, len(control)) == (b"SYNCED=1", len(fds))
        close_all(Fd(number) for _, _, payload in control for number in array("i", payload))
        assert theirs.recv(100) == b"SYNCED=2"
