"""Takeovers under load: busy clients that check each reply notice nothing."""

from __future__ import annotations

import os
import resource
import signal
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from helpers import Pipe
from stepper import Stepped, Stepper
from supervised import until

from qmpfd.client.blocking import BlockingClient
from qmpfd.kernel.fd import Fd, FileDescriptorLike, close_all

TAKEOVERS = int(os.environ.get("QMPFD_TAKEOVERS", "6"))
PATIENCE = 60.0


@pytest.fixture(scope="module")
def stepper() -> Iterator[Stepper]:
    with Stepper() as stepper:
        yield stepper


class Load:
    """Client threads, and the expected results of their work.

    Args:
        path: the daemon's socket.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._threads: list[threading.Thread] = []
        self._over = threading.Event()
        self.failures: list[Exception] = []
        self.rounds: Counter[str] = Counter()
        self.longest = 0.0

    def start(self, name: str, work: Callable[[str], None]) -> None:
        """Repeat *work* in a thread until the end."""

        def run() -> None:
            try:
                while not self._over.is_set():
                    work(name)
                    self.rounds[name] += 1
            except Exception as exc:  # noqa: BLE001 - raised by the test
                self.failures.append(exc)

        self._threads.append(threading.Thread(target=run, name=name))
        self._threads[-1].start()

    def stop(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(PATIENCE)
            assert not thread.is_alive()

    def holder(self, steady: BlockingClient) -> Callable[[str], None]:
        """Return work: add a pipe and a file, open both from another client, remove them."""

        def work(name: str) -> None:
            with Pipe() as pipe, Fd(os.memfd_create(name)) as file:
                os.write(file.fileno(), name.encode())
                info = steady.execute("add-fd", {"opaque": name}, [file])
                assert steady.execute("getfd", {"fdname": name}, [pipe]) == {}
                pipe.release()
                with BlockingClient(self._path, PATIENCE) as passing:
                    (seen,) = passing.execute("query-fds", {"opaque": name})
                    assert (seen["fdset-id"], seen["fd"]) == (info["fdset-id"], info["fd"])
                    with passing.open_fdset(info["fdset-id"], fd=info["fd"]) as copy:
                        assert os.fstat(copy.fileno()).st_ino == os.fstat(file.fileno()).st_ino
                        assert os.pread(copy.fileno(), 100, 0) == name.encode()
                assert pipe.held()
                steady.execute("closefd", {"fdname": name})
                assert not pipe.held()
                with Pipe() as other:
                    more = {**info, "opaque": name}
                    del more["fd"]
                    added = steady.execute("add-fds", more, [other, other])
                    other.release()
                    assert added["fdset-id"] == info["fdset-id"]
                    steady.execute("remove-fd", {"fdset-id": info["fdset-id"]})
                    assert not other.held()  # closed by predecessor and successor

        return work

    def pipeliner(self, sock: socket.socket) -> Callable[[str], None]:
        """Return work that pipelines requests: each is answered once, in order."""
        lines = sock.makefile("rb")
        asked = 0

        def work(name: str) -> None:
            nonlocal asked
            requests = [b'{"execute": "query-name", "id": %d}' % (asked + n) for n in range(100)]
            sock.sendall(b"".join(requests))
            for _ in requests:
                assert lines.readline() == b'{"return": {}, "id": %d}\r\n' % asked
                asked += 1
            if self._over.is_set():
                lines.close()

        return work

    def comer(self, name: str) -> None:
        """Connect, perhaps send half a request, and disconnect."""
        BlockingClient(self._path, PATIENCE).close()
        with BlockingClient(self._path, PATIENCE) as passing, Pipe() as pipe:
            passing.execute("add-fds", {"lifetime": "connection", "opaque": name}, [pipe])
            with passing.detach() as sock:
                sock.setblocking(True)
                sock.sendall(b'{"execute": "query-')


def start_daemon(stepper: Stepper, path: Path, number: int) -> Stepped:
    log = path.with_suffix(f".{number}.log")
    arguments = ["serve", "--socket", str(path), *(["--takeover"] if number else [])]
    started = stepper.start(arguments, log)
    started.until("listening")
    assert started.poll() is None, started.said
    return started


def kill_one(stepper: Stepper, path: Path, step: int) -> None:
    """Kill a successor before its commit: clients must not notice that either."""
    killed = stepper.start(
        ["serve", "--socket", str(path), "--takeover"],
        path.with_suffix(".killed.log"),
        where={
            "takeover/receiver.py": ("prepare", "receive_rest", "_receive_fds"),
            "restore.py": ("_restore_sessions",),
        },
        step=step,
    )
    assert killed.wait() == -signal.SIGKILL


@pytest.mark.slow
def test_under_load(path: Path, stepper: Stepper) -> None:
    daemons = [start_daemon(stepper, path, 0)]
    load = Load(path)
    holders = [f"holder {number}" for number in range(3)]
    clients = [BlockingClient(path, PATIENCE) for _ in range(len(holders) + 3)]
    watcher, keeper, pipelining, *steady = clients
    sock = pipelining.detach()
    sock.setblocking(True)
    sock.settimeout(PATIENCE)
    try:
        with Pipe() as stored:
            added = keeper.execute("add-fds", {"opaque": "kept"}, [stored] * 200)
            keeper.execute("remove-fd", {"fdset-id": 0, "fd": added["fds"][7]["fd"]})
            before = keeper.execute("query-fdsets")
            watcher.execute("watch-fdsets", {"enable": True})
            events = Watched(watcher)
            for name, client in zip(holders, steady, strict=True):
                load.start(name, load.holder(client))
            load.start("pipeliner", load.pipeliner(sock))
            load.start("comer", load.comer)
            load.start("watcher", events.take)
            for number in range(1, TAKEOVERS + 1):
                kill_one(stepper, path, 1 + number * 37 % 150)
                daemons.append(start_daemon(stepper, path, number))
                assert daemons[-2].wait() == 0
                assert not load.failures
            load.stop()
            assert not load.failures
            assert set(load.rounds) == {*holders, "pipeliner", "comer", "watcher"}
            # When the daemon has read the end of the last comer, its descriptor is closed.
            until(lambda: keeper.execute("query-fdsets") == before)
            stored.release()
            keeper.execute("remove-fd", {"fdset-id": 0})
            assert not stored.held()
            events.until("kept", 199)
            # Each event came once: a holder's round has three, a comer's one.
            for name in holders:
                assert events.seen["FD_ADDED", name] == 3 * load.rounds[name]
                assert events.seen["FD_REMOVED", name] == 3 * load.rounds[name]
            assert events.seen["FD_ADDED", "comer"] == load.rounds["comer"]
            assert events.seen["FD_REMOVED", "comer"] == load.rounds["comer"]
    finally:
        load.stop()
        for client in clients:
            client.close()
        sock.close()
        for daemon in daemons:
            daemon.end()
            assert "Traceback" not in daemon.said
    assert not path.exists()


MANY = 10_000


@pytest.mark.skipif(
    resource.getrlimit(resource.RLIMIT_NOFILE)[1] < MANY + 1000, reason="needs as many open files"
)
def test_many_descriptors_and_connections(path: Path, stepper: Stepper) -> None:
    """Every descriptor keeps its number and file; every connection continues."""
    old = start_daemon(stepper, path, 0)
    with Pipe() as pipe, ExitStack() as stack, BlockingClient(path, PATIENCE) as client:
        kinds: list[FileDescriptorLike] = [0, 1, pipe]
        for number in range(MANY // 250):
            client.execute("add-fds", {"opaque": f"{number}"}, [kinds[number % 3]] * 250)
        for number in range(3, MANY // 250, 7):  # leave gaps in the numbers
            client.execute("remove-fd", {"fdset-id": number})
        others = [stack.enter_context(BlockingClient(path, PATIENCE)) for _ in range(300)]

        def listing() -> list[list[Any]]:
            fds = client.execute("query-fds")
            return [[fd[name] for name in ("fdset-id", "fd", "opaque", "target")] for fd in fds]

        before = listing()
        successor = start_daemon(stepper, path, 1)
        assert old.wait() == 0
        assert listing() == before
        for number, other in enumerate(others):
            assert other.execute("query-name", {}) == {}, number
        pipe.release()
        assert pipe.held()
        for fdset in client.execute("query-fdsets"):
            client.execute("remove-fd", {"fdset-id": fdset["fdset-id"]})
        assert not pipe.held()
        client.execute("quit")
        assert successor.wait() == 0


class Watched:
    """Counts a watcher's events by name and opaque text."""

    def __init__(self, client: BlockingClient) -> None:
        self._client = client
        self.seen: Counter[tuple[str, str]] = Counter()

    def take(self, name: str) -> None:
        """Count the events received; none may be lost."""
        for event in self._client.take_events():
            assert event.name != "FD_EVENTS_LOST"
            self.seen[event.name, event.data["opaque"]] += 1
        threading.Event().wait(0.001)

    def until(self, opaque: str, count: int) -> None:
        """Count events until *count* removals with the text *opaque* have come, the last ones."""
        while self.seen["FD_REMOVED", opaque] < count:
            self.take("")


