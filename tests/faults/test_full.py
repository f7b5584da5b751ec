"""The descriptor table, the disk, or the pipe of the log is full."""

from __future__ import annotations

import os
import resource
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers import Pipe, open_fds, pipes, request, value

from .harness import (
    SECONDS,
    Caller,
    Harness,
    assert_service_unharmed,
    hung_files,
    needs_fuse,
    until,
)


@contextmanager
def _no_room(harness: Harness, room: int = 0) -> Iterator[None]:
    """Limit the daemon to *room* more descriptors (prlimit(2)) while the block runs."""
    used = open_fds(harness.daemon.pid)
    limit = max(used) + 1
    limit += max(0, room - (limit - len(used)))  # free numbers below the highest count too
    old = resource.prlimit(harness.daemon.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(harness.daemon.pid, resource.RLIMIT_NOFILE, (limit, old[1]))
    try:
        yield
    finally:
        resource.prlimit(harness.daemon.pid, resource.RLIMIT_NOFILE, old)


def test_accept_at_a_full_table(path: Path) -> None:
    """New clients get an error and are disconnected, without a busy loop; later ones are served."""

    def scenario(harness: Harness) -> None:
        caller = harness.caller()
        with _no_room(harness):
            before = harness.cpu()
            waiting = [harness.caller(negotiate=False) for _ in range(20)]
            for other in waiting:
                output = other.reply()["error"]
                assert "out of file descriptors" in output["desc"]
                assert other.reply() == {}
            time.sleep(max(SECONDS, 1))
            used = harness.cpu() - before
            # The probe's thousand requests a second are the only other work.
            assert used < 0.5 * max(SECONDS, 1), f"{used} s of CPU"
            with Pipe() as pipe:
                refused = caller.call("add-fd", None, [pipe])
                assert "out of file descriptors" in refused["error"]["desc"]
                pipe.release()
                assert not pipe.held()
            assert value(caller.call("query-name")) == {}
        value(harness.caller().call("query-name"))

    assert_service_unharmed(path, scenario)


def test_accept_without_the_reserve(path: Path) -> None:
    """RLIMIT_NOFILE below the open descriptors: accept4(2) fails, without a busy loop."""

    def scenario(harness: Harness) -> None:
        old = resource.prlimit(harness.daemon.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(harness.daemon.pid, resource.RLIMIT_NOFILE, (3, old[1]))
        before = harness.cpu()
        waiting = [harness.caller(negotiate=False) for _ in range(20)]
        time.sleep(1)
        used = harness.cpu() - before
        resource.prlimit(harness.daemon.pid, resource.RLIMIT_NOFILE, old)
        assert used < 0.5, f"{used} s of CPU"
        for other in waiting:  # served, or rejected with an error
            assert other.reply().keys() <= {"QMP", "error"}
        value(harness.caller().call("query-name"))

    assert_service_unharmed(path, scenario)


def test_the_table_shrinks_under_load(path: Path) -> None:
    def scenario(harness: Harness) -> None:
        for kind in ("reading:adds", "reading:unclaimed", "connections"):
            harness.attack(kind, 4)
        caller = harness.caller()
        ends = time.monotonic() + SECONDS
        while time.monotonic() < ends:
            for room in (40, 3, 0):
                with _no_room(harness, room):
                    for _ in range(10):
                        value(caller.call("query-stats"))
                    time.sleep(0.02)

    assert_service_unharmed(path, scenario)


def test_all_or_nothing_at_a_full_table(path: Path) -> None:
    def scenario(harness: Harness) -> None:
        caller = harness.caller()
        with pipes(5) as made, _no_room(harness, 4):
            refused = caller.call("add-fds", None, made)
            assert "out of file descriptors" in refused["error"]["desc"]
            for pipe in made:
                pipe.release()
            assert not any(pipe.held() for pipe in made)
            assert value(caller.call("query-fdsets")) == []

    assert_service_unharmed(path, scenario)


@contextmanager
def _tiny_disk(folder: Path) -> Iterator[Path]:
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", "size=8k", "qmpfd-test"]
    subprocess.run(["mount", *options, folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)
        folder.rmdir()


@pytest.mark.root
def test_the_disk_of_the_metrics_is_full(path: Path) -> None:
    """The daemon logs one warning, and leaves the old metrics whole."""
    with _tiny_disk(path.parent / "disk") as disk:
        file = disk / "metrics"
        (disk / "filler").write_bytes(bytes(4096))
        file.write_text("# EOF\n")

        def scenario(harness: Harness) -> None:
            harness.daemon.await_line(lambda line: "cannot write the metrics" in line)
            time.sleep(SECONDS)
            assert file.read_text() == "# EOF\n"
            assert sorted(os.listdir(disk)) == ["filler", "metrics"]

        assert_service_unharmed(path, scenario, "--metrics", os.fspath(file))


@needs_fuse
def test_the_disk_of_the_metrics_hangs(path: Path) -> None:
    with hung_files(path.parent / "mnt") as files:
        files.hang("LOOKUP", "GETATTR", "OPEN", "WRITE", "FLUSH")

        def scenario(harness: Harness) -> None:
            time.sleep(SECONDS)
            # Before the daemon ends: a process that waits for a file system cannot exit.
            harness.stack.callback(files.abort)

        assert_service_unharmed(path, scenario, "--metrics", os.fspath(files.folder / "metrics"))


def test_nobody_reads_the_log(path: Path) -> None:
    """The pipe of the log is full at level debug, which logs each command."""

    def scenario(harness: Harness) -> None:
        caller = harness.caller()
        for _ in range(5000):
            value(caller.call("query-name"))
        harness.caller()
        for _ in range(300):
            with Caller(harness.path, negotiate=False) as other:
                other.reply()

    assert_service_unharmed(path, scenario, "--log-level", "debug", "--max-connections", "3")


@pytest.mark.parametrize("count", [200])
def test_closed_while_requests_wait(count: int, path: Path) -> None:
    """A client sends 5 removals and disconnects, 200 times: QEMU loses nearly all of them."""

    def scenario(harness: Harness) -> None:
        watcher = harness.caller()
        for _ in range(count):
            with pipes(5) as made:
                with harness.caller() as client:
                    for pipe in made:
                        value(client.call("add-fd", None, [pipe]))
                        pipe.release()
                    client.send(b"".join(request("remove-fd", {"fdset-id": n}) for n in range(5)))
                until(lambda made=made: not any(p.held() for p in made), "removed")  # type: ignore[misc]
        assert value(watcher.call("query-fdsets")) == []

    assert_service_unharmed(path, scenario)
