"""A spare worker fetches the stored descriptors from the parent, with their numbers."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest

from qmpfd.kernel.fd import Fd, close_all, send
from qmpfd.kernel.systemd import Notifier
from qmpfd.limits import JOURNAL_FORMAT
from qmpfd.server.fdstore.fetch import fetch
from qmpfd.server.fdstore.journal import Journal, SnapshotHeader
from qmpfd.server.saved_state import SavedFd

#: Number of the first stored descriptor: above all descriptors of the tests.
BASE = 300


@contextmanager
def parent_with(
    fds: dict[str, int], spoil: Callable[[socket.socket, list[str]], bool] = lambda *_: False
) -> Iterator[Notifier]:
    """Connect to a fake parent that stores *fds*; *spoil* may answer instead."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def answer() -> None:
        with suppress(ConnectionError):  # the worker has closed the connection
            while request := theirs.recv(1 << 16):
                names = request.decode().removeprefix("QMPFD_FETCH=").split(":")
                assert len(names) <= 253
                if not spoil(theirs, names):
                    send(theirs, b"CLOSED=~0", [])  # meant for the worker before: ignored
                    send(theirs, b"FETCHED=" + ":".join(names).encode(), [fds[n] for n in names])

    thread = threading.Thread(target=answer)
    thread.start()
    notifier = Notifier(ours, is_parent=True)
    try:
        yield notifier
    finally:
        notifier.close()
        thread.join()
        theirs.close()


def added(name: str, number: int) -> SavedFd:
    return SavedFd(name, number, number, None, None, 0.0, None, False)


@pytest.fixture
def journal() -> Iterator[Journal]:
    """Journal with six hundred descriptors; every third number is free."""
    numbers = [number for number in range(BASE, BASE + 900) if number % 3]
    records = [added(f"~{number:x}", number) for number in reversed(numbers)]
    made = Journal([SnapshotHeader(JOURNAL_FORMAT, 7, None), *records])
    yield made
    made.close()


def test_each_descriptor_gets_its_number(journal: Journal) -> None:
    files = {f"~{number:x}": os.memfd_create(f"{number}") for number in (BASE + 1, BASE + 2)}
    files |= {f"~{n:x}": 0 for n in range(BASE + 3, BASE + 900) if n % 3}
    files |= {"qmpfd-journal-7": journal.fd.fileno(), "~listener": 1}
    with parent_with(files) as parent:
        # The parent lists the names in any order.
        fetched, history = fetch(parent, reversed(files), [parent])
        try:
            assert history.begun.generation == 7
            assert len(history.entries) == 600
            assert {given.name for given in fetched} == files.keys()
            for given in fetched:
                number = int(given.name[1:], 16) if given.name[1:2].isdigit() else None
                assert number in (None, given.fd.fileno())
            for number in (BASE + 1, BASE + 2):
                assert os.readlink(f"/proc/self/fd/{number}") == f"/memfd:{number} (deleted)"
        finally:
            close_all(given.fd for given in fetched)
    for name in (f"~{BASE + 1:x}", f"~{BASE + 2:x}"):
        os.close(files[name])


def test_a_number_that_is_in_use(journal: Journal) -> None:
    """One number is in use: all other descriptors get theirs."""
    numbers = [number for number in range(BASE, BASE + 900) if number % 3]
    files = {f"~{number:x}": 0 for number in numbers}
    files["qmpfd-journal-7"] = journal.fd.fileno()
    with Fd(os.dup(0)) as stranger, parent_with(files) as parent:
        stranger.move_to(numbers[9])
        fetched, _ = fetch(parent, files, [parent])
        at = {given.name: given.fd.fileno() for given in fetched}
        wrong = [number for number in numbers if at[f"~{number:x}"] != number]
        close_all(given.fd for given in fetched)
    assert wrong == [numbers[9]]


def _without_descriptors(sock: socket.socket, names: list[str]) -> bool:
    send(sock, b"FETCHED=" + ":".join(names).encode(), [])
    return True


def _with_one_only(sock: socket.socket, names: list[str]) -> bool:
    send(sock, b"FETCHED=" + ":".join(names).encode(), [0])
    return len(names) > 1


def _not_at_all(sock: socket.socket, names: list[str]) -> bool:
    sock.shutdown(socket.SHUT_RDWR)
    return True


@pytest.mark.parametrize("spoil", [_without_descriptors, _with_one_only, _not_at_all])
def test_a_failed_fetch_leaves_nothing_open(
    journal: Journal, spoil: Callable[[socket.socket, list[str]], bool]
) -> None:
    """The fetch fails, and nothing stays open; the parent then starts a worker that inherits."""

    def spoiled(sock: socket.socket, names: list[str]) -> bool:
        return not names[0].startswith("qmpfd") and spoil(sock, names)

    files = {f"~{number:x}": 0 for number in range(BASE, BASE + 900) if number % 3}
    files["qmpfd-journal-7"] = journal.fd.fileno()
    with parent_with(files, spoiled) as parent, pytest.raises(OSError, match=r"error|gone|pipe"):
        fetch(parent, files, [parent])
