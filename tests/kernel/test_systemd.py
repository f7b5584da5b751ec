"""Service managers: inherited sockets, readiness, status, reload and watchdog."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import pytest
from helpers import Pipe, open_fds
from installed import need
from supervised import children, until

from qmpfd.client.blocking import BlockingClient
from qmpfd.kernel.fd import Fd, FileDescriptorLike, fileno

SERVE = [sys.executable, "-m", "qmpfd", "serve"]
DEADLINE = 20.0


class Manager:
    """Fake service manager: the notify socket."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._socket.settimeout(DEADLINE)

    def until(self, line: str) -> list[str]:
        """Return all messages up to the first with a line that begins with *line*."""
        output: list[str] = []
        while not any(each.startswith(line) for each in output):
            output += self._socket.recv(4096).decode().splitlines()
        return output

    def close(self) -> None:
        self._socket.close()


@contextmanager
def daemon(*arguments: str, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run `serve` as a process; end it with SIGTERM."""
    # LISTEN_PID must be the daemon's pid: the shell sets it before it executes the daemon.
    shell = ["sh", "-c", 'LISTEN_PID=$$ exec "$@"', "sh", *SERVE, *arguments]
    process = subprocess.Popen(
        shell, env={**os.environ, **environment}, close_fds=False, stderr=subprocess.PIPE
    )
    try:
        yield process
    finally:
        process.terminate()
        _, errors = process.communicate(timeout=DEADLINE)
        assert b"Traceback" not in errors


#: Program that moves the descriptors given to 3 and up, and executes the daemon.
PASS = """
import fcntl, os, sys
passed = list(map(int, sys.argv[1].split(",")))
numbers = [fcntl.fcntl(number, fcntl.F_DUPFD, 100) for number in passed]
for number in passed:
    os.close(number)
for index, number in enumerate(numbers):
    os.dup2(number, 3 + index)
    os.close(number)
os.environ["LISTEN_PID"] = str(os.getpid())
os.execv(sys.argv[2], sys.argv[2:])
"""


@contextmanager
def passing(
    passed: list[tuple[str, int]], *arguments: str, **environment: str
) -> Iterator[subprocess.Popen[bytes]]:
    """Run `serve` with inherited descriptors and their names (sd_listen_fds_with_names(3))."""
    output = {
        "LISTEN_FDS": str(len(passed)),
        "LISTEN_FDNAMES": ":".join(name for name, _ in passed),
    }
    numbers = [number for _, number in passed]
    process = subprocess.Popen(
        [sys.executable, "-c", PASS, ",".join(map(str, numbers)), *SERVE, *arguments],
        env={**os.environ, **output, **environment},
        pass_fds=numbers,
    )
    try:
        yield process
    finally:
        process.terminate()
        process.wait(DEADLINE)


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    with closing(Manager(tmp_path / "notify")) as made:
        yield made


@contextmanager
def at_number_three(sock: socket.socket) -> Iterator[None]:
    """Make `sock` inheritable at number 3, the first of sd_listen_fds(3)."""
    before = os.dup(3) if os.path.exists("/proc/self/fd/3") else None
    os.dup2(sock.fileno(), 3, inheritable=True)
    try:
        yield
    finally:
        if before is None:
            os.close(3)
        else:
            os.dup2(before, 3, inheritable=False)
            os.close(before)


def test_ready_status_and_stopping(manager: Manager, tmp_path: Path) -> None:
    path = tmp_path / "s"
    with daemon("--socket", str(path), NOTIFY_SOCKET=str(manager.path)) as process:
        manager.until("READY=1")
        with BlockingClient(path, DEADLINE) as client, (tmp_path / "f").open("w") as file:
            client.execute("add-fd", fds=[file])
        assert any(line.startswith("STATUS=") for line in manager.until("STATUS=1 desc"))
        process.send_signal(signal.SIGTERM)
        manager.until("STOPPING=1")


def test_reload(manager: Manager, tmp_path: Path) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text("")
    arguments = ["--socket", str(tmp_path / "s"), "--policy", str(policy)]
    with daemon(*arguments, NOTIFY_SOCKET=str(manager.path)) as process:
        manager.until("READY=1")
        for content in ("", "bad"):  # READY=1 follows in both cases
            policy.write_text(content)
            process.send_signal(signal.SIGHUP)
            output = manager.until("RELOADING=1")
            assert any(line.startswith("MONOTONIC_USEC=") for line in output)
            manager.until("READY=1")


def test_watchdog(manager: Manager, tmp_path: Path) -> None:
    environment = {"NOTIFY_SOCKET": str(manager.path), "WATCHDOG_USEC": "200000"}
    with daemon("--socket", str(tmp_path / "s"), **environment):
        for _ in range(3):
            manager.until("WATCHDOG=1")


def test_abstract_notify_socket(tmp_path: Path) -> None:
    name = f"qmpfd-test-{os.getpid()}"
    with closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as sock:
        sock.bind(f"\0{name}")
        sock.settimeout(DEADLINE)
        with daemon("--socket", str(tmp_path / "s"), NOTIFY_SOCKET=f"@{name}"):
            assert b"READY=1" in sock.recv(4096)


def test_an_inherited_socket(manager: Manager, tmp_path: Path) -> None:
    path = tmp_path / "activated"
    with closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as listener:
        listener.bind(str(path))
        listener.listen()
        with at_number_three(listener):
            environment = {"LISTEN_FDS": "1", "LISTEN_FDNAMES": "qmpfd.socket"}
            with daemon(NOTIFY_SOCKET=str(manager.path), **environment) as process:
                manager.until("READY=1")
                with BlockingClient(path, DEADLINE) as client:
                    assert client.execute("query-fdsets") == []
                open_there = os.listdir(f"/proc/{process.pid}/fd")
                assert "3" in open_there
    assert path.exists(), "the file belongs to whoever has made it"


@pytest.mark.parametrize("options", [[], ["--supervise"]], ids=["plain", "supervised"])
def test_inherited_descriptors_of_every_kind(
    manager: Manager, tmp_path: Path, options: list[str]
) -> None:
    """The daemon accepts on listening Unix sockets, and stores every other descriptor in a set of
    its own, under its name; after a crash it does not store them twice.
    """
    path = tmp_path / "activated"
    with ExitStack() as stack:
        tcp = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        datagram = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        unix = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        unix.bind(str(path))
        unix.listen()
        peers = [stack.enter_context(sock) for sock in socket.socketpair()]
        pipe, file = stack.enter_context(Pipe()), stack.enter_context(open(os.devnull))
        kinds: dict[str, FileDescriptorLike] = {"web": tcp, "log": datagram, "qmp": unix}
        kinds |= {"peer": peers[0], "pipe": pipe, "file": file}
        passed = [(name, fileno(kind)) for name, kind in kinds.items()]
        others = sorted(name for name in kinds if name != "qmp")
        with passing(passed, *options, NOTIFY_SOCKET=str(manager.path)) as process:
            for again in range(2 if options else 1):
                if again:
                    (worker,) = children(process.pid)
                    os.kill(worker, signal.SIGKILL)
                with BlockingClient(path, DEADLINE) as client:
                    sets = client.execute("query-fdsets")
                assert sorted(fd["opaque"] for each in sets for fd in each["fds"]) == others
                assert len(sets) == len(others)


@pytest.mark.parametrize("options", [[], ["--supervise"]], ids=["plain", "supervised"])
def test_a_passed_descriptor_that_is_removed(
    manager: Manager, tmp_path: Path, options: list[str]
) -> None:
    """It is closed by the time the reply is read, with --supervise at its parent too."""
    path = tmp_path / "s"
    with ExitStack() as stack:
        reader, writer = map(Fd, os.pipe())
        stack.enter_context(reader)
        with writer:
            where = ["--socket", str(path), *options]
            environment = {"NOTIFY_SOCKET": str(manager.path)}
            stack.enter_context(passing([("p", writer.fileno())], *where, **environment))
        manager.until("READY=1")
        with BlockingClient(path, DEADLINE) as client:
            client.execute("remove-fd", {"fdset-id": 0})
            os.set_blocking(reader.fileno(), False)
            assert os.read(reader.fileno(), 1) == b""


#: sitecustomize of a daemon that is killed once, when it has stored everything and is to say so.
KILLED_BEFORE_READY = """
import os, signal, sys
def at_call(frame, event, _, mark=__file__ + ".mark"):
    if event == "call" and frame.f_code.co_name == "_notify_ready" and not os.path.exists(mark):
        open(mark, "x").close()
        os.kill(os.getpid(), signal.SIGKILL)
sys.setprofile(at_call)
"""


def test_a_worker_killed_before_it_is_ready(tmp_path: Path) -> None:
    """The parent passes the sockets again, and the next worker has each of them once."""
    path = tmp_path / "s"
    (tmp_path / "sitecustomize.py").write_text(KILLED_BEFORE_READY)
    with ExitStack() as stack:
        unix = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        unix.bind(str(path))
        unix.listen()
        pipe = stack.enter_context(Pipe())
        passed = [("qmp", unix.fileno()), ("p", fileno(pipe))]
        process = stack.enter_context(passing(passed, "--supervise", PYTHONPATH=str(tmp_path)))
        until(lambda: [*tmp_path.glob("*.mark")], "the kill")
        with BlockingClient(path, DEADLINE) as client:
            (fdset,) = client.execute("query-fdsets")
            assert [fd["opaque"] for fd in fdset["fds"]] == ["p"]
            (worker,) = until(lambda: len(pids := children(process.pid)) == 1 and pids)
            links = list(open_fds(worker).values())
        assert links.count(f"socket:[{os.fstat(unix.fileno()).st_ino}]") == 1


def test_nothing_that_listens_is_passed(manager: Manager, tmp_path: Path) -> None:
    """Without an inherited listening socket, the daemon listens at its default path."""
    path = tmp_path / "s"
    environment = {"QMPFD_SOCKET": str(path), "NOTIFY_SOCKET": str(manager.path)}
    with Pipe() as pipe, passing([("p", fileno(pipe))], LISTEN_FDNAMES="", **environment):
        manager.until("READY=1")
        with BlockingClient(path, DEADLINE) as client:
            (fdset,) = client.execute("query-fdsets")
            assert fdset["fds"][0]["opaque"] == "unknown"


def test_sockets_for_another_process(manager: Manager, tmp_path: Path) -> None:
    """With another LISTEN_PID the sockets are left alone, and the log says so."""
    path = tmp_path / "s"
    environment = {"NOTIFY_SOCKET": str(manager.path), "LISTEN_FDS": "1", "LISTEN_PID": "1"}
    process = subprocess.Popen(
        [*SERVE, "--socket", str(path)],
        env={**os.environ, **environment},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        manager.until("READY=1")
        assert path.exists()
    finally:
        process.terminate()
        _, output = process.communicate(timeout=DEADLINE)
    assert f"LISTEN_PID=1 LISTEN_FDS=1 are not for this process, {process.pid}" in output


@pytest.mark.parametrize("options", [[], ["--supervise"]], ids=["plain", "supervised"])
def test_systemd_socket_activate(tmp_path: Path, options: list[str]) -> None:
    tool = need("systemd-socket-activate")
    path = tmp_path / "activated"
    process = subprocess.Popen(
        [tool, f"--listen={path}", "--fdname=qmp", *SERVE, *options], stderr=subprocess.PIPE
    )
    try:
        assert process.stderr is not None
        assert b"Listening" in process.stderr.readline()
        with BlockingClient(path, DEADLINE) as client:
            client.execute("add-fd", {"opaque": "mine"}, [0])
        if options:
            (worker,) = children(process.pid)
            os.kill(worker, signal.SIGKILL)
        with BlockingClient(path, DEADLINE) as client:
            (fdset,) = client.execute("query-fdsets")
            assert fdset["fds"][0]["opaque"] == "mine"
    finally:
        process.terminate()
        process.communicate(timeout=DEADLINE)


UNITS = sorted((Path(__file__).parents[2] / "packaging").glob("*.s*"))


def analyze(*words: str) -> str:
    tool = need("systemd-analyze")
    done = subprocess.run(
        [tool, *words], capture_output=True, text=True, timeout=DEADLINE, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_units_are_right(tmp_path: Path) -> None:
    """systemd-analyze verify finds no errors, except an unknown Type= before systemd 253."""
    for unit in UNITS:
        text = unit.read_text().replace("/usr/bin/qmpfd", "/bin/true")
        lines = [line for line in text.splitlines() if not line.startswith("Documentation=")]
        (tmp_path / unit.name).write_text("\n".join(lines) + "\n")
    names = [unit.name.replace("@.", "@one.") for unit in UNITS]
    (tmp_path / "qmpfd@one.service").symlink_to("qmpfd@.service")
    output = analyze("verify", *(str(tmp_path / name) for name in names)).splitlines()
    assert [line for line in output if not line.endswith("ignoring: notify-reload")] == []


@pytest.mark.parametrize("unit", [unit.name for unit in UNITS if unit.suffix == ".service"])
def test_units_are_hardened(unit: str) -> None:
    path = next(each for each in UNITS if each.name == unit)
    output = analyze("security", "--offline=true", "--threshold=20", str(path))
    assert "Overall exposure level" in output


def test_the_store_of_the_units() -> None:
    """The unit has the size of the store twice: systemd before 254 does not set $FDSTORE."""
    for unit in UNITS:
        if unit.suffix == ".service":
            lines = dict(
                line.split("=", 1) for line in unit.read_text().splitlines() if "=" in line
            )
            assert lines["Environment"] == f"FDSTORE={lines['FileDescriptorStoreMax']}"
            assert int(lines["FileDescriptorStoreMax"]) < int(lines["LimitNOFILE"])
