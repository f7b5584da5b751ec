"""``qmpfd.fdset_opener``: an opener for ``open("/dev/fdset/N")``."""

from __future__ import annotations

import io
import os
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers import daemon_thread

import qmpfd
from qmpfd.client.blocking import BlockingClient

Opener = Callable[[str, int], int]


@pytest.fixture(params=["spec", "qemu"])
def opener(path: Path, request: pytest.FixtureRequest) -> Iterator[Opener]:
    """Opener for a running daemon."""
    with daemon_thread(path, dialect=request.param):
        yield qmpfd.fdset_opener(path)


def add(path: Path, file: Path, flags: int, **arguments: object) -> None:
    """Open *file* and add the descriptor."""
    number = os.open(file, flags | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        with BlockingClient(path, 10) as client:
            client.execute("add-fd", arguments, [number])
    finally:
        os.close(number)


@pytest.fixture
def file(path: Path, tmp_path: Path, opener: Opener) -> Path:
    """File with three descriptors in set 0, one for each access mode."""
    found = tmp_path / "file"
    found.write_bytes(b"line 1\nline 2\n")
    add(path, found, os.O_RDONLY)
    add(path, found, os.O_WRONLY, **{"fdset-id": 0})
    add(path, found, os.O_RDWR, **{"fdset-id": 0})
    return found


@pytest.mark.usefixtures("file")
def test_reading(opener: Opener) -> None:
    with open("/dev/fdset/0", opener=opener) as text:
        assert text.readlines() == ["line 1\n", "line 2\n"]
        assert text.name == "/dev/fdset/0"
        text.seek(0)
    with open("/dev/fdset/0", "rb", buffering=0, opener=opener) as raw:
        assert raw.read(4) == b"line"
    # The same open file description: reading continues at its position.
    with io.open(Path("/dev/fdset/0"), "rb", opener=opener) as file:  # noqa: UP020 - by its name
        assert file.read() == b" 1\nline 2\n"


@pytest.mark.parametrize("mode", ["wb", "ab", "xb"])
def test_writing_truncates_nothing(file: Path, opener: Opener, mode: str) -> None:
    """Mode "w" does not truncate: the file was opened before (as in QEMU)."""
    with open("/dev/fdset/0", mode, opener=opener) as out:
        out.seek(5)
        out.write(b"X")
    assert file.read_bytes() == b"line X\nline 2\n"


def test_reading_and_writing(file: Path, opener: Opener) -> None:
    with open("/dev/fdset/0", "r+b", opener=opener) as both:
        assert both.readline() == b"line 1\n"
        both.write(b"LINE")
    assert file.read_bytes() == b"line 1\nLINE 2\n"


@pytest.mark.parametrize("mode, missing", [("rb", "rdonly"), ("wb", "wronly")])
def test_the_access_mode_has_to_be_equal(
    path: Path, tmp_path: Path, opener: Opener, mode: str, missing: str
) -> None:
    add(path, tmp_path / "file", os.O_RDWR)
    text = f"No file descriptor with access mode '{missing}' in 'fdset-id:0', only 'rdwr'"
    with (
        pytest.raises(FileNotFoundError, match=re.escape(text)) as info,
        open("/dev/fdset/0", mode, opener=opener),
    ):
        pass
    assert info.value.filename == "/dev/fdset/0"


def test_the_newest(path: Path, tmp_path: Path, opener: Opener) -> None:
    for name in ("old", "new"):
        (tmp_path / name).write_text(name)
        add(path, tmp_path / name, os.O_RDONLY, **({"fdset-id": 0} if name == "new" else {}))
    with open("/dev/fdset/0", opener=opener) as file:
        assert file.read() == "new"


@pytest.mark.usefixtures("file")
def test_not_inheritable(opener: Opener) -> None:
    with open("/dev/fdset/0", opener=opener) as file:
        assert not os.get_inheritable(file.fileno())


@pytest.mark.parametrize("number", ["7", "999999999999999999", "9" * 30])
def test_no_such_set(opener: Opener, number: str) -> None:
    with pytest.raises(FileNotFoundError), open(f"/dev/fdset/{number}", opener=opener):
        pass


@pytest.mark.parametrize(
    "name", ["/dev/fdset/", "/dev/fdset/x", "/dev/fdset/-1", "/dev/fdset/0/x", "/dev/fdset/\u0663"]
)
@pytest.mark.usefixtures("file")
def test_names_that_are_none(opener: Opener, name: str) -> None:
    """Names that are no fd set raise FileNotFoundError."""
    with (
        pytest.raises(FileNotFoundError, match="No such file or directory"),
        open(name, opener=opener),
    ):
        pass


@pytest.mark.usefixtures("file")
def test_other_files_are_opened_as_usual(opener: Opener, tmp_path: Path) -> None:
    for name in (tmp_path / "other", str(tmp_path / "other"), os.fsencode(tmp_path / "other")):
        with open(name, "w", opener=opener) as out:
            out.write("as usual")
        with open(name, opener=opener) as back:
            assert back.read() == "as usual"
    assert (tmp_path / "other").stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    mask = os.umask(0o77)
    os.umask(mask)
    return mask


@pytest.mark.usefixtures("file")
def test_a_name_in_bytes(opener: Opener) -> None:
    with open(b"/dev/fdset/0", opener=opener) as file:
        assert file.readline() == "line 1\n"


def test_nobody_there(path: Path) -> None:
    with (
        pytest.raises(qmpfd.NoDaemon, match="no daemon at"),
        open("/dev/fdset/0", opener=qmpfd.fdset_opener(path)),
    ):
        pass


def test_a_silent_daemon(path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(os.fspath(path))
        listener.listen()
        with (
            pytest.raises(qmpfd.NoDaemon, match="does not answer"),
            open("/dev/fdset/0", opener=qmpfd.fdset_opener(path, timeout=0.05)),
        ):
            pass
