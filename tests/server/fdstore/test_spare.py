"""The spare worker of ``serve --supervise`` replaces the worker, and affects nothing before.

Tests of cli/spare.py and cli/spare_keeper.py.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from faults.harness import hung_files, needs_fuse
from helpers import ROOT, open_fds
from supervised import (
    DEADLINE,
    Supervised,
    children,
    connected,
    is_spare,
    lasting,
    spare_of,
    supervised,
    until,
)

import qmpfd.supervisor
from qmpfd.client.blocking import BlockingClient
from qmpfd.kernel.fd import Fd
from qmpfd.supervisor.log import Log
from qmpfd.supervisor.program import Program


def is_gone(pid: int) -> bool:
    """Return whether a process has ended and is reaped."""
    return not Path(f"/proc/{pid}").exists()


def fds(client: BlockingClient) -> list[dict[str, Any]]:
    return lasting(client.execute("query-fds"))


def fill(client: BlockingClient, count: int) -> None:
    """Store descriptors, with gaps in their numbers."""
    with open("/dev/null") as null:
        for number in range(count):
            client.execute("add-fd", {"opaque": f"n{number}"}, [null])
    for number in range(0, count, 3):
        client.execute("remove-fd", {"fdset-id": number})


def test_the_spare_replaces_the_worker(path: Path) -> None:
    """Repeatedly: each new worker has a new spare worker."""
    with supervised(path) as daemon:
        with daemon.client() as client:
            fill(client, 600)
            before = fds(client)
        for _ in range(4):
            spare = spare_of(daemon)
            daemon.kill_worker()
            with daemon.client() as client:
                assert fds(client) == before
            assert daemon.worker() == spare
            assert children(daemon.pid) == [spare]
            assert Path(f"/proc/{spare}/comm").read_text() != "qmpfd-spare\n"
        assert "now has the number" not in daemon.log
        spare = spare_of(daemon)
    assert is_gone(spare)


def test_the_spare_holds_no_descriptors(path: Path) -> None:
    """A spare worker, the first or a later one, holds no stored descriptor and no connection."""
    with supervised(path) as daemon:
        for _ in range(2):
            with daemon.client() as client, open("/dev/zero") as zero:
                client.execute("add-fd", fds=[zero])
                spare = spare_of(daemon)
                kinds = sorted(
                    target.partition(":")[0]
                    for number, target in open_fds(spare).items()
                    if number > 2 and "libffi" not in target  # left open by the import of ctypes
                )
                assert kinds == ["socket"], open_fds(spare)
            daemon.kill_worker()
            daemon.worker()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_new_process_closes_stored_descriptors_first() -> None:
    """The parent goes on when the new process has closed all stored descriptors (execve(2))."""
    command = [sys.executable, "-c", ""]
    program = Program(Log("text", "info"), command, set(), 10.0, select.poll())
    held = 0
    poll = select.poll()
    with ExitStack() as stack:
        for _ in range(1000):
            stack.enter_context(Fd(os.memfd_create("stored")))
        for _ in range(30):
            reader, writer = map(Fd, os.pipe2(os.O_CLOEXEC))
            with reader, writer:
                poll.register(reader, 0)
                started = program.execute()
                writer.close()  # as a removal does
                held += not poll.poll(0)
                poll.unregister(reader)
            started.sock.close()
            os.waitpid(started.pid, 0)
    assert held == 0


def test_a_removed_descriptor_is_closed_before_the_reply(path: Path) -> None:
    """A removed descriptor is closed before the reply, also after a restart by the spare worker."""
    reader, writer = os.pipe()
    with supervised(path) as daemon:
        with daemon.client() as client:
            client.execute("add-fd", fds=[writer])
        os.close(writer)
        spare_of(daemon)
        daemon.kill_worker()
        with daemon.client() as client:
            client.execute("remove-fd", {"fdset-id": 0})
            os.set_blocking(reader, False)
            assert os.read(reader, 1) == b""
    os.close(reader)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV])
def test_another_spare_is_started(path: Path, number: signal.Signals) -> None:
    with supervised(path) as daemon:
        first = spare_of(daemon)
        os.kill(first, number)
        until(lambda: is_gone(first), "its end")
        second = spare_of(daemon)
        assert second != first
        daemon.kill_worker()
        assert daemon.worker() == second


def test_killed_together_with_its_worker(path: Path) -> None:
    """Without a spare worker, the parent starts a worker itself."""
    with supervised(path) as daemon:
        with daemon.client() as client:
            fill(client, 30)
            before = fds(client)
        spare = spare_of(daemon)
        os.kill(daemon.worker(), signal.SIGSTOP)  # starts no other spare worker meanwhile
        os.kill(spare, signal.SIGKILL)
        daemon.kill_worker()
        with daemon.client() as client:
            assert fds(client) == before
        assert daemon.worker() != spare


def test_a_spare_that_hangs(path: Path) -> None:
    with supervised(path) as daemon:
        with daemon.client() as client:
            fill(client, 30)
            before = fds(client)
        spare = spare_of(daemon)
        os.kill(spare, signal.SIGSTOP)
        daemon.kill_worker()
        with daemon.client() as client:
            assert fds(client) == before
        assert daemon.worker() != spare
        assert "has not answered for 5.0 s: killing it" in daemon.log


def test_signals(path: Path) -> None:
    """A spare worker survives the signals that a worker survives."""
    with supervised(path) as daemon:
        spare = spare_of(daemon)
        for number in (signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGALRM):
            os.kill(spare, number)
        daemon.kill_worker()
        assert daemon.worker() == spare


def test_the_policy_is_read_when_it_is_needed(path: Path, tmp_path: Path) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text("")
    with supervised(path, "--policy", os.fspath(policy)) as daemon:
        spare = spare_of(daemon)
        policy.write_text("[[rule]\n")
        daemon.kill_worker()
        until(lambda: daemon.log.count("policy.toml") >= 2, "two tries")
        policy.write_text('[[rule]]\nuid = 65534\nallow = ["query"]\n')
        daemon.process.send_signal(signal.SIGHUP)
        assert daemon.worker() != spare


def test_the_parent_is_killed(path: Path) -> None:
    """The spare worker ends with the parent."""
    with supervised(path, status=-signal.SIGKILL) as daemon:
        spare, worker = spare_of(daemon), daemon.worker()
        daemon.process.kill()
        try:
            until(lambda: is_gone(spare), "its end")
            with connected(path) as client:
                assert client.execute("query-fdsets") == []
        finally:
            os.kill(worker, signal.SIGKILL)


@pytest.mark.parametrize("order", ["worker first", "parent first", "spare first"])
def test_all_are_killed(path: Path, order: str) -> None:
    with supervised(path, status=-signal.SIGKILL) as daemon:
        spare, worker = spare_of(daemon), daemon.worker()
        pids = {"worker first": (worker, daemon.pid, spare), "parent first": (daemon.pid, worker)}
        for pid in pids.get(order, (spare, worker, daemon.pid)):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        daemon.process.wait(DEADLINE)
        until(lambda: not is_spare(spare), "its end")
        for pid in children(daemon.pid):
            os.kill(pid, signal.SIGKILL)


def test_sigterm_while_the_spare_starts(path: Path) -> None:
    """SIGTERM right after the worker's death ends every process that has started.  The exit status
    is that of the death if the parent had not reaped the worker before the signal.
    """
    with supervised(path, status=None) as daemon:
        spare = spare_of(daemon)
        os.kill(daemon.worker(), signal.SIGKILL)
        daemon.process.terminate()
        assert daemon.process.wait(DEADLINE) in (0, 128 + signal.SIGKILL)
        until(lambda: not is_spare(spare), "its end")
        assert not path.exists()


def test_where_orphans_are_not_adopted(path: Path) -> None:
    """Without PR_SET_CHILD_SUBREAPER the parent starts workers itself."""
    parent = [sys.executable, "-I", "-S", "-W", "ignore", *qmpfd.supervisor.__path__]
    command = [sys.executable, "-m", "qmpfd", "serve", "--supervise", "--socket", os.fspath(path)]
    log = path.with_suffix(".log")
    with log.open("wb") as file, ExitStack() as stack:
        process = stack.enter_context(
            subprocess.Popen([*parent, "text", "info", "5", "", *command], stderr=file, cwd=ROOT)
        )
        stack.callback(process.kill)
        daemon = Supervised(process, path, log)
        with daemon.client() as client:
            fill(client, 30)
            before = fds(client)
        spare = spare_of(daemon)
        daemon.kill_worker()
        with daemon.client() as client:
            assert fds(client) == before
        assert daemon.worker() != spare
        until(lambda: not is_spare(spare), "its end")
        process.terminate()
        assert process.wait(DEADLINE) == 0


@needs_fuse
def test_a_file_that_hangs(path: Path, tmp_path: Path) -> None:
    """Two crashes while a stored file's mount hangs: all other descriptors come back."""
    with ExitStack() as stack:
        daemon = stack.enter_context(supervised(path))
        fd = stack.enter_context(Fd(os.dup(0)))  # closed after the abort: close(2) would hang
        files = stack.enter_context(hung_files(tmp_path / "mnt"))
        with Fd(os.open(files.folder / "file", os.O_RDWR | os.O_CLOEXEC)) as file:
            os.dup2(file.fileno(), fd.fileno(), inheritable=False)
        with daemon.client() as client:
            fill(client, 30)
            client.execute("add-fd", {"opaque": "hangs"}, [fd])
            client.execute("add-fds", {"opaque": "behind"}, [0] * 9)
            before = client.execute("query-fdsets")
        worker, spare = daemon.worker(), spare_of(daemon)
        files.hang("FLUSH", "RELEASE", "GETATTR", "POLL", "IOCTL", "FSYNC")
        for turn in range(2):
            os.kill(worker, signal.SIGKILL)  # hangs in exit(2), and stays the parent's child
            with daemon.client() as client:
                assert client.execute("query-fdsets") == before
                added = client.execute("add-fd", fds=[0])
                client.execute("remove-fd", {"fdset-id": added["fdset-id"]})
            assert daemon.log.count("killed and does not end: not waiting for it") == turn + 1
            worker = spare
            spare = until(lambda: [pid for pid in children(worker) if is_spare(pid)], "a spare")[0]  # noqa: B023
        files.abort()
