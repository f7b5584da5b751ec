"""Local file systems: a thread reads the table of mounts, again after each change."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Set
from contextlib import closing
from pathlib import Path

import pytest
from helpers import PATIENCE

from qmpfd.kernel.mounts import Device, LocalFileSystems


def until(happened: Callable[[], bool]) -> None:
    """Wait until a function returns true: the thread makes it so."""
    deadline = time.monotonic() + PATIENCE
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.fixture
def local() -> Iterator[LocalFileSystems]:
    with closing(LocalFileSystems()) as found:
        until(lambda: bool(found.devices()) and found.is_current)
        yield found
        until(lambda: not found._thread_runs)


def device(path: Path) -> Device:
    number = path.stat().st_dev
    return os.major(number), os.minor(number)


def test_what_every_machine_has(local: LocalFileSystems) -> None:
    assert device(Path("/proc/self")) in local.devices()


class _Held(LocalFileSystems):
    """Reads the table when the test permits it."""

    def __init__(self) -> None:
        self.go_on = threading.Event()
        self.readers: list[int] = []
        super().__init__()

    def _read_table(self) -> Set[Device]:
        self.readers.append(threading.get_ident())
        assert self.go_on.wait(PATIENCE)
        return super()._read_table()


def test_a_query_does_not_wait_for_the_table() -> None:
    """A query does not wait for the table, which may have 15,000 mounts: nothing is local yet."""
    with closing(_Held()) as found:
        assert found.devices() == set()
        assert not found.is_current
        found.go_on.set()
        until(lambda: found.is_current)
        assert device(Path("/proc/self")) in found.devices()
        until(lambda: not found._thread_runs)
        assert threading.get_ident() not in found.readers


@pytest.mark.root
def test_after_a_change_nothing_counts_until_it_is_read(
    local: LocalFileSystems, tmp_path: Path
) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "test", tmp_path], check=True)
    try:
        mounted = device(tmp_path)
        until(lambda: mounted in local.devices())
    finally:
        subprocess.run(["umount", tmp_path], check=True)
    until(lambda: not local.is_current or mounted not in local.devices())
    until(lambda: local.is_current and mounted not in local.devices())


class _OutOfMemory(LocalFileSystems):
    """Raises MemoryError at the first read."""

    def __init__(self) -> None:
        self.tries = 0
        super().__init__()

    def _read_table(self) -> Set[Device]:
        self.tries += 1
        if self.tries == 1:
            raise MemoryError
        return super()._read_table()


def test_out_of_memory() -> None:
    """No device is local, close() does not wait, and the table is read again later."""
    with closing(_OutOfMemory()) as found:
        until(lambda: not found._thread_runs)
        assert not found.devices()
    with closing(_OutOfMemory()) as found:
        until(lambda: bool(found.devices()))
        assert found.tries == 2


def test_no_thread_to_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    """If no thread can be started, a later query tries again."""

    def fails(function: Callable[[], None], arguments: tuple[()]) -> int:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr("_thread.start_new_thread", fails)
        found = LocalFileSystems()
    with closing(found):
        assert not found.is_current
        until(lambda: bool(found.devices()))
        until(lambda: not found._thread_runs)
