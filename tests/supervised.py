"""Run ``serve --supervise``, for tests that kill the worker or the parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from helpers import ROOT

from qmpfd.client.blocking import BlockingClient, NoDaemon

DEADLINE = 30.0
COMMAND = [sys.executable, "-m", "qmpfd", "serve"]


def children(pid: int) -> list[int]:
    """Return the running child processes of a process."""
    try:
        return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def until(happened: Any, what: str = "it") -> Any:
    """Wait until a function returns something true; return that."""
    deadline = time.monotonic() + DEADLINE
    while not (result := happened()):
        assert time.monotonic() < deadline, f"{what} did not happen"
        time.sleep(0.005)
    return result


class Supervised:
    """A supervising parent and its worker."""

    def __init__(self, process: subprocess.Popen[bytes], path: Path, log: Path) -> None:
        self.process = process
        self.path = path
        self._log = log

    @property
    def pid(self) -> int:
        """Process id of the parent."""
        return self.process.pid

    @property
    def log(self) -> str:
        """Log of both processes."""
        return self._log.read_text()

    def worker(self) -> int:
        """Wait until a worker serves; return its process id."""

        def served() -> int:
            assert self.process.poll() is None, self.log
            found = children(self.pid)
            return found[0] if found and self.log.count("listening on") > self._deaths else 0

        return int(until(served, "a worker"))

    _deaths = 0

    def kill_worker(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal to the serving worker."""
        pid = self.worker()
        self._deaths = self.log.count("listening on")
        os.kill(pid, number)

    def client(self) -> BlockingClient:
        """Connect, as soon as a worker serves."""
        return connected(self.path)

    def open_fds(self) -> int:
        """Return the number of descriptors that the parent has open."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))


def spare_of(daemon: Supervised) -> int:
    """Wait until the spare worker is ready; return its process id."""

    def ready() -> list[int]:
        # The worker has forked it; or the parent has executed it.
        pids = [*children(daemon.worker()), *children(daemon.pid)]
        return [pid for pid in pids if is_spare(pid)]

    return int(until(ready, "a spare")[0])


def is_spare(pid: int) -> bool:
    """Return whether a process is a ready spare worker."""
    try:
        return Path(f"/proc/{pid}/comm").read_text() == "qmpfd-spare\n"
    except (FileNotFoundError, ProcessLookupError):
        return False


def connected(path: Path) -> BlockingClient:
    """Connect to a daemon, and retry while it restarts."""
    deadline = time.monotonic() + DEADLINE
    while True:
        try:
            return BlockingClient(path, DEADLINE)
        except NoDaemon:
            assert time.monotonic() < deadline
            time.sleep(0.01)


@contextmanager
def supervised(
    path: Path,
    *options: str,
    env: Mapping[str, str] | None = None,
    pass_fds: Sequence[int] = (),
    status: int | None = 0,
    named: bool = True,
    open_files: int | None = None,
) -> Iterator[Supervised]:
    """Run a supervised daemon; end it with SIGTERM at the end, and check its log.

    *status*: expected exit status of the parent, None for any.  *open_files*: RLIMIT_NOFILE of
    both processes.
    """
    log = path.with_name(f"{path.name}-{time.monotonic_ns()}.log")
    where = ["--socket", os.fspath(path)] if named else []
    shell = ["sh", "-c", f'ulimit -n {open_files} && exec "$@"', "sh"] if open_files else []
    with log.open("wb") as file:
        process = subprocess.Popen(
            [*shell, *COMMAND, "--supervise", *where, *options],
            cwd=ROOT,
            stderr=file,
            pass_fds=pass_fds,
            env={**os.environ, **(env or {})},
        )
    started = Supervised(process, path, log)
    try:
        yield started
        if process.poll() is None:
            process.terminate()
        ended = process.wait(DEADLINE)
        assert status in (None, ended), started.log
        assert "Traceback" not in started.log, started.log
    finally:
        workers = children(process.pid)
        if process.poll() is None:
            process.send_signal(signal.SIGCONT)
            process.kill()
            process.wait(DEADLINE)
        for worker in workers:
            os.kill(worker, signal.SIGKILL)


def lasting(fds: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the listed descriptors without the members that change with time."""
    return [{k: v for k, v in fd.items() if k not in ("age", "expires")} for fd in fds]
