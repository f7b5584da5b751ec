"""``serve --supervise``: the parent stores all descriptors, and restarts its worker.

Tests of cli/supervise.py, kernel/process.py and server/fdstore/sentinel.py.
"""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from helpers import open_fds, request, send_now
from supervised import (
    COMMAND,
    DEADLINE,
    Supervised,
    children,
    connected,
    lasting,
    supervised,
    until,
)

from qmpfd.client.blocking import BlockingClient
from qmpfd.errors import QMPError
from qmpfd.kernel.fd import Fd, close_all

#: Number of moments at which a takeover is killed; ``QMPFD_KILLS=50`` for more of them.
KILLS = int(os.environ.get("QMPFD_KILLS", "5"))


def resident(pid: int) -> int:
    """Return the resident memory of a process in bytes."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise AssertionError


def fds(client: BlockingClient) -> list[dict[str, Any]]:
    return lasting(client.execute("query-fds"))


@pytest.mark.timeout(90)
def test_ten_thousand_descriptors(path: Path) -> None:
    with supervised(path) as daemon, daemon.client() as client:
        before = daemon.open_fds()
        with open("/dev/null") as null:
            for number in range(10_000 // 250):
                client.execute("add-fds", {"opaque": f"n{number}"}, [null] * 250)
        assert daemon.open_fds() == before + 10_000
        assert resident(daemon.pid) < 16 << 20
        there = fds(client)
        daemon.kill_worker()
        with daemon.client() as again:
            daemon.worker()
            assert fds(again) == there
            assert resident(daemon.pid) < 16 << 20
            for number in range(10_000 // 250):
                again.execute("remove-fd", {"fdset-id": number})
            assert daemon.open_fds() == before
        assert resident(daemon.pid) < 16 << 20


def test_connects_wait_instead_of_being_refused(path: Path) -> None:
    with supervised(path) as daemon:
        worker = daemon.worker()
        os.kill(worker, signal.SIGSTOP)
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(path))
            os.kill(worker, signal.SIGKILL)
            sock.settimeout(DEADLINE)
            assert b"QMP" in sock.recv(1000)


def test_arguments_are_checked_first(path: Path) -> None:
    """Wrong arguments: the parent exits with the worker's status and its one line."""
    for options in (["--max-fds", "x"], ["--policy", str(path / "none")]):
        ended = [
            subprocess.run(
                [*COMMAND, *which, "--socket", str(path), *options],
                capture_output=True,
                timeout=DEADLINE,
                check=False,
            )
            for which in ([], ["--supervise"])
        ]
        assert ended[0].stderr == ended[1].stderr
        assert ended[0].stderr.count(b"\n") == 1
        assert [each.returncode for each in ended] == [2, 2]


def test_a_socket_in_use(path: Path) -> None:
    with supervised(path) as daemon:
        daemon.worker()
        with supervised(path, status=2) as other:
            assert other.process.wait(DEADLINE) == 2
            assert other.log.count("\n") == 1
            assert "already listening" in other.log
        with daemon.client() as client:
            assert client.execute("query-fds") == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_both(path: Path, number: signal.Signals) -> None:
    with supervised(path) as daemon:
        worker = daemon.worker()
        with daemon.client() as client:
            client.execute("add-fd", fds=[0])
        daemon.process.send_signal(number)
        assert daemon.process.wait(DEADLINE) == 0
        assert not Path(f"/proc/{worker}").exists()
        assert not path.exists()


def test_sigterm_to_the_worker(path: Path) -> None:
    with supervised(path) as daemon:
        os.kill(daemon.worker(), signal.SIGTERM)
        assert daemon.process.wait(DEADLINE) == 0


def test_quit_ends_both(path: Path) -> None:
    with supervised(path) as daemon, daemon.client() as client:
        client.execute("quit")
        assert daemon.process.wait(DEADLINE) == 0


