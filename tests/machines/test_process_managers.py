"""The daemon under s6 and runit, as process 1 of a container, and with --ready-fd."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers import ROOT
from installed import need, need_namespaces
from supervised import children, connected, until

SERVE = [sys.executable, "-m", "qmpfd", "serve"]
DEADLINE = 30.0


def write_service(folder: Path, *options: str) -> None:
    """Write a service for s6 or runit: a folder with a program ``run``."""
    folder.mkdir(parents=True)
    run = folder / "run"
    log = shlex.quote(str(folder / "log"))
    # Working directory and log are set in the run file: the managers have no settings for them.
    run.write_text(
        f"#!/bin/sh\nexec 2>>{log}\ncd {shlex.quote(str(ROOT))}\n"
        f"exec {shlex.join([*SERVE, *options])}\n"
    )
    run.chmod(0o755)


@contextmanager
def running(*command: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program; end it with SIGTERM at the end of the block."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(DEADLINE)


def store(path: Path) -> list[object]:
    """Add a descriptor; return the listing."""
    with connected(path) as client:
        client.execute("add-fd", {"opaque": "kept"}, [0])
        return list(client.execute("query-fdsets"))


def sets(path: Path) -> list[object]:
    with connected(path) as client:
        return list(client.execute("query-fdsets"))


def only_child(pid: int) -> int:
    found: list[int] = until(lambda: children(pid), f"a child of process {pid}")
    (child,) = found
    return child


@contextmanager
def s6_service(path: Path, *options: str) -> Iterator[Path]:
    """Run the daemon under s6, wait until it is ready, and yield its service folder."""
    scan = path.with_name("scan")
    service = scan / "qmpfd"
    write_service(service, "--socket", str(path), "--ready-fd", "3", *options)
    (service / "notification-fd").write_text("3\n")
    with running(need("s6-svscan"), str(scan)):
        until((service / "supervise").exists, "s6-supervise")
        subprocess.run(["s6-svwait", "-U", "-t", "30000", str(service)], check=True)
        try:
            yield service
        finally:
            subprocess.run(["s6-svc", "-wD", "-T", "30000", "-d", str(service)], check=True)
            subprocess.run(["s6-svscanctl", "-t", str(scan)], check=True)


def s6_pid(service: Path) -> int:
    """Return the process id of the service."""
    output = subprocess.run(
        ["s6-svstat", "-o", "pid", str(service)], check=True, capture_output=True, text=True
    )
    return int(output.stdout)


@pytest.mark.parametrize("options", [[], ["--supervise"]], ids=["plain", "supervised"])
def test_s6_hears_that_it_is_ready(path: Path, options: list[str]) -> None:
    with s6_service(path, *options) as service:
        assert store(path)  # s6_service has waited for readiness
        pid = s6_pid(service)
        subprocess.run(["s6-svc", "-wR", "-T", "30000", "-r", str(service)], check=True)
        assert s6_pid(service) != pid
        assert sets(path) == []
    assert not path.exists()


def test_s6_and_a_worker_that_is_killed(path: Path) -> None:
    with s6_service(path, "--supervise") as service:
        before = store(path)
        pid = s6_pid(service)
        worker = only_child(pid)
        os.kill(worker, signal.SIGKILL)
        assert sets(path) == before
        assert s6_pid(service) == pid
        assert only_child(pid) != worker


def test_s6_and_a_parent_that_is_killed(path: Path) -> None:
    """The worker serves on; with --replace, the daemon that s6 then starts takes over from it."""
    with s6_service(path, "--supervise", "--replace") as service:
        before = store(path)
        pid = s6_pid(service)
        worker = only_child(pid)
        os.kill(pid, signal.SIGKILL)
        until(lambda: not Path(f"/proc/{worker}").exists(), "a takeover")
        assert s6_pid(service) not in (0, pid)
        assert sets(path) == before


def test_runit(path: Path) -> None:
    service = path.with_name("qmpfd")
    write_service(service, "--socket", str(path), "--supervise")
    check = service / "check"  # sv start waits until this program succeeds
    check.write_text(
        f"#!/bin/sh\nexec {shlex.join([sys.executable, '-m', 'qmpfd'])} status "
        f"--socket {shlex.quote(str(path))} >/dev/null 2>&1\n"
    )
    check.chmod(0o755)
    sv = need("sv")
    with running(need("runsv"), str(service)):
        until((service / "supervise" / "ok").exists, "runsv")
        subprocess.run([sv, "-w", "30", "start", str(service)], check=True, cwd=ROOT)
        before = store(path)
        pid = int((service / "supervise" / "pid").read_text())
        os.kill(only_child(pid), signal.SIGKILL)
        assert sets(path) == before
        subprocess.run([sv, "-w", "30", "down", str(service)], check=True)
        assert not path.exists()
        subprocess.run([sv, "-w", "30", "exit", str(service)], check=True)


@pytest.mark.root
@pytest.mark.parametrize("options", [[], ["--supervise"]], ids=["plain", "supervised"])
def test_as_process_1(path: Path, options: list[str]) -> None:
    """In a pid namespace, where process 1 ignores signals without handler (pid_namespaces(7))."""
    unshare = ["unshare", "--pid", "--mount", "--fork", "--mount-proc"]
    need_namespaces(*unshare[1:])
    command = [*unshare, *SERVE, "--socket", str(path), *options]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL)
    try:
        before = store(path)
        init = only_child(process.pid)
        if options:
            os.kill(only_child(init), signal.SIGKILL)
        assert sets(path) == before
        os.kill(init, signal.SIGTERM)
        assert process.wait(DEADLINE) == 0
        assert not path.exists()
    finally:
        process.kill()
        process.wait(DEADLINE)


def test_a_ready_descriptor_that_was_not_passed(path: Path) -> None:
    done = subprocess.run(
        [*SERVE, "--socket", str(path), "--ready-fd", "77"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == "qmpfd: --ready-fd: descriptor 77 was not passed to this process\n"


@pytest.mark.parametrize("options", [[], ["--supervise"]], ids=["plain", "supervised"])
def test_a_reader_of_readiness_that_is_gone(path: Path, options: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [*SERVE, "--socket", str(path), "--ready-fd", str(writer), *options]
    process = subprocess.Popen(command, cwd=ROOT, pass_fds=[writer])
    os.close(writer)
    try:
        assert sets(path) == []
    finally:
        process.terminate()
        assert process.wait(DEADLINE) == 0
