"""close(2) hangs: no other client waits, whatever makes the daemon close the descriptor."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import TypeAlias

import pytest
from helpers import ADD, request, send_now, value

from qmpfd.limits import CLOSE_TIMEOUT

from .harness import (
    SLOWEST,
    Caller,
    Harness,
    assert_service_unharmed,
    hung_files,
    needs_fuse,
    until,
)

#: SO_LINGER of the sockets in seconds: longer than any test waits for the close.
_LINGER = 30

#: A function that opens a descriptor, and one that makes the closes of all of them hang.
Opened: TypeAlias = "tuple[Callable[[], int], Callable[[], None]]"


@contextmanager
def _files(folder: Path) -> Iterator[Opened]:
    """Files of a FUSE mount whose server stops answering."""
    with hung_files(folder / "mnt") as files:

        def opened() -> int:
            return os.open(files.folder / "file", os.O_RDWR | os.O_CLOEXEC)

        yield opened, lambda: files.hang("FLUSH", "RELEASE", "GETATTR", "POLL", "IOCTL", "FSYNC")


@contextmanager
def _lingering(folder: Path) -> Iterator[Opened]:
    """TCP sockets with SO_LINGER whose peer does not read."""
    peers: list[socket.socket] = []

    def opened() -> int:
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            sock = socket.create_connection(listener.getsockname())
            peers.append(listener.accept()[0])
        sock.setblocking(False)
        with suppress(BlockingIOError):
            while True:
                sock.send(bytes(1 << 16))
        onoff = struct.pack("ii", 1, _LINGER)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, onoff)
        return sock.detach()

    try:
        yield opened, lambda: None
    finally:
        for peer in peers:  # a close with unread data sends a reset, which ends the lingering
            peer.close()


KINDS = {"FUSE": pytest.param(_files, marks=needs_fuse), "linger": pytest.param(_lingering)}


def _removed(harness: Harness, caller: Caller, number: int, hang: Callable[[], None]) -> None:
    value(caller.call("add-fd", None, [number]))
    hang()
    harness.close_in_thread(number)
    caller.send(request("remove-fd", {"fdset-id": 0}))


def _removed_among_others(
    harness: Harness, caller: Caller, number: int, hang: Callable[[], None]
) -> None:
    value(caller.call("add-fds", None, [number, *[0] * 50, *[number] * 50]))
    hang()
    harness.close_in_thread(number)
    caller.send(request("remove-fd", {"fdset-id": 0}))


def _closed_by_name(
    harness: Harness, caller: Caller, number: int, hang: Callable[[], None]
) -> None:
    value(caller.call("getfd", {"fdname": "n"}, [number]))
    hang()
    harness.close_in_thread(number)
    caller.send(request("closefd", {"fdname": "n"}))


def _refused(harness: Harness, caller: Caller, number: int, hang: Callable[[], None]) -> None:
    hang()
    with harness.stopped():  # the test closes first: its own close must not be the last one
        caller.send(request("add-fd", {"fdset-id": 99}), [number])
        harness.close_in_thread(number)


def _broken(harness: Harness, caller: Caller, number: int, hang: Callable[[], None]) -> None:
    hang()
    with harness.stopped():
        caller.send(b"]", [number])
        harness.close_in_thread(number)


def _superseded(harness: Harness, caller: Caller, number: int, hang: Callable[[], None]) -> None:
    """The descriptor waits for a command, and newer descriptors replace it."""
    hang()
    caller.send(b" ", [number])
    harness.close_in_thread(number)
    caller.send(ADD, [0])


def _disconnected(harness: Harness, caller: Caller, number: int, hang: Callable[[], None]) -> None:
    with harness.caller() as other:
        value(other.call("add-fds", {"lifetime": "connection"}, [number]))
        value(other.call("getfd", {"fdname": "n"}, [number]))
        other.send(b" ", [number])
        hang()
        harness.close_in_thread(number)
    caller.send(request("query-name"))


def _unread(harness: Harness, caller: Caller, number: int, hang: Callable[[], None]) -> None:
    """A client beyond --max-connections: the kernel closes its unread descriptor with the socket.

    (No close is pending with FUSE: see ``_in_a_queue``.)
    """
    hang()
    with harness.stopped():  # the client sends before the daemon rejects it
        for _ in range(3):
            harness.caller(negotiate=False)
        with_it = harness.caller(negotiate=False)
        with_it.send(b" ", [number])
        harness.close_in_thread(number)
    assert "Too many connections" in with_it.reply()["error"]["desc"]
    caller.send(request("query-name"))


def _in_a_queue(harness: Harness, caller: Caller, number: int, hang: Callable[[], None]) -> None:
    """The descriptor is in the queue of a Unix socket, which is removed.

    (No close is pending with FUSE: the kernel sends RELEASE then, and does not await the answer.)
    """
    left, right = socket.socketpair()
    with left, right:
        send_now(left, b"x", [number])
        value(caller.call("add-fd", None, [right]))
    hang()
    harness.close_in_thread(number)
    caller.send(request("remove-fd", {"fdset-id": 0}))


def _expired(harness: Harness, caller: Caller, number: int, hang: Callable[[], None]) -> None:
    value(caller.call("add-fds", {"expires": 1}, [number]))
    hang()
    harness.close_in_thread(number)
    until(lambda: not value(caller.call("query-fdsets")), "expired")
    caller.send(request("query-name"))


def _handed_out(harness: Harness, caller: Caller, number: int, hang: Callable[[], None]) -> None:
    """The client drops unread duplicates: the kernel sends FLUSH for the close of each."""
    value(caller.call("add-fd", None, [number]))
    hang()
    harness.close_in_thread(number)
    for _ in range(3):
        value(caller.call("open-fdset", {"fdset-id": 0}))  # recv(2) drops the descriptor
    caller.send(request("remove-fd", {"fdset-id": 0}))


WAYS = {
    way.__name__.strip("_").replace("_", " "): way
    for way in (
        *(_removed, _removed_among_others, _closed_by_name, _refused, _broken, _superseded),
        *(_disconnected, _unread, _in_a_queue, _expired, _handed_out),
    )
}


#: The ways in which the daemon closes the descriptor for the client whose reply is timed.
ITS_OWN = set(WAYS.values()) - {_disconnected, _unread, _expired}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_close_hangs(
    kind: Callable[[Path], AbstractContextManager[Opened]],
    way: Callable[[Harness, Caller, int, Callable[[], None]], None],
    path: Path,
) -> None:
    def scenario(harness: Harness) -> None:
        opened, hang = harness.stack.enter_context(kind(path.parent))
        caller = harness.caller()
        way(harness, caller, opened(), hang)
        start = time.monotonic()
        assert caller.reply()
        # The client that sent or removed it waits for the close, for 1 s at most; no other waits.
        assert time.monotonic() - start < (2 * CLOSE_TIMEOUT if way in ITS_OWN else SLOWEST)
        # The close must hang, else the test shows nothing.
        if kind is not _files or way not in (_in_a_queue, _unread):
            until(lambda: harness.closes_pending(caller) > 0, "hangs")
        value(caller.call("add-fd", None, [0]))
        value(caller.call("query-fds"))

    assert_service_unharmed(path, scenario, "--max-connections", "5")


@needs_fuse
def test_more_closes_hang_than_there_are_threads(path: Path) -> None:
    """Other closes still run, and are complete before the reply."""

    def scenario(harness: Harness) -> None:
        opened, hang = harness.stack.enter_context(_files(path.parent))
        numbers = [opened() for _ in range(50)]
        caller = harness.caller()
        value(caller.call("add-fds", None, numbers))
        hang()
        for number in numbers:
            harness.close_in_thread(number)
        value(caller.call("remove-fd", {"fdset-id": 0}))
        assert harness.closes_pending(caller) >= len(numbers)
        ours, its = socket.socketpair()
        with ours:
            with its:
                value(caller.call("add-fd", None, [its]))
            value(caller.call("remove-fd", {"fdset-id": 0}))
            ours.settimeout(5)
            assert ours.recv(1) == b""

    assert_service_unharmed(path, scenario)


@needs_fuse
def test_the_looks_at_a_hung_file(path: Path) -> None:
    """query-fds and the checks of add-fds do not ask the descriptor's file system."""

    def scenario(harness: Harness) -> None:
        opened, hang = harness.stack.enter_context(_files(path.parent))
        number = opened()
        caller = harness.caller()
        value(caller.call("add-fd", {"opaque": "x"}, [number]))
        hang()
        [output] = value(caller.call("query-fds"))
        assert (output["kind"], output["access"]) == ("file", "rdwr")
        refused = caller.call("add-fds", {"watch-hangup": True}, [number])
        assert "sockets or pipes" in refused["error"]["desc"]
        harness.close_in_thread(number)

    assert_service_unharmed(path, scenario)