def test_a_second_sigterm_ends_at_once(path: Path) -> None:
    with supervised(path, "--drain-timeout", "60") as daemon, daemon.client() as client:
        daemon.worker()
        client.execute("add-fd", fds=[0])
        sock = client.detach()  # sends requests and reads no replies
        with sock:
            sock.setblocking(False)
            fill(sock, b'{"execute": "query-qmp-schema"}')
            daemon.process.send_signal(signal.SIGTERM)
            until(lambda: "SIGTERM: stopping" in daemon.log)
            daemon.process.send_signal(signal.SIGTERM)
            assert daemon.process.wait(DEADLINE) == 0


def test_a_signal_to_both_cuts_no_reply(path: Path) -> None:
    """A signal to parent and worker, as a service manager sends it, in any order."""
    for parent_first in (True, False):
        with supervised(path) as daemon, daemon.client() as client:
            worker = daemon.worker()
            client.execute("add-fd", fds=[0])
            with client.detach() as sock:
                count, received = 200, 0
                sock.settimeout(DEADLINE)
                sock.sendall(b'{"execute": "query-qmp-schema"}' * count)
                assert sock.recv(1)
                for pid in [daemon.pid, worker] if parent_first else [worker, daemon.pid]:
                    os.kill(pid, signal.SIGTERM)
                    until(lambda: "SIGTERM: stopping" in daemon.log)
                while chunk := sock.recv(1 << 20):
                    received += chunk.count(b"\r\n")
                assert received == count
            assert daemon.process.wait(DEADLINE) == 0


def test_a_worker_that_hangs(path: Path) -> None:
    """A hanging worker is killed and restarted, with all stored descriptors."""
    with supervised(path, env={"WATCHDOG_USEC": "1500000"}) as daemon:
        with daemon.client() as client:
            client.execute("add-fd", {"opaque": "mine"}, [0])
            there = fds(client)
        os.kill(daemon.worker(), signal.SIGSTOP)
        until(lambda: "killing it" in daemon.log)
        with daemon.client() as client:
            assert fds(client) == there
        worker = daemon.worker()
        time.sleep(2)  # the new worker sends its heartbeats, and lives
        assert daemon.worker() == worker


def test_sigterm_with_a_hanging_worker(path: Path) -> None:
    with supervised(path, "--drain-timeout", "0.5") as daemon:
        os.kill(daemon.worker(), signal.SIGSTOP)
        daemon.process.terminate()
        begun = time.monotonic()
        assert daemon.process.wait(DEADLINE) == 0
        assert time.monotonic() - begun < 0.5 + 2
        assert "has not ended 0.5 s after it was told to" in daemon.log


@pytest.mark.parametrize("background", [False, True], ids=["foreground", "background"])
def test_a_terminal_that_stops_those_who_write(path: Path, background: bool) -> None:
    """With stty tostop, the worker, which is in a process group of its own, can still log."""
    program = f"""
import fcntl, os, sys, termios
os.setsid()
terminal = os.open(os.ttyname({{slave}}), os.O_RDWR)
fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
mode = termios.tcgetattr(terminal)
mode[3] |= termios.TOSTOP
termios.tcsetattr(terminal, termios.TCSANOW, mode)
if {background} and os.fork() == 0:
    os.setpgid(0, 0)
    os.dup2(terminal, 2)
    os.execv(sys.executable, sys.argv[1:])
elif not {background}:
    os.dup2(terminal, 2)
    os.execv(sys.executable, sys.argv[1:])
os.wait()
"""
    master, slave = os.openpty()
    command = [*COMMAND, "--supervise", "--socket", str(path)]
    process = subprocess.Popen(
        [sys.executable, "-c", program.format(slave=slave), *command], pass_fds=[slave]
    )
    os.close(slave)
    try:
        with connected(path) as client:
            client.execute("add-fd", fds=[0])
            (parent,) = children(process.pid) if background else [process.pid]
            (worker,) = children(parent)
            os.kill(worker, signal.SIGKILL)
        with connected(path) as client:
            assert len(fds(client)) == 1
            client.execute("quit")
        assert process.wait(DEADLINE) == 0
    finally:
        process.kill()
        process.wait()
        os.close(master)


