"""What a client has removed is closed when it reads the reply, whatever its kind (INTERFACE.md)."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
from helpers import PATIENCE, daemon_process
from supervised import connected, supervised

from qmpfd.client.blocking import BlockingClient
from qmpfd.kernel.fd import Fd

#: Opens something that can be opened once at a time: OSError while it is open.
Opener = Callable[[], Fd]

_ROUNDS = 40


@contextmanager
def _listening(_: Path) -> Iterator[Opener]:
    with socket.socket() as first:
        first.bind(("127.0.0.1", 0))
        address = first.getsockname()

    def opened() -> Fd:
        with socket.socket() as sock:
            sock.bind(address)
            sock.listen()
            return Fd(sock.detach())

    yield opened


@contextmanager
def _netlink(_: Path) -> Iterator[Opener]:
    def opened() -> Fd:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW) as sock:
            sock.bind((123_456, 0))
            return Fd(sock.detach())

    yield opened


@contextmanager
def _tap(_: Path) -> Iterator[Opener]:
    def opened() -> Fd:
        with Fd(os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)) as fd:
            # TUNSETIFF, IFF_TAP | IFF_NO_PI
            fcntl.ioctl(fd.fileno(), 0x400454CA, struct.pack("16sH22x", b"qmpfd-test", 0x1002))
            return Fd(fd.detach())

    try:
        opened().close()
    except OSError as exc:
        pytest.skip(f"no TAP device: {exc}")
    yield opened


@contextmanager
def _block_device(folder: Path) -> Iterator[Opener]:
    with open(folder / "disk", "wb") as file:
        file.truncate(1 << 20)
    made = subprocess.run(
        ["losetup", "--find", "--show", folder / "disk"],
        capture_output=True,
        text=True,
        check=False,
    )
    if made.returncode:
        pytest.skip(f"no loop device: {made.stderr}")
    device = made.stdout.strip()

    def opened() -> Fd:
        fd = Fd(os.open(device, os.O_RDWR | os.O_EXCL | os.O_CLOEXEC))
        os.pwrite(fd.fileno(), os.urandom(1 << 18), 0)  # to be written back
        return fd

    try:
        yield opened
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


@contextmanager
def _served(path: Path, how: str) -> Iterator[None]:
    with supervised(path) if how == "supervised" else daemon_process(path):
        yield


@contextmanager
def _others(path: Path) -> Iterator[None]:
    """Clients that keep the daemon, and this machine, busy."""
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


@pytest.mark.parametrize("how", ["alone", "supervised"])
@pytest.mark.parametrize(
    "kind",
    [
        _listening,
        _netlink,
        pytest.param(_tap, marks=pytest.mark.root),
        pytest.param(_block_device, marks=pytest.mark.root),
    ],
)
def test_it_is_free_when_the_reply_is_read(
    path: Path, tmp_path: Path, kind: Callable[[Path], AbstractContextManager[Opener]], how: str
) -> None:
    with kind(tmp_path) as opened, _served(path, how), connected(path) as client:
        busy = 0
        with _others(path):
            for _ in range(_ROUNDS):
                with opened() as fd:
                    info = client.execute("add-fd", fds=[fd])
                client.execute("remove-fd", {"fdset-id": info["fdset-id"], "fd": info["fd"]})
                try:
                    opened().close()
                except OSError:
                    busy += 1
        assert busy == 0
