"""Files that are opened for their number, without waiting, or in memory."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

from qmpfd.kernel.fd import duplicate
from qmpfd.kernel.files import contents, memory_file, open_null, open_without_waiting


def test_a_fifo_does_not_wait_for_its_other_end(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with open_without_waiting(tmp_path / "fifo", os.O_RDONLY) as reader:
        assert not fcntl.fcntl(reader, fcntl.F_GETFL) & os.O_NONBLOCK
        with open_without_waiting(tmp_path / "fifo", os.O_WRONLY) as writer:
            os.write(writer.fileno(), b"x")
        assert os.read(reader.fileno(), 2) == b"x"
    with pytest.raises(OSError, match="No such device or address"):  # no reader
        open_without_waiting(tmp_path / "fifo", os.O_WRONLY)


def test_a_new_file_has_the_mode(tmp_path: Path) -> None:
    with open_without_waiting(tmp_path / "new", os.O_WRONLY | os.O_CREAT, 0o600):
        assert (tmp_path / "new").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("data", [b"", b"x", bytes(3 << 20)], ids=["empty", "byte", "3 MiB"])
def test_contents_of_a_file_in_memory(data: bytes) -> None:
    with memory_file("test", data) as memory:
        assert contents(memory) == data
        assert contents(memory) == data  # whatever the position is


def test_duplicates_avoid_numbers() -> None:
    with open_null() as null, duplicate(null, 100) as first:
        assert first.number >= 100
        avoid = {first.number + 1, first.number + 2}
        with duplicate(null, first.number, avoid) as second:
            assert second.number not in {first.number, *avoid}
            assert os.fstat(second.fileno()) == os.fstat(null.fileno())
            assert not os.get_inheritable(second.fileno())