def test_sighup_reads_the_policy(path: Path, tmp_path: Path) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text("")
    with supervised(path, "--policy", str(policy)) as daemon:
        daemon.worker()
        daemon.process.send_signal(signal.SIGHUP)
        until(lambda: "is read again" in daemon.log)


def test_a_socket_that_sighup_has_replaced(path: Path) -> None:
    """The parent stores the new socket: clients that connect without a worker are served later."""
    with supervised(path) as daemon:
        with daemon.client() as client:
            client.execute("add-fd", fds=[0])
        path.unlink()
        daemon.process.send_signal(signal.SIGHUP)
        until(lambda: "made it again" in daemon.log)
        with daemon.client() as client:  # the parent has read all earlier messages by now
            client.execute("add-fd", fds=[0])
        held = daemon.open_fds()
        found = path.stat().st_ino
        worker = daemon.worker()
        daemon.process.send_signal(signal.SIGSTOP)
        try:
            os.kill(worker, signal.SIGKILL)
            with socket.socket(socket.AF_UNIX) as waiting:
                waiting.connect(str(path))
                daemon.process.send_signal(signal.SIGCONT)
                waiting.settimeout(DEADLINE)
                assert waiting.recv(1) == b"{"
        finally:
            daemon.process.send_signal(signal.SIGCONT)
        with daemon.client() as client:
            assert len(fds(client)) == 2
        assert path.stat().st_ino == found
        assert daemon.open_fds() == held


def test_a_worker_that_dies_at_every_start(path: Path, tmp_path: Path) -> None:
    """The parent retries forever, at growing intervals, and at once on SIGHUP; it keeps all fds."""
    policy = tmp_path / "policy.toml"
    policy.write_text("")
    with supervised(path, "--policy", str(policy)) as daemon:
        with daemon.client() as client:
            client.execute("add-fd", {"opaque": "mine"}, [0])
            there = fds(client)
        policy.write_text("bad")
        held = daemon.open_fds()
        begun = time.monotonic()
        daemon.kill_worker()
        hint = f"kill -HUP {daemon.pid}"
        until(lambda: hint in daemon.log)
        assert 4 < time.monotonic() - begun < 25
        (line,) = (line for line in daemon.log.splitlines() if hint in line)
        delays = re.findall(r"trying again in ([0-9.]+) s", daemon.log)
        assert delays == ["0.1", "0.2", "0.4", "0.8", "1.6", "3.2", "6.4"]
        assert "keeps 3 descriptors" in line  # one, the listening socket and the journal
        assert daemon.process.poll() is None
        assert daemon.open_fds() == held - 1  # 1: the worker's socket
        policy.write_text("")
        daemon.process.send_signal(signal.SIGHUP)
        with daemon.client() as client:
            assert fds(client) == there


def test_sigterm_between_two_starts(path: Path, tmp_path: Path) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text("")
    with supervised(path, "--policy", str(policy)) as daemon:
        daemon.worker()
        policy.write_text("bad")
        daemon.kill_worker()
        until(lambda: "trying again" in daemon.log)
        daemon.process.send_signal(signal.SIGTERM)
        assert daemon.process.wait(DEADLINE) == 0