@needs_fuse
def test_a_hung_file_by_the_name_of_a_memfd(path: Path) -> None:
    """A file on a detached mount, such as another namespace's, may have a memfd's name."""

    def scenario(harness: Harness) -> None:
        with hung_files(path.parent / "mnt") as files:
            number = os.open(files.folder / "memfd:x", os.O_RDWR | os.O_CLOEXEC)
            subprocess.run(["umount", "-l", files.folder], check=True)
            caller = harness.caller()
            value(caller.call("add-fd", None, [number]))
            [output] = value(caller.call("query-fds"))
            assert output["target"].startswith("/memfd:")
            assert output["kind"] == "file"
            files.hang("FLUSH", "RELEASE", "GETATTR")
            harness.close_in_thread(number)
            value(caller.call("remove-fd", {"fdset-id": 0}))
            until(lambda: harness.closes_pending(caller) > 0, "hangs")

    assert_service_unharmed(path, scenario)


def test_memory_that_is_slow_to_give_back(path: Path) -> None:
    """A memfd of length 0 with 512 MiB allocated behind its end."""

    def scenario(harness: Harness) -> None:
        number = os.memfd_create("large")
        # FALLOC_FL_KEEP_SIZE, which Python lacks.
        subprocess.run(
            ["fallocate", "--keep-size", "--length", "512M", f"/proc/self/fd/{number}"],
            pass_fds=[number],
            check=True,
        )
        caller = harness.caller()
        value(caller.call("add-fd", None, [number]))
        os.close(number)
        value(caller.call("remove-fd", {"fdset-id": 0}))
        time.sleep(0.3)

    assert_service_unharmed(path, scenario)
