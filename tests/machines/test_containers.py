"""Claims of docs/howto/containers.md on sockets, users, networks and limits."""

from __future__ import annotations

import json
import os
import signal
import socket
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from helpers import daemon_process
from supervised import children, connected, until

from qmpfd.client.blocking import BlockingClient, NoDaemon
from qmpfd.errors import PermissionDenied, QMPError

from .containers import DEADLINE, ITS_ROOT, PYTHON, container, run

pytestmark = pytest.mark.root

SERVE = "exec $QMPFD serve --socket /run/qmpfd/q.sock"
SUPERVISED = pytest.mark.parametrize("options", ["", " --supervise"], ids=["plain", "supervised"])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Folder to be mounted; every user may enter it."""
    made = tmp_path / "volume"
    made.mkdir(mode=0o755)
    return made


def add(path: Path) -> list[Any]:
    """Store a descriptor; return the listing."""
    with connected(path) as client:
        client.execute("add-fd", {"opaque": "from outside"}, [0])
    return sets(path)


def sets(path: Path) -> list[Any]:
    with connected(path) as client:
        return list(client.execute("query-fdsets"))


def test_root_in_a_container_is_root(folder: Path) -> None:
    path = folder / "q.sock"
    with daemon_process(path):
        there = add(path)
        listed = run(folder, "$QMPFD ls --json --socket /run/qmpfd/q.sock")
    assert json.loads(listed.stdout) == there


def test_mount_the_folder_of_the_socket(folder: Path) -> None:
    """A bind mount of the socket file leads to the old socket after a restart of the daemon."""
    path = folder / "q.sock"
    script = """
        touch /run/alone
        mount --bind /run/qmpfd/q.sock /run/alone
        for socket in /run/qmpfd/q.sock /run/alone; do $QMPFD status --socket $socket >&2; done
        echo before; until [ -e /run/qmpfd/again ]; do sleep 0.1; done
        for socket in /run/qmpfd/q.sock /run/alone; do
            $QMPFD status --socket $socket >&2 && echo served || echo $?
        done
    """
    with ExitStack() as stack:
        with daemon_process(path):
            process = stack.enter_context(container(folder, script))
            assert process.stdout is not None
            assert process.stdout.readline() == "before\n"
        with daemon_process(path):
            (folder / "again").touch()
            assert process.stdout.read().split() == ["served", "3"]  # 3: no daemon


POLICY = """
[[rule]]
uid = {}
allow = ["query"]
"""


@pytest.mark.parametrize("uid", [None, ITS_ROOT, 0], ids=["no policy", "its root", "root"])
def test_root_of_a_user_namespace_is_a_stranger(folder: Path, uid: int | None) -> None:
    path, policy = folder / "q.sock", folder / "policy.toml"
    policy.write_text("" if uid is None else POLICY.format(uid))
    with daemon_process(path, "--socket-mode", "666", "--policy", str(policy)):
        there = add(path)
        listed = run(folder, "$QMPFD ls --json --socket /run/qmpfd/q.sock", users=True)
    if uid == ITS_ROOT:
        assert json.loads(listed.stdout) == there
    else:
        assert listed.returncode == 1
        assert f"uid {ITS_ROOT}" in listed.stderr


def test_a_daemon_that_has_users_of_its_own(folder: Path) -> None:
    """Root outside has no uid in the daemon's user namespace, so the daemon refuses it."""
    os.chown(folder, ITS_ROOT, ITS_ROOT)
    path = folder / "q.sock"
    with container(folder, f"{SERVE} --socket-mode 666", users=True) as process:
        until(path.exists, "a socket")
        inside = run(folder, "$QMPFD ls --json --socket /run/qmpfd/q.sock", users=True)
        assert json.loads(inside.stdout) == []
        with pytest.raises(PermissionDenied):
            sets(path)
        process.terminate()
        assert process.wait(DEADLINE) == 0


@SUPERVISED
def test_a_read_only_root_without_network(folder: Path, options: str) -> None:
    script = f"mount -o remount,bind,ro /; ! touch /etc/written 2>&-; {SERVE}{options}"
    path = folder / "q.sock"
    with container(folder, script, "--net") as process:
        before = add(path)
        if options:
            (worker,) = children(process.pid)
            os.kill(worker, signal.SIGKILL)
            assert sets(path) == before
        process.terminate()
        assert process.wait(DEADLINE) == 0