def events_of(client: BlockingClient, expected: int) -> tuple[list[Any], int]:
    """Return all events that a slow watcher receives, and the number of lost ones."""
    numbers, lost = [], 0
    for event in client.events():
        if event.name == "FD_EVENTS_LOST":
            lost += event.data["count"]
        else:
            numbers.append(event.data["fdset-id"])
        if len(numbers) + lost == expected:
            return numbers, lost
    raise AssertionError("it has closed the connection")


@pytest.mark.parametrize("given_up", [False, True])
def test_a_watcher_that_is_slow(path: Path, stepper: Stepper, given_up: bool) -> None:
    """Queued events arrive once, whether the takeover succeeds or fails."""
    old = start_daemon(stepper, path, 0)
    made = 3000
    with BlockingClient(path, PATIENCE) as watcher, BlockingClient(path, PATIENCE) as client:
        watcher.execute("watch-fdsets", {"enable": True})
        for _ in range(made):
            client.execute("add-fd", {"opaque": "x" * 200}, [0])
        successor = None
        if given_up:
            with BlockingClient(path, PATIENCE) as passing:
                close_all(passing.request("takeover", {"format": 1})[1])
        else:
            successor = start_daemon(stepper, path, 1)
            assert old.wait() == 0
        client.execute("remove-fd", {"fdset-id": made - 1})
        numbers, lost = events_of(watcher, made + 1)
        assert numbers[: made - 1] == list(range(made - 1))
        assert not lost
        client.execute("quit")
    assert (successor or old).wait() == 0
    if successor:
        assert old.wait() == 0
