"""Addresses of Unix sockets: paths of any length, and abstract names."""

from __future__ import annotations

import errno
import os
import secrets
import socket
import stat
from contextlib import closing
from pathlib import Path

import pytest

from qmpfd.kernel.unix_address import bind, connectable, is_abstract


def names(folder: Path) -> list[Path]:
    """Return paths of lengths that need different system calls."""
    deep = folder.joinpath(*["d" * 100] * 3)
    deep.mkdir(parents=True, exist_ok=True)
    return [
        folder / "q.sock",
        folder / os.fsdecode(b"caf\xe9.sock"),
        folder / ("n" * 255),
        folder / ("n" * (107 - len(str(folder)) - 1)),  # the longest that a sockaddr_un has
        folder / ("n" * (108 - len(str(folder)) - 1)),
        deep / "q.sock",
        deep / ("n" * 255),
        deep / os.fsdecode(b"\xe9" * 200),
    ]


def unix_socket() -> socket.socket:
    return socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)


def assert_connected(path: str | Path, listener: socket.socket) -> None:
    with unix_socket() as client, connectable(path) as address:
        client.connect(address)
        server, _ = listener.accept()
        with server:
            client.sendall(b"x")
            assert server.recv(1) == b"x"


@pytest.mark.parametrize("number", range(8))
def test_a_path_of_any_length(tmp_path: Path, number: int) -> None:
    path = names(tmp_path)[number]
    with unix_socket() as listener:
        bind(listener, path)
        assert stat.S_IMODE(path.lstat().st_mode) == 0o600
        assert [entry.name for entry in path.parent.iterdir() if not entry.is_dir()] == [path.name]
        listener.listen()
        assert_connected(path, listener)
        with unix_socket() as second, pytest.raises(OSError, match="in use") as caught:
            bind(second, path)
        assert caught.value.errno == errno.EADDRINUSE
        assert_connected(path, listener)


def test_the_umask_stays(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with unix_socket() as listener:
            bind(listener, tmp_path / "q.sock")
        with unix_socket() as listener, pytest.raises(OSError, match="in use"):
            bind(listener, tmp_path / "q.sock")
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)


def test_a_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for path in ("q.sock", "n" * 200):
        with unix_socket() as listener:
            bind(listener, path)
            listener.listen()
            assert_connected(path, listener)


@pytest.mark.parametrize("length", [1, 20, 107])
def test_an_abstract_name(length: int) -> None:
    path = "@" + secrets.token_hex(length)[:length]
    assert is_abstract(path)
    with unix_socket() as listener:
        bind(listener, path)
        listener.listen()
        assert_connected(path, listener)
        assert not Path(path).exists()
        with unix_socket() as second, pytest.raises(OSError, match="in use"):
            bind(second, path)


def test_an_abstract_name_that_is_too_long() -> None:
    with closing(unix_socket()) as listener, pytest.raises(OSError, match="too long"):
        bind(listener, "@" + "n" * 108)


def test_a_file_that_begins_so(tmp_path: Path) -> None:
    assert not is_abstract(tmp_path / "@name")
    assert not is_abstract("./@name")


@pytest.mark.parametrize("name", ["missing", "m" * 200])
def test_no_listening_socket(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    with unix_socket() as client, pytest.raises(FileNotFoundError), connectable(path) as address:
        client.connect(address)


@pytest.mark.parametrize("name", ["missing/q.sock", "m" * 200 + "/q.sock"])
def test_no_folder(tmp_path: Path, name: str) -> None:
    with unix_socket() as listener, pytest.raises(FileNotFoundError):
        bind(listener, tmp_path / name)
