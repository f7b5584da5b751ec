"""A removed descriptor of any kind is closed before its client reads the reply.

Tests of server/closing.py.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
from exclusive_kinds import KINDS, ROOT_KINDS, Kind
from helpers import CAPABILITIES, PATIENCE, daemon_process, request
from supervised import connected, supervised

from qmpfd.client.blocking import BlockingClient
from qmpfd.kernel.fd import Fd

#: Repetitions for each kind, and for each way to close.
_ROUNDS = 15


class _Daemon(NamedTuple):
    path: Path
    pid: int


@pytest.fixture(scope="module", params=["alone", "supervised"])
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[_Daemon]:
    path = tmp_path_factory.mktemp("closed") / "s"
    if request.param == "supervised":
        with supervised(path) as parent:
            yield _Daemon(path, parent.worker())
    else:
        with daemon_process(path) as daemon:
            yield _Daemon(path, daemon.pid)


@contextmanager
def _others(path: Path) -> Iterator[None]:
    """Run clients that keep the daemon and this machine busy."""
    stop = threading.Event()

    def work() -> None:
        with BlockingClient(path, PATIENCE) as client:
            while not stop.is_set():
                info = client.execute("add-fd", fds=[0])
                client.execute("remove-fd", {"fdset-id": info["fdset-id"]})

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()


# -- ways in which a client has a descriptor closed --------------------------------------------


def _add(client: BlockingClient, fd: Fd, count: int = 1) -> int:
    """Add *fd* *count* times with the opaque text "n", close it, and return the fd set's id."""
    with fd:
        return client.add_fds([fd] * count, opaque="n").fdset_id


def _removed(client: BlockingClient, fd: Fd, _: _Daemon) -> None:
    fdset_id = _add(client, fd)
    [stored] = client.query_fds(fdset_id)
    client.remove_fd(fdset_id, stored.fd)


def _removed_with_its_set(client: BlockingClient, fd: Fd, _: _Daemon) -> None:
    client.remove_fd(_add(client, fd, 5))


def _removed_by_selector(client: BlockingClient, fd: Fd, _: _Daemon) -> None:
    _add(client, Fd(os.dup(fd.fileno())), 2)
    _add(client, fd)
    client.remove_fds(opaque="n")


def _replaced(client: BlockingClient, fd: Fd, _: _Daemon) -> None:
    _add(client, fd, 2)
    client.remove_fd(client.add_fds([0], opaque="n", if_exists="replace").fdset_id)


def _handed_out(client: BlockingClient, fd: Fd, _: _Daemon) -> None:
    client.open_fdset(_add(client, fd), remove=True).close()


def _removed_after_it_was_handed_out(client: BlockingClient, fd: Fd, _: _Daemon) -> None:
    fdset_id = _add(client, fd)
    client.open_fdset(fdset_id).close()
    client.remove_fd(fdset_id)


def _closed_by_name(client: BlockingClient, fd: Fd, _: _Daemon) -> None:
    with fd:
        client.execute("getfd", {"fdname": "n"}, fds=[fd])
    client.execute("closefd", {"fdname": "n"})


def _name_given_again(client: BlockingClient, fd: Fd, _: _Daemon) -> None:
    with fd:
        client.execute("getfd", {"fdname": "n"}, fds=[fd])
    client.execute("getfd", {"fdname": "n"}, fds=[0])


def _sent(daemon: _Daemon, *parts: tuple[bytes, list[Fd]]) -> None:
    """Send descriptors and close them while the daemon is stopped; wait for one reply."""
    with socket.socket(socket.AF_UNIX) as sock, sock.makefile("rb") as lines:
        sock.settimeout(PATIENCE)
        sock.connect(os.fspath(daemon.path))
        sock.sendall(CAPABILITIES)
        assert lines.readline()
        assert lines.readline()
        os.kill(daemon.pid, signal.SIGSTOP)
        try:
            for data, fds in parts:
                socket.send_fds(sock, [data], [fd.fileno() for fd in fds])
            for _, fds in parts:
                for fd in fds:
                    fd.close()
        finally:
            os.kill(daemon.pid, signal.SIGCONT)
        assert lines.readline()


def _refused(_: BlockingClient, fd: Fd, daemon: _Daemon) -> None:
    _sent(daemon, (request("add-fd", {"fdset-id": 999_999}), [fd]))


def _broken(_: BlockingClient, fd: Fd, daemon: _Daemon) -> None:
    _sent(daemon, (b'{"execute": ]\r\n', [fd]))


def _too_many(_: BlockingClient, fd: Fd, daemon: _Daemon) -> None:
    _sent(daemon, (request("getfd", {"fdname": "n"}), [Fd(os.dup(0)), fd]))


def _superseded(_: BlockingClient, fd: Fd, daemon: _Daemon) -> None:
    _sent(daemon, (b" ", [fd]), (request("getfd", {"fdname": "n"}), [Fd(os.dup(0))]))


_Way = Callable[[BlockingClient, Fd, _Daemon], None]
_WAYS: list[_Way] = [
    *(_removed, _removed_with_its_set, _removed_by_selector, _replaced, _handed_out),
    *(
        _removed_after_it_was_handed_out,
        _closed_by_name,
        _name_given_again,
        _refused,
        _broken,
        _too_many,
        _superseded,
    ),
]


def _next(opened: Callable[[], Fd]) -> tuple[Fd, int]:
    """Open until it succeeds; return the descriptor and the number of failures before."""
    busy = 0
    while True:
        try:
            return opened(), busy
        except OSError:
            busy += 1


def _never_busy(kind: Kind, way: _Way, daemon: _Daemon, folder: Path) -> None:
    with kind(folder) as opened, connected(daemon.path) as client, _others(daemon.path):
        fd = opened()
        for _ in range(_ROUNDS):
            way(client, fd, daemon)
            fd, busy = _next(opened)
            assert busy == 0
        fd.close()


@pytest.mark.parametrize(
    "kind",
    [
        *(pytest.param(kind, id=name) for name, kind in KINDS.items()),
        *(pytest.param(k, id=name, marks=pytest.mark.root) for name, k in ROOT_KINDS.items()),
    ],
)
def test_every_kind_is_closed_before_the_reply(served: _Daemon, tmp_path: Path, kind: Kind) -> None:
    _never_busy(kind, _removed, served, tmp_path)


@pytest.mark.parametrize("kind", ["netlink", "TCP, linger"])
@pytest.mark.parametrize("way", _WAYS, ids=lambda way: way.__name__.strip("_").replace("_", " "))
def test_every_way_to_close_closes_before_the_reply(
    served: _Daemon, tmp_path: Path, way: _Way, kind: str
) -> None:
    _never_busy(KINDS[kind], way, served, tmp_path)