def test_the_parent_is_killed(path: Path) -> None:
    """The worker serves on, logs that, and refuses descriptors, which a crash would lose, until a
    successor has taken over.
    """
    with supervised(path, status=-signal.SIGKILL) as daemon, daemon.client() as client:
        client.execute("add-fd", {"opaque": "mine"}, [0])
        worker = daemon.worker()
        daemon.process.kill()
        daemon.process.wait()
        try:
            until(lambda: "no longer kept safe" in daemon.log)
            there = fds(client)
            assert len(there) == 1
            with pytest.raises(QMPError, match="--takeover --supervise"):
                client.execute("add-fd", fds=[0])
            client.execute("add-fds", {"lifetime": "connection"}, [0])
            _, (fd,) = client.request("open-fdset", {"fdset-id": 0})
            fd.close()
            with supervised(path, "--takeover") as successor:
                until(lambda: "took over" in successor.log)
                until(lambda: not Path(f"/proc/{worker}/fd").exists() or zombie(worker))
                assert [fd for fd in fds(client) if fd["lifetime"] == "daemon"] == there
                client.execute("add-fd", {"opaque": "again"}, [0])
                successor.kill_worker()
                with successor.client() as again:
                    assert [fd["opaque"] for fd in fds(again)] == ["again", "mine"]
            assert daemon.log.count("no longer kept safe") == 1
        finally:
            if not zombie(worker):
                os.kill(worker, signal.SIGKILL)


def zombie(pid: int) -> bool:
    """Return whether a process has ended and is not reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_the_parent_is_stopped(path: Path) -> None:
    """Acknowledged changes are listed; others wait until the parent continues."""
    with supervised(path) as daemon, daemon.client() as client:
        client.execute("add-fd", {"opaque": "mine"}, [0])
        daemon.process.send_signal(signal.SIGSTOP)
        assert len(fds(client)) == 1
        with BlockingClient(path, DEADLINE) as other:
            assert len(fds(other)) == 1
            answered = threading.Event()

            def add() -> None:
                other.execute("add-fd", {"opaque": "waits"}, [0])
                answered.set()

            thread = threading.Thread(target=add)
            thread.start()
            assert not answered.wait(0.3)
            assert client.execute("query-name") == {}
            daemon.process.send_signal(signal.SIGCONT)
            thread.join(DEADLINE)
            assert answered.is_set()
        assert len(fds(client)) == 2


def test_the_worker_ends_although_the_parent_is_stopped(path: Path) -> None:
    with supervised(path, "--drain-timeout", "1") as daemon:
        worker = daemon.worker()
        client = daemon.client()
        daemon.process.send_signal(signal.SIGSTOP)
        with client.detach() as sock:
            sock.sendmsg(
                [b'{"execute": "add-fd"}'], [(1, 1, struct.pack("i", sys.stderr.fileno()))]
            )
            time.sleep(0.2)
            begun = time.monotonic()
            os.kill(worker, signal.SIGTERM)
            until(lambda: zombie(worker))
            assert time.monotonic() - begun < 3
        daemon.process.send_signal(signal.SIGCONT)
        assert daemon.process.wait(DEADLINE) == 0


def lingering_socket() -> tuple[socket.socket, socket.socket]:
    """Return a TCP socket whose last close takes three seconds, and its peer."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        other = socket.socket()
        other.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        other.connect(listener.getsockname())
        sock, _ = listener.accept()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 3))
    sock.setblocking(False)
    fill(sock, b"x")
    return sock, other


def fill(sock: socket.socket, data: bytes) -> None:
    """Send until the socket is full."""
    try:
        while True:
            sock.send(data * 1000)
    except BlockingIOError:
        pass


def test_a_lingering_socket_holds_up_nobody(path: Path) -> None:
    with supervised(path) as daemon, daemon.client() as client:
        sock, other = lingering_socket()
        with other:
            with sock:
                client.execute("add-fd", {"opaque": "lingers"}, [sock])
            begun = time.monotonic()
            with ThreadPoolExecutor() as pool, daemon.client() as bystander:
                # The client that removes it waits for the close.
                removed = pool.submit(client.execute, "remove-fd", {"fdset-id": 0})
                until(lambda: not bystander.execute("query-fdsets"))
                bystander.execute("add-fd", fds=[0])
                bystander.execute("remove-fd", {"fdset-id": 0})
                assert time.monotonic() - begun < 1
                assert not removed.done()
                assert removed.result() == {}


