"""The worker is killed under load repeatedly: no acknowledged change is lost."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from random import Random
from typing import Any

import pytest
from supervised import connected, spare_of, supervised

from qmpfd.client.blocking import BlockingClient, NoDaemon
from qmpfd.kernel.fd import Fd, close_all

#: Number of kills; ``QMPFD_KILLS=200`` takes two minutes.
KILLS = int(os.environ.get("QMPFD_KILLS", "5"))
CLIENTS = 3

Key = tuple[int, int]


class Client:
    """Adds and removes as fast as possible, and records what must be stored."""

    def __init__(self, number: int, path: Path, files: list[Path]) -> None:
        self.path = path
        self.files = files
        self.random = Random(number)
        self.prefix = f"client {number} "
        self.there: dict[Key, str] = {}  # acknowledged: opaque text by fd set and number
        self.unsure: set[Key] = set()  # removals without a reply
        self.count = self.rounds = self.checks = 0
        self.failure: Exception | None = None

    def run(self, stop: threading.Event) -> None:
        try:
            while not stop.is_set():
                with connected(self.path) as client:
                    try:
                        self.check(client)
                        while not stop.is_set():
                            self.step(client)
                            self.rounds += 1
                    except NoDaemon:
                        continue
            with connected(self.path) as client:
                self.check(client)
        except Exception as exc:  # noqa: BLE001 - raised by the test
            self.failure = exc

    def step(self, client: BlockingClient) -> None:
        if self.there and self.random.random() < 0.48:
            fdset_id, number = self.random.choice(sorted(self.there))
            self.unsure.add((fdset_id, number))
            client.execute("remove-fd", {"fdset-id": fdset_id, "fd": number})
            self.unsure.discard((fdset_id, number))
            del self.there[fdset_id, number]
            return
        self.count += 1
        path = self.random.choice(self.files)
        opaque = f"{self.prefix}{self.count} {path.name}"
        count = self.random.choice([1, 1, 1, 5])
        fds = [Fd(os.open(path, os.O_RDONLY)) for _ in range(count)]
        try:
            info = client.execute("add-fds", {"opaque": opaque}, fds)
        finally:
            close_all(fds)
        for fd in info["fds"]:
            self.there[info["fdset-id"], fd["fd"]] = opaque

    def check(self, client: BlockingClient) -> None:
        """Compare with the listing; changes without a reply may be in it or not."""
        self.checks += 1
        listed: list[dict[str, Any]] = client.execute("query-fds", {"opaque-prefix": self.prefix})
        found = {(fd["fdset-id"], fd["fd"]): fd["opaque"] for fd in listed}
        for key in self.unsure:
            if key not in found:
                del self.there[key]
        self.unsure.clear()
        lost = {key: opaque for key, opaque in self.there.items() if found.get(key) != opaque}
        assert not lost, f"lost: {lost}"
        news = {key: opaque for key, opaque in found.items() if key not in self.there}
        # The add without a reply: completely or not at all.
        last = f"{self.prefix}{self.count} "
        assert all(opaque.startswith(last) for opaque in news.values()), f"back again: {news}"
        assert len(news) in (0, 1, 5)
        self.there.update(news)
        for key in self.random.sample(sorted(found), min(20, len(found))):
            _, passed = client.request("open-fdset", {"fdset-id": key[0], "fd": key[1]})
            with passed[0] as fd:
                path = next(p for p in self.files if found[key].endswith(f" {p.name}"))
                assert os.fstat(fd.fileno()).st_ino == path.stat().st_ino
                assert os.pread(fd.fileno(), 100, 0) == path.name.encode()


@pytest.mark.timeout(60 + 3 * KILLS)
def test_killed_under_load(path: Path, tmp_path: Path) -> None:
    files = [tmp_path / f"file{number}" for number in range(20)]
    for file in files:
        file.write_text(file.name)
    clients = [Client(number, path, files) for number in range(CLIENTS)]
    stop = threading.Event()
    with supervised(path) as daemon:
        spare_of(daemon)  # the parent has a socket to it
        before = daemon.open_fds()
        threads = [threading.Thread(target=each.run, args=[stop]) for each in clients]
        for thread in threads:
            thread.start()
        try:
            random = Random(1)
            for _ in range(KILLS):
                daemon.worker()
                stop.wait(random.random() * 0.2)
                daemon.kill_worker()
                if any(client.failure for client in clients):
                    break
            daemon.worker()
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        for each in clients:
            if each.failure is not None:
                raise each.failure
            assert each.rounds > KILLS
            assert each.checks > KILLS // 2
        with daemon.client() as client:
            everything = {key for each in clients for key in each.there}
            listed = client.execute("query-fds")
            assert {(fd["fdset-id"], fd["fd"]) for fd in listed} == everything
            for fdset in client.execute("query-fdsets"):
                client.execute("remove-fd", {"fdset-id": fdset["fdset-id"]})
        spare_of(daemon)
        assert daemon.open_fds() == before