@SUPERVISED
def test_no_proc(folder: Path, options: str) -> None:
    path = folder / "q.sock"
    with container(folder, f"mount -t tmpfs tmpfs /proc; {SERVE}{options}") as process:
        before = add(path)
        with connected(path) as client:
            _, fds = client.request("open-fdset", {"fdset-id": before[0]["fdset-id"]})
            for fd in fds:
                fd.close()
            client.execute("remove-fd", {"fdset-id": before[0]["fdset-id"]})
        assert len(fds) == 1
        before = add(path)
        if options:
            (worker,) = children(process.pid)
            os.kill(worker, signal.SIGKILL)
            assert sets(path) == before
        process.terminate()
        assert process.wait(DEADLINE) == 0


@SUPERVISED
def test_no_dev(folder: Path, options: str) -> None:
    """A chroot(2) without /dev: one line says what is missing."""
    ran = run(folder, f"mount -t tmpfs tmpfs /dev; {SERVE}{options}")
    assert ran.returncode == 2
    assert ran.stderr == "qmpfd: /dev/null: No such file or directory\n"


@SUPERVISED
def test_few_descriptors(folder: Path, options: str) -> None:
    """Beyond the limit, descriptors are refused; stored ones stay."""
    path = folder / "q.sock"
    with container(folder, f"ulimit -n 128; {SERVE}{options}") as process:
        before = add(path)
        with connected(path) as client, ExitStack() as stack:
            files = [stack.enter_context(os.fdopen(os.memfd_create("many"))) for _ in range(128)]
            with pytest.raises(QMPError):
                client.execute("add-fds", fds=files)
            added = [client.execute("add-fd", fds=[file]) for file in files[:9]]
            assert len(added) == 9
        assert before[0] in sets(path)
        process.terminate()
        assert process.wait(DEADLINE) == 0


def test_a_socket_for_a_container_without_network(folder: Path) -> None:
    """A socket stays in the network namespace in which it was made."""
    path = folder / "q.sock"
    accept = "import socket; print(socket.socket(fileno=3).accept()[0].recv(100).decode())"
    with daemon_process(path), socket.create_server(("127.0.0.1", 0)) as listener:
        with connected(path) as client:
            added = client.execute("add-fd", {"opaque": "web"}, [listener])
        target = f"{added['fdset-id']}=3"
        script = f"exec $QMPFD exec --socket /run/qmpfd/q.sock {target} -- {PYTHON} -c '{accept}'"
        address = listener.getsockname()
        with container(folder, script, "--net") as process, socket.create_connection(address) as us:
            us.sendall(b"hello")
            output, _ = process.communicate(timeout=DEADLINE)
    assert output == "hello\n"


def test_an_abstract_socket_belongs_to_its_network(folder: Path) -> None:
    name = f"qmpfd-test-{os.getpid()}"
    script = f"""
        $QMPFD serve --socket @{name} & daemon=$!
        until $QMPFD status --socket @{name}; do sleep 0.1; done >/run/status 2>&1
        echo served; until [ -e /run/qmpfd/looked ]; do sleep 0.1; done; kill $daemon
    """
    with container(folder, script, "--net") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "served\n"
        with pytest.raises(NoDaemon):
            BlockingClient(f"@{name}", 1.0)
        (folder / "looked").touch()
        assert process.wait(DEADLINE) == 0


@SUPERVISED
def test_a_takeover_by_another_container(folder: Path, options: str) -> None:
    """Predecessor and successor are in different pid namespaces."""
    spaces = ("--pid", "--fork", "--kill-child", "--mount-proc")
    path = folder / "q.sock"
    with container(folder, SERVE + options, *spaces) as old:
        before = add(path)
        takeover = container(folder, f"{SERVE}{options} --takeover", *spaces)
        with connected(path) as client, takeover as new:
            assert old.wait(DEADLINE) == 0
            assert client.execute("query-fdsets") == before
            assert sets(path) == before
            assert new.poll() is None