def test_the_same_file_twice(path: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("content")
    with supervised(path) as daemon, daemon.client() as client, file.open() as opened:
        client.execute("add-fds", fds=[opened, opened])
        there = fds(client)
        client.execute("remove-fd", {"fdset-id": 0, "fd": there[0]["fd"]})
        daemon.kill_worker()
        with daemon.client() as again:
            assert fds(again) == there[1:]
            _, (fd,) = again.request("open-fdset", {"fdset-id": 0})
            with fd:
                assert os.pread(fd.fileno(), 10, 0) == b"content"


def test_an_expiry_while_no_worker_runs(path: Path) -> None:
    with supervised(path) as daemon, daemon.client() as client:
        client.execute("add-fds", {"expires": 1, "opaque": "short"}, [0])
        client.execute("add-fds", {"expires": 1000, "opaque": "long"}, [0])
        client.execute("add-fds", {"lifetime": "connection"}, [0])
        r, w = map(Fd, os.pipe())
        client.execute("add-fds", {"watch-hangup": True, "opaque": "pipe"}, [r])
        os.kill(daemon.worker(), signal.SIGSTOP)
        time.sleep(1.1)
        close_all([r, w])
        daemon.kill_worker()
        with daemon.client() as again:
            until(lambda: [fd["opaque"] for fd in fds(again)] == ["long"])


def test_inherited_descriptors(path: Path, tmp_path: Path) -> None:
    """The first worker has the descriptors of --add-fd; the next one gets them from the parent."""
    file = tmp_path / "file"
    file.write_text("content")
    number = os.open(file, os.O_RDONLY)
    try:
        option = f"fd={number},set=7,opaque=mine"
        with supervised(path, "--add-fd", option, pass_fds=[number]) as daemon:
            with daemon.client() as client:
                daemon.worker()
                there = fds(client)
                assert [(fd["fdset-id"], fd["opaque"]) for fd in there] == [(7, "mine")]
                # When the worker serves, the parent closes its inherited descriptor.
                until(lambda: list(open_fds(daemon.pid).values()).count(str(file)) == 1)
            for _ in range(2):
                daemon.kill_worker()
                with daemon.client() as client:
                    assert fds(client) == there
                daemon.worker()
            with daemon.client() as client:
                client.execute("remove-fd", {"fdset-id": 7})
                daemon.kill_worker()
            with daemon.client() as client:
                assert fds(client) == []
    finally:
        os.close(number)


def test_inherited_descriptors_of_a_successor_that_is_killed(path: Path, tmp_path: Path) -> None:
    """The successor's next worker has the descriptors of --add-fd too."""
    file = tmp_path / "file"
    file.write_text("content")
    for step in range(4):
        number = os.open(file, os.O_RDONLY)
        try:
            option = f"fd={number},set=70,opaque=mine"
            with supervised(path, status=None) as old, old.client() as client:
                client.execute("add-fds", {"opaque": "old"}, [0] * 250)
                with supervised(path, "--takeover", "--add-fd", option, pass_fds=[number]) as new:
                    until(lambda: children(new.pid))
                    time.sleep(0.1 * step)
                    for worker in children(new.pid):
                        os.kill(worker, signal.SIGKILL)
                    assert old.process.wait(DEADLINE) == 0, old.log + new.log
                    with new.client() as again:
                        opaques = [fd["opaque"] for fd in fds(again)]
                        assert sorted(opaques) == ["mine"] + ["old"] * 250, new.log
        finally:
            os.close(number)


def test_without_standard_streams(path: Path) -> None:
    """With closed standard streams, other descriptors do not get the numbers 0 to 2."""
    shell = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh"]
    process = subprocess.Popen([*shell, *COMMAND, "--supervise", "--socket", str(path)])
    try:
        with connected(path) as client:
            with open("/dev/zero") as zero:
                client.execute("add-fd", fds=[zero])
            for pid in (process.pid, *children(process.pid)):
                links = [os.readlink(f"/proc/{pid}/fd/{number}") for number in range(3)]
                assert links == ["/dev/null"] * 3
            before = fds(client)
            (worker,) = children(process.pid)
            os.kill(worker, signal.SIGKILL)
        with connected(path) as client:
            assert fds(client) == before
    finally:
        process.terminate()
        assert process.wait(DEADLINE) == 0


def test_log_as_json(path: Path) -> None:
    with supervised(path, "--log-format", "json") as daemon:
        daemon.kill_worker()
        daemon.worker()
        lines = [json.loads(line) for line in daemon.log.splitlines()]
    (line,) = (line for line in lines if "killed by signal 9" in line["message"])
    assert line["level"] == "warning"
    assert line.keys() == lines[0].keys()


@pytest.mark.parametrize("old_is", [(), ("--supervise",)], ids=["plain", "supervised"])
@pytest.mark.parametrize("new_is", [(), ("--supervise",)], ids=["plain", "supervised"])
def test_takeovers(path: Path, old_is: tuple[str, ...], new_is: tuple[str, ...]) -> None:
    """Takeovers between all kinds of daemons, with their connections; no process is left."""
    log = path.with_name("log")
    with log.open("wb") as file:
        old = subprocess.Popen([*COMMAND, "--socket", str(path), *old_is], stderr=file)
        with connected(path) as client:
            for number in range(300):
                client.execute("add-fd", {"opaque": f"n{number}"}, [0])
            before = fds(client)
            new = subprocess.Popen(
                [*COMMAND, "--socket", str(path), "--takeover", *new_is], stderr=file
            )
            try:
                assert old.wait(DEADLINE) == 0, log.read_text()
                assert fds(client) == before
                if new_is:
                    (worker,) = children(new.pid)
                    os.kill(worker, signal.SIGKILL)
                    with connected(path) as again:
                        assert fds(again) == before
                        again.execute("add-fd", {"opaque": "later"}, [0])
                else:
                    client.execute("add-fd", {"opaque": "later"}, [0])
            finally:
                new.terminate()
                new.wait(DEADLINE)
        assert new.returncode == 0
        assert "Traceback" not in log.read_text()


@contextmanager
def _takeover(path: Path) -> Iterator[tuple[Supervised, Supervised, list[dict[str, Any]]]]:
    """Yield the predecessor, a successor that is taking over, and the stored descriptors."""
    with supervised(path, status=None) as old, old.client() as client:
        for _ in range(8):
            client.execute("add-fds", fds=[0] * 250)
        before = fds(client)
        with supervised(path, "--takeover", status=None) as new:
            yield old, new, before


@pytest.mark.timeout(60 + 5 * KILLS)
def test_a_supervised_successor_killed_at_any_time(path: Path) -> None:
    """One daemon has everything afterwards: the predecessor or the successor."""
    for step in range(KILLS):
        with _takeover(path) as (old, new, before):
            time.sleep(0.05 + 0.5 * step / KILLS)
            for worker in children(new.pid):
                os.kill(worker, signal.SIGKILL)
            # The successor retries, or restarts with what its parent has.
            assert old.process.wait(DEADLINE) == 0, old.log + new.log
            with connected(path) as again:
                assert fds(again) == before
            new.process.terminate()
            assert new.process.wait(DEADLINE) == 0, new.log
            assert "Traceback" not in new.log


@pytest.mark.timeout(60 + 5 * KILLS)
def test_an_old_worker_killed_at_any_time(path: Path) -> None:
    """Either the predecessor restarts, or the successor has everything: never both."""
    outcomes = set()
    for step in range(KILLS):
        with _takeover(path) as (old, new, before):
            time.sleep(0.05 + 0.5 * step / KILLS)
            for worker in children(old.pid):
                os.kill(worker, signal.SIGKILL)
            ended = until(
                lambda: [d for d in (old, new) if d.process.poll() is not None],
                old.log + new.log,
            )
            outcomes.add(old in ended)
            with connected(path) as again:
                assert fds(again) == before, old.log + new.log
            survivor = new if old in ended else old
            assert survivor.process.poll() is None
            survivor.process.terminate()
            assert survivor.process.wait(DEADLINE) == 0
            assert "Traceback" not in old.log + new.log
    assert outcomes


def test_a_worker_killed_after_the_hand_over(path: Path) -> None:
    """A worker killed after it has handed over does not restart: its parent ends."""
    for moment in (0.0, 0.001, 0.003, 0.01):
        with supervised(path, status=None) as old, old.client() as client:
            for _ in range(8):
                client.execute("add-fds", fds=[0] * 250)
            (worker,) = children(old.pid)
            with supervised(path, "--takeover") as new:
                until(lambda: "took over" in new.log)
                time.sleep(moment)
                with suppress(ProcessLookupError):
                    os.kill(worker, signal.SIGKILL)
                assert old.process.wait(DEADLINE) == 0, old.log
                with new.client() as again:
                    assert len(fds(again)) == 2000


def test_sigint_while_the_parent_starts(path: Path) -> None:
    """Ctrl-C right after execve(2) of the parent's program: no traceback."""
    with subprocess.Popen(
        [*COMMAND, "--supervise", "--socket", str(path)], stderr=subprocess.PIPE, text=True
    ) as process:
        line = Path(f"/proc/{process.pid}/cmdline")
        until(lambda: b"\0-I\0" in line.read_bytes(), "the parent's program")
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=DEADLINE)
    assert "Traceback" not in said
    assert process.returncode == 0
    assert not path.exists()


