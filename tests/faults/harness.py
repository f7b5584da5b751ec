"""Attack a daemon process, and check that a well-behaved client notices nothing."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from helpers import DaemonProcess, daemon_process, open_fds, request, send_now, value

from qmpfd.kernel.fd import FileDescriptorLike

HERE = Path(__file__).parent
SECONDS = float(os.environ.get("QMPFD_FAULT_SECONDS", "0.5"))
"""Duration of each attack in seconds."""
PATIENCE = 20.0
SLOWEST = 0.1
"""Longest permitted round trip, in seconds, of a client that sends a request every millisecond."""
MOST_GROWTH = 64 << 20
"""Largest permitted growth of the daemon's peak memory, in bytes."""

Scenario = Callable[["Harness"], None]


class Caller:
    """Blocking QMP client."""

    def __init__(self, path: Path, *, negotiate: bool = True) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(PATIENCE)
        until(lambda: _connected(self.sock, path), "room in the backlog")
        self._lines = self.sock.makefile("rb")
        if negotiate:
            assert self.reply().keys() == {"QMP"}
            assert self.call("qmp_capabilities") == {"return": {}}

    def reply(self) -> dict[str, Any]:
        """Return the next reply; an empty one at the end of the connection."""
        return dict(json.loads(self._lines.readline() or b"{}"))

    def send(self, data: bytes, fds: Sequence[FileDescriptorLike] = ()) -> None:
        """Send *data* with *fds*."""
        send_now(self.sock, data, fds)

    def call(
        self,
        command: str,
        arguments: Mapping[str, Any] | None = None,
        fds: Sequence[FileDescriptorLike] = (),
    ) -> dict[str, Any]:
        """Send a command; return its reply."""
        self.send(request(command, arguments), fds)
        return self.reply()

    def close(self) -> None:
        """Close the connection."""
        self._lines.close()
        self.sock.close()

    def __enter__(self) -> Caller:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def _connected(sock: socket.socket, path: Path) -> bool:
    """Connect; return False if the backlog is full: the socket's timeout does not cover that case
    (connect(2), EAGAIN).
    """
    try:
        sock.connect(os.fspath(path))
    except BlockingIOError:
        return False
    return True


class Program:
    """A program in this folder, run as a process; its first line of output is in ``said``."""

    def __init__(self, name: str, *words: object) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-S", "-E", os.fspath(HERE / name), *map(str, words)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.said = self.line()

    def line(self) -> str:
        """Return the program's next line."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def tell(self, line: str) -> str:
        """Send the program a line; return its answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()
        return self.line()

    def finish(self) -> str:
        """Close the program's standard input; return its last line."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        output = self.line()
        self.process.wait(PATIENCE)
        return output

    def kill(self) -> None:
        """Kill the program with SIGKILL."""
        self.process.kill()
        self.process.wait(PATIENCE)
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):
                pipe.close()


class Harness:
    """A daemon under attack."""

    def __init__(self, daemon: DaemonProcess, stack: ExitStack) -> None:
        self.daemon = daemon
        self.path = daemon.path
        self.stack = stack
        self.threads: list[threading.Thread] = []

    def caller(self, *, negotiate: bool = True) -> Caller:
        """Connect another client, closed at the end of the attack."""
        return self.stack.enter_context(Caller(self.path, negotiate=negotiate))

    def attack(self, kind: str, *words: object) -> Program:
        """Start an attack of ``attacks.py``, killed at the end."""
        program = Program("attacks.py", kind, self.path, *words)
        self.stack.callback(program.kill)
        assert program.said == "ready", f"{kind}: {program.said}"
        return program

    def close_in_thread(self, number: int) -> None:
        """Close a descriptor of the test's own in a thread: close(2) may hang until the end."""
        thread = threading.Thread(target=_close, args=(number,), daemon=True)
        thread.start()
        thread.join(0.02)
        self.threads.append(thread)

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Stop the daemon with SIGSTOP while the block runs."""
        self.daemon.signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.daemon.signal(signal.SIGCONT)

    def cpu(self) -> float:
        """Return the daemon's CPU time in seconds."""
        words = Path(f"/proc/{self.daemon.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")

    def closes_pending(self, caller: Caller) -> int:
        """Return the number of closes that the daemon has pending."""
        return int(value(caller.call("query-stats"))["closes-pending"])


def _close(number: int) -> None:
    with suppress(OSError):  # the FUSE connection was aborted
        os.close(number)


def until(condition: Callable[[], bool], what: str) -> None:
    """Wait until *condition* returns true; *what* describes it."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.005)


def memory(pid: int, figure: str) -> int:
    """Return a field of /proc/PID/status (proc(5)), such as VmRSS, in bytes."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{figure}:"):
            return int(line.split()[1]) << 10
    raise AssertionError(figure)


