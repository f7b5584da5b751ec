"""The packaged units, unmodified, under a systemd that is process 1."""

from __future__ import annotations

import grp
import os
import signal
import socket
import stat
from collections.abc import Iterator
from typing import Any

import pytest

from qmpfd.errors import QMPError

from .machine import DEADLINE, Machine, booted, until

pytestmark = [pytest.mark.slow, pytest.mark.root]

SERVICE = "qmpfd.service"
KEPT = 60


@pytest.fixture
def machine() -> Iterator[Machine]:
    with booted() as made:
        yield made


@pytest.fixture
def active(machine: Machine) -> Machine:
    """Machine with a listening qmpfd.socket, and no daemon yet."""
    machine.systemctl("start", "qmpfd.socket")
    return machine


def fill(machine: Machine, path: str = "/run/qmpfd.sock", count: int = KEPT) -> list[Any]:
    """Store descriptors; return the listing."""
    with machine.client(path) as client:
        for number in range(count):
            with os.fdopen(os.memfd_create(f"{number}")) as file:  # systemd stores no duplicates
                client.execute("add-fd", {"opaque": f"{number}"}, [file])
    return sets(machine, path)


def sets(machine: Machine, path: str = "/run/qmpfd.sock") -> list[Any]:
    with machine.client(path) as client:
        return list(client.execute("query-fdsets"))


def with_options(options: str) -> tuple[str, str]:
    """Return the settings of a service that starts the daemon with *options*."""
    return ("ExecStart=", f"ExecStart=/usr/bin/qmpfd serve {options}")


def test_the_first_client_starts_it(active: Machine) -> None:
    assert active.main_pid(SERVICE) == 0
    assert sets(active) == []
    assert active.main_pid(SERVICE) != 0
    assert active.show(SERVICE, "StatusText").startswith("0 descriptors")
    fill(active)
    until(lambda: active.show(SERVICE, "StatusText").startswith(f"{KEPT} desc"), "the new status")


def test_kill(active: Machine) -> None:
    before = fill(active)
    for _ in range(7):  # more often than systemd's usual limit on starts
        active.kill(SERVICE)
        assert sets(active) == before


def test_restart(active: Machine) -> None:
    before = fill(active)
    active.systemctl("restart", SERVICE)
    assert sets(active) == before


def test_stop_lets_go(active: Machine) -> None:
    fill(active)
    active.systemctl("stop", SERVICE)
    assert active.show(SERVICE, "NFileDescriptorStore") == "0"
    assert sets(active) == []


@pytest.mark.parametrize("verb", ["daemon-reload", "daemon-reexec"])
def test_systemd_itself_starts_anew(active: Machine, verb: str) -> None:
    before = fill(active)
    pid = active.main_pid(SERVICE)
    active.systemctl(verb)
    assert active.main_pid(SERVICE) == pid
    assert sets(active) == before
    after = fill(active, count=1)  # systemd still stores new descriptors
    active.kill(SERVICE)
    assert sets(active) == after


def test_a_daemon_that_hangs(active: Machine) -> None:
    before = fill(active)
    active.drop_in(SERVICE, "WatchdogSec=2", "TimeoutAbortSec=1")
    active.systemctl("restart", SERVICE)
    pid = active.main_pid(SERVICE)
    active.kill(SERVICE, signal.SIGSTOP)
    active.await_restart(SERVICE, pid)
    assert active.show(SERVICE, "NRestarts") != "0"
    assert sets(active) == before


def test_a_worker_that_hangs_in_a_service_without_an_fd_store(machine: Machine) -> None:
    """The parent sends the watchdog's heartbeats, and restarts the worker: nothing is lost."""
    machine.drop_in(
        SERVICE,
        *with_options("--supervise"),
        *("WatchdogSec=3", "FileDescriptorStoreMax=0", "UnsetEnvironment=FDSTORE"),
        "KillMode=mixed",
    )
    machine.systemctl("start", SERVICE)
    before = fill(machine)
    parent = machine.main_pid(SERVICE)
    [worker] = machine.run("pgrep", "-P", str(parent)).stdout.split()
    assert machine.run("kill", "-STOP", worker).returncode == 0
    until(lambda: "killing it" in machine.log("qmpfd"), "the end of the worker")
    assert sets(machine) == before
    assert machine.main_pid(SERVICE) == parent
    assert machine.show(SERVICE, "NRestarts") == "0"
    # The heartbeats continue for longer than WatchdogSec.
    heard = int(machine.show(SERVICE, "WatchdogTimestampMonotonic"))
    later = heard + 4_000_000  # us
    until(lambda: int(machine.show(SERVICE, "WatchdogTimestampMonotonic")) > later, "heartbeats")
    assert machine.main_pid(SERVICE) == parent
    assert sets(machine) == before


def test_stop_keeps_where_told_so(active: Machine) -> None:
    if active.version < 254:
        pytest.skip(f"systemd {active.version} has no FileDescriptorStorePreserve=, 254 has")
    active.drop_in(SERVICE, "FileDescriptorStorePreserve=yes")
    before = fill(active)
    active.systemctl("stop", SERVICE)
    assert sets(active) == before