def test_sigterm_while_a_worker_starts(path: Path) -> None:
    """SIGTERM at any moment of a worker's start, also between fork(2) and execve(2)."""
    for moment in range(8):
        with supervised(path, status=None) as daemon:
            with daemon.client() as client:
                for _ in range(4):
                    client.execute("add-fds", fds=[0] * 250)
            daemon.worker()
            daemon.kill_worker()
            until(lambda: "starting it again" in daemon.log)
            time.sleep(moment * 0.002)
            daemon.process.terminate()
            assert daemon.process.wait(DEADLINE) in (0, 128 + signal.SIGKILL), daemon.log


def test_status_shows_whether_descriptors_are_kept_safe(path: Path) -> None:
    with supervised(path, status=None) as daemon, daemon.client() as client:
        assert client.execute("query-stats")["kept-safe"] is True
        os.kill(daemon.pid, signal.SIGKILL)
        until(lambda: client.execute("query-stats")["kept-safe"] is False)
        client.execute("quit")


def test_the_parent_has_no_room(path: Path) -> None:
    """The parent's RLIMIT_NOFILE is lowered (prlimit(2)): replies wait until their descriptors are
    stored, which happens as soon as there is room.
    """
    with supervised(path) as daemon:
        daemon.worker()
        _, hard = resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (daemon.open_fds() + 5, hard))
        answered: list[str] = []

        def add(opaque: str) -> None:
            with daemon.client() as client:
                client.execute("add-fd", {"opaque": opaque}, [0])
                answered.append(opaque)

        with ThreadPoolExecutor(20) as threads:
            added = [threads.submit(add, f"n{number}") for number in range(20)]
            until(lambda: "was not kept safe" in daemon.log)
            with daemon.client() as other:  # replies without changes do not wait
                other.execute("query-version")
            assert len(answered) < 20
            resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (hard, hard))
            for each in added:
                each.result(DEADLINE)
        daemon.kill_worker()
        with daemon.client() as client:
            kept = {fd["opaque"] for fd in client.execute("query-fds")}
        assert kept == set(answered) == {f"n{number}" for number in range(20)}