def _settled(pid: int) -> dict[int, str]:
    """Return the daemon's descriptors when they do not change any more."""
    found = open_fds(pid)
    while True:
        time.sleep(0.02)
        again = open_fds(pid)
        if again == found:
            return found
        found = again


def _clean_up(path: Path) -> None:
    with Caller(path, negotiate=False) as caller:
        if "error" in caller.reply():  # max-connections: earlier clients still count
            return
        value(caller.call("qmp_capabilities"))
        for fdset in value(caller.call("query-fdsets")):
            caller.call("remove-fd", {"fdset-id": fdset["fdset-id"]})


def assert_service_unharmed(path: Path, scenario: Scenario, *options: str) -> None:
    """Run *scenario* against a daemon, and check three things: no other client waits long, the
    daemon's memory does not grow, and its descriptors are afterwards those of the start.

    If a round trip was slow because of the machine, as the control or the run delay shows, the
    scenario runs once more; then only the daemon's own time counts.
    """
    figures: dict[str, dict[str, float]] = {}
    for _ in range(2):
        figures = _once(path, scenario, *options)
        answers, own, control = (figures[name]["max"] for name in ("daemon", "own", "control"))
        print(f"slowest {answers:.4f} s, of the daemon's own {own:.4f}, control {control:.4f}")
        if answers <= SLOWEST:
            return
        if own > SLOWEST and control < SLOWEST / 2:
            pytest.fail(f"an answer took {answers:.3f} s: {figures}")
    assert figures["own"]["max"] <= SLOWEST, figures


def _once(path: Path, scenario: Scenario, *options: str) -> dict[str, dict[str, float]]:
    with daemon_process(path, *options) as daemon:
        pid = daemon.pid
        with Caller(path) as caller, open("/dev/null") as file:
            for _ in range(2):
                caller.call("add-fd", None, [file])
                caller.call("remove-fd", {"fdset-id": 0})
        before, size = _settled(pid), memory(pid, "VmRSS")
        Path(f"/proc/{pid}/clear_refs").write_text("5")  # reset the peak, VmHWM (proc(5))
        probe = Program("probe.py", path)
        try:
            assert probe.said == "ready"
            with ExitStack() as stack:
                harness = Harness(daemon, stack)
                scenario(harness)
            for thread in harness.threads:
                thread.join(PATIENCE)
                assert not thread.is_alive()
            _clean_up(path)
            output = probe.finish()
            assert output, "the well-behaved client was cut off"
            figures: dict[str, dict[str, float]] = json.loads(output)
        finally:
            probe.kill()
        assert daemon.process.poll() is None, "the daemon died"

        def restored() -> bool:
            _clean_up(path)  # the daemon executes the last commands of killed clients
            for _ in range(20):  # until the daemon has read the end of our connection
                if sorted(open_fds(pid).values()) == sorted(before.values()):
                    return True
                time.sleep(0.005)
            return False

        until(restored, f"only {before} are left")
        growth = memory(pid, "VmHWM") - size
        assert growth <= MOST_GROWTH, f"memory grew by {growth >> 20} MiB"
        daemon.signal(signal.SIGTERM)
        assert daemon.wait() == 0, daemon.log
        assert not any("Traceback" in line for line in daemon.log), daemon.log
    return figures


# -- a file system that hangs ------------------------------------------------------------------


class HungFiles:
    """A mounted FUSE file system whose server stops answering on demand."""

    def __init__(self, folder: Path, server: Program) -> None:
        self.folder = folder
        self._server = server

    def hang(self, *operations: str) -> None:
        """Do not answer these requests any more."""
        assert self._server.tell(",".join(operations)) == "told"

    def abort(self) -> None:
        """Make hanging system calls fail."""
        self._server.kill()  # closes its end of /dev/fuse


def _no_fuse() -> str | None:
    """Return why FUSE cannot be used, or None."""
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
    except OSError as exc:
        return f"/dev/fuse: {exc.strerror}"
    if os.geteuid():
        return "mount(2) needs root"
    return None


needs_fuse = pytest.mark.skipif(
    _no_fuse() is not None and not os.environ.get("QMPFD_REQUIRE_PEERS"),
    reason=f"no FUSE: {_no_fuse()}",
)


@contextmanager
def hung_files(folder: Path) -> Iterator[HungFiles]:
    """Mount a FUSE file system; abort its connection at the end: hanging system calls then fail."""
    folder.mkdir(exist_ok=True)
    server = Program("fuse.py", folder)
    try:
        assert server.said == "mounted", "the FUSE server did not start"
        yield HungFiles(folder, server)
    finally:
        server.kill()
        subprocess.run(["umount", "-l", folder], check=False, stderr=subprocess.DEVNULL)
        folder.rmdir()