def test_a_dynamic_user(machine: Machine) -> None:
    machine.drop_in(SERVICE, "DynamicUser=yes")
    machine.systemctl("start", "qmpfd.socket")
    before = fill(machine)
    uid = machine.path(f"/proc/{machine.main_pid(SERVICE)}").stat().st_uid
    assert uid >= 61184  # lowest uid of DynamicUser=
    machine.kill(SERVICE)
    assert sets(machine) == before


def test_a_lowered_maximum(active: Machine) -> None:
    """systemd drops the oldest descriptors, the journal among them.  The daemon logs that nothing
    is safe any more; after a restart it has the remaining descriptors, without sets and texts.
    """
    fill(active, count=20)
    active.drop_in(SERVICE, "FileDescriptorStoreMax=10", "Environment=FDSTORE=10")
    until(lambda: "no longer kept safe" in active.log("qmpfd"), "a warning")
    left = active.show(SERVICE, "NFileDescriptorStore")
    active.kill(SERVICE)
    assert str(sum(len(each["fds"]) for each in sets(active))) == left == "10"


def test_a_maximum_that_is_lowered_to_more_than_there_is(active: Machine) -> None:
    """systemd drops new descriptors beyond the maximum: those are refused, the others stay safe.
    From version 254 on, it closes later what it drops: each of many more is refused as well.
    """
    fill(active, count=20)
    active.drop_in(SERVICE, "FileDescriptorStoreMax=40")
    refusals: list[str] = []
    added = 0
    with active.client() as client:
        while len(refusals) < 200:
            try:
                with os.fdopen(os.memfd_create("x")) as file:
                    client.execute("add-fd", fds=[file])
            except QMPError as exc:
                refusals.append(exc.desc)
            else:
                added += 1
                assert not refusals
        assert all("cannot be kept safe" in refusal for refusal in refusals)
        assert 10 < added < 20
        assert client.execute("query-stats")["kept-safe"]
    before = sets(active)
    assert len(before) == 20 + added
    active.drop_in(SERVICE, "FileDescriptorStoreMax=100")
    active.kill(SERVICE)
    assert sets(active) == before


def test_two_of_the_template(machine: Machine) -> None:
    machine.systemctl("start", "qmpfd@one.service", "qmpfd@two.service")
    paths = {name: f"/run/qmpfd/{name}/qmpfd.sock" for name in ("one", "two")}
    before = {name: fill(machine, path) for name, path in paths.items()}
    for name, path in paths.items():
        machine.kill(f"qmpfd@{name}.service")
        assert sets(machine, path) == before[name]
    machine.systemctl("stop", "qmpfd@one.service")
    assert not machine.path(paths["one"]).exists()
    assert sets(machine, paths["two"]) == before["two"]


def test_reload(active: Machine) -> None:
    """systemctl reload returns when the new policy is in force; before systemd 253, earlier."""
    policy = active.path("/run/policy.toml")
    policy.write_text("")
    active.drop_in(SERVICE, *with_options("--policy /run/policy.toml"))
    fill(active)
    pid = active.main_pid(SERVICE)
    policy.write_text('[[rule]]\nuser = "nobody"\nallow = ["query"]\n')
    active.systemctl("reload", SERVICE)
    if active.version < 253:
        until(lambda: "policy is read again" in active.log("qmpfd"), "a reload")
    assert "policy is read again" in active.log("qmpfd")
    assert active.main_pid(SERVICE) == pid
    assert active.show(SERVICE, "ActiveState") == "active"


def test_a_daemon_that_cannot_start(active: Machine) -> None:
    """systemd keeps starting the service, and keeps its socket, however often it fails."""
    before = fill(active)
    policy = active.path("/run/policy.toml")
    policy.write_text("not TOML")
    active.drop_in(SERVICE, *with_options("--policy /run/policy.toml"))
    active.run("systemctl", "restart", SERVICE)
    with socket.socket(socket.AF_UNIX) as waiting:
        waiting.connect(os.fspath(active.path("/run/qmpfd.sock")))
        # systemd's default limit is 5 starts in 10 s.
        until(lambda: active.log("qmpfd").count("policy.toml") > 6, "7 starts")
        policy.write_text("")
        assert sets(active) == before
        waiting.settimeout(DEADLINE)
        assert b"QMP" in waiting.recv(1024)


def test_the_group_of_a_socket(machine: Machine) -> None:
    """The template's unit reads the options of an instance from a file."""
    group = grp.getgrgid(1)
    folder = machine.path("/etc/qmpfd")
    folder.mkdir()
    (folder / "vms.conf").write_text(
        f"QMPFD_OPTIONS=--socket-mode 660 --socket-group {group.gr_name}\n"
    )
    machine.systemctl("start", "qmpfd@vms")
    status = machine.path("/run/qmpfd/vms/qmpfd.sock").stat()
    assert (status.st_gid, stat.S_IMODE(status.st_mode)) == (group.gr_gid, 0o660)