def test_killed_while_descriptors_are_replaced(path: Path) -> None:
    """After a kill, either the old or the new descriptor of a replacement is there."""
    with supervised(path) as daemon:
        with daemon.client() as client:
            client.execute("add-fds", {"opaque": "web"}, [0])
            client.execute("add-fds", {"opaque": "other"}, [0])
        replace = {"opaque": "web", "if-exists": "replace"}
        for attempt in range(12):
            worker = daemon.worker()
            with socket.socket(socket.AF_UNIX) as sock:
                sock.connect(str(path))
                sock.sendall(b'{"execute": "qmp_capabilities"}')
                wanted = json.dumps({"execute": "add-fds", "arguments": replace}).encode()
                rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", 0))]
                for _ in range(1 + 3 * attempt):
                    sock.sendmsg([wanted], rights)
                os.kill(worker, signal.SIGKILL)
            with daemon.client() as client:
                daemon.worker()
                found = [fd["opaque"] for fd in client.execute("query-fds")]
                assert sorted(found) == ["other", "web"]
        with daemon.client() as client:
            assert client.execute("remove-fds", {"opaque": "other"})
        daemon.kill_worker()
        with daemon.client() as client:
            assert [fd["opaque"] for fd in client.execute("query-fds")] == ["web"]


@pytest.mark.parametrize("size", [40 << 10, 256 << 10])
def test_the_journal_cannot_grow(path: Path, size: int) -> None:
    """RLIMIT_FSIZE limits the journal's memfd: changes without room are refused, acknowledged ones
    come back, and removed descriptors do not.
    """
    with supervised(path) as daemon, daemon.client() as client:
        resource.prlimit(daemon.worker(), resource.RLIMIT_FSIZE, (size, size))
        answered = refused = 0
        with socket.socket(socket.AF_UNIX) as sock, sock.makefile("rb") as replies:
            sock.connect(str(path))
            sock.sendall(request("qmp_capabilities"))
            assert b"QMP" in replies.readline()
            assert b"return" in replies.readline()
            # Pipelined: room is reserved for each command before the next is executed.
            for _ in range(12):
                os.kill(daemon.worker(), signal.SIGSTOP)
                for _ in range(16):
                    send_now(sock, request("add-fd", {"opaque": "x" * 2000}), [0])
                os.kill(daemon.worker(), signal.SIGCONT)
                for _ in range(16):
                    if b"error" in replies.readline():
                        refused += 1
                    else:
                        answered += 1
        assert refused
        assert answered > 20
        there = fds(client)
        assert len(there) == answered
        for fd in there[::2]:
            client.execute("remove-fd", {"fdset-id": fd["fdset-id"]})
        assert client.execute("query-stats")["kept-safe"]
        before = fds(client)
        assert len(before) == answered // 2
        daemon.kill_worker()
        with daemon.client() as again:
            assert lasting(fds(again)) == lasting(before)


@pytest.mark.parametrize("kind", [socket.AF_UNIX, socket.AF_NETLINK])
def test_descriptors_that_a_client_refuses_are_stored_again(path: Path, kind: int) -> None:
    with supervised(path) as daemon:
        with daemon.client() as client:
            with socket.socket(kind, socket.SOCK_DGRAM) as sock:
                client.add_fds([sock], opaque="n")
            before = fds(client)
            with socket.socket(socket.AF_UNIX) as refusing:
                refusing.connect(os.fspath(path))
                try:
                    refusing.setsockopt(socket.SOL_SOCKET, 83, 0)  # SO_PASSRIGHTS
                except OSError:
                    pytest.skip("this kernel has no SO_PASSRIGHTS")
                taking = request("open-fdset", {"opaque": "n", "remove": True})
                refusing.sendall(request("qmp_capabilities") + taking)
                with refusing.makefile() as replies:
                    assert "error" in [json.loads(next(replies)) for _ in range(3)][-1]
            assert fds(client) == before
            daemon.kill_worker()
        with daemon.client() as client:
            assert fds(client) == before
            client.remove_fds(opaque="n")
            assert fds(client) == []
