"""ClosePool: which descriptors are closed at once, and which by threads.

Tests of kernel/close_risk.py and kernel/fdinfo.py.
"""

from __future__ import annotations

import _thread
import ctypes
import gc
import os
import select
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers import PATIENCE, Pipe, send_now
from kinds import KINDS, open_kind

from qmpfd.kernel import close_pool, close_risk, fdinfo, mounts
from qmpfd.kernel.close_pool import ClosePool, Closing, Duplicate
from qmpfd.kernel.close_risk import Risk
from qmpfd.kernel.fd import Fd, is_in_memory

MEBIBYTE = 1 << 20


@pytest.fixture
def closer() -> Iterator[ClosePool]:
    """A pool that must be idle at the end."""
    closer = ClosePool()
    knows_mounts(closer)
    yield closer
    until(lambda: not closer.pending)
    closer.shut_down()


def until(happened: Callable[[], bool]) -> None:
    """Wait until a function returns true: a thread makes it so."""
    deadline = time.monotonic() + PATIENCE
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def knows_mounts(closer: ClosePool) -> None:
    """Wait until the pool has read the table of mounts."""
    found = closer._risks._file_systems
    assert found is not None
    until(lambda: bool(found.devices()) and found.is_current)


def closed(closing: Closing | None) -> None:
    """Wait until a closing is complete."""
    if closing is not None:
        done = threading.Event()
        closing.when_done(done.set)
        assert done.wait(PATIENCE)
        assert closing.is_done


# -- the risk ----------------------------------------------------------------------------------

#: Kinds of ``kinds.py`` that are not always closed at once.
SLIGHT = {"TCP socket", "TCP socket, listening", "Unix socket", "Unix socket, connected", "epoll"}
# A namespace ends with its last descriptor; pidfds have their own file system since Linux 6.9.
HIGH = {"netlink socket", "namespace", "pidfd"}


@pytest.mark.parametrize("kind", KINDS)
def test_ordinary_descriptors(kind: str, closer: ClosePool, tmp_path: Path) -> None:
    with open_kind(kind, tmp_path) as number:
        risk = closer.risk(number)
        if kind in SLIGHT:
            assert risk is Risk.SLIGHT
        elif kind in HIGH:
            assert risk in (Risk.HIGH, Risk.NONE)
        else:
            assert risk is Risk.NONE


@contextmanager
def _lingering() -> Iterator[socket.socket]:
    """Yield a connected socket with SO_LINGER of 30 s whose peer does not read."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        sock = socket.create_connection(listener.getsockname())
        peer, _ = listener.accept()
    with sock, peer:
        sock.setblocking(False)
        try:
            while True:
                sock.send(bytes(MEBIBYTE))
        except BlockingIOError:
            pass
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 30))
        yield sock


def test_a_duplicate_that_cannot_be_made() -> None:
    """No message comes from the deletion of the object: a warning is an error here."""
    with pytest.raises(ValueError, match="closed"):
        Duplicate(Fd(-1))
    gc.collect()


def test_a_lingering_socket(closer: ClosePool) -> None:
    with _lingering() as sock:
        assert closer.risk(sock.fileno()) is Risk.HIGH


def test_a_unix_socket_whose_peer_is_gone(closer: ClosePool) -> None:
    """The peer has closed: the risk depends on whether data is queued."""
    left, right = socket.socketpair()
    with left:
        with right:
            assert closer.risk(left.fileno()) is Risk.SLIGHT
            right.send(b"x")
        assert closer.risk(left.fileno()) is Risk.SLIGHT
        left.recv(1)
        assert closer.risk(left.fileno()) is Risk.NONE


def test_a_datagram_without_a_byte(closer: ClosePool) -> None:
    """An empty datagram can carry descriptors, and has no bytes for FIONREAD to count."""
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with left:
        with right:
            right.send(b"")
        assert closer.risk(left.fileno()) is Risk.SLIGHT


def _inotify() -> int:
    return int(ctypes.CDLL(None).inotify_init1(os.O_CLOEXEC))


@pytest.mark.parametrize(
    "opened",
    [
        _inotify,
        lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW).detach(),
        lambda: os.open("/dev/tty0", os.O_RDWR),
        lambda: os.open("/dev/fuse", os.O_RDWR),
    ],
    ids=["inotify", "packet", "terminal", "fuse"],
)
def test_what_is_not_known_to_be_quick(opened: Callable[[], int], closer: ClosePool) -> None:
    try:
        fd = Fd(opened())
    except OSError as exc:
        pytest.skip(str(exc))
    with fd:
        assert closer.risk(fd.fileno()) is Risk.HIGH


def test_much_memory_without_a_name(closer: ClosePool) -> None:
    with Fd(os.memfd_create("large")) as fd:
        assert closer.risk(fd.fileno()) is Risk.NONE
        os.ftruncate(fd.fileno(), 65 * MEBIBYTE)
        assert closer.risk(fd.fileno()) is Risk.HIGH
        os.ftruncate(fd.fileno(), 0)
        assert closer.risk(fd.fileno()) is Risk.NONE
        # Memory allocated behind the end is not part of the length.
        subprocess.run(
            ["fallocate", "--keep-size", "--length", "65M", f"/proc/self/fd/{fd.fileno()}"],
            pass_fds=[fd.fileno()],
            check=True,
        )
        assert os.fstat(fd.fileno()).st_size == 0
        assert closer.risk(fd.fileno()) is Risk.HIGH


def test_a_large_file_with_a_name(closer: ClosePool, tmp_path: Path) -> None:
    """A large file with a name, such as a disk image: the close frees no blocks."""
    with open(tmp_path / "image", "wb") as file:
        file.truncate(100 * MEBIBYTE)
        assert closer.risk(file.fileno()) is Risk.NONE
        (tmp_path / "image").unlink()
        assert closer.risk(file.fileno()) is Risk.HIGH


def test_the_name_of_a_memfd(tmp_path: Path) -> None:
    (tmp_path / "memfd:x").touch()
    with open(tmp_path / "memfd:x") as file, Fd(os.memfd_create("x")) as memfd:
        on_disk = os.stat("/").st_dev == os.fstat(file.fileno()).st_dev
        assert is_in_memory(memfd.fileno())
        assert is_in_memory(file.fileno()) is not on_disk
        assert fdinfo.kind(memfd.fileno(), "/memfd:x (deleted)") == "memfd"
        if on_disk:
            assert fdinfo.kind(file.fileno(), "/memfd:x (deleted)") == "file"


def test_an_unknown_file_system(
    closer: ClosePool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open(tmp_path / "file", "w") as file:
        assert closer.risk(file.fileno()) is Risk.NONE
        monkeypatch.setattr(mounts, "LOCAL", frozenset())
        other = ClosePool()
        try:
            found = other._risks._file_systems
            assert found is not None
            until(lambda: found.is_current)
            assert other.risk(file.fileno()) is Risk.HIGH
        finally:
            other.shut_down()


@pytest.mark.root
def test_mounts_come_and_go(closer: ClosePool, tmp_path: Path) -> None:
    """A device number can be reused for another file system."""
    for kind, risk in (("tmpfs", Risk.NONE), ("ramfs", Risk.NONE), ("tmpfs", Risk.NONE)):
        subprocess.run(["mount", "-t", kind, "test", tmp_path], check=True)
        try:
            with open(tmp_path / "file", "w") as file:
                # Not known to be local before the table is read again.
                assert closer.risk(file.fileno()) is Risk.HIGH
                knows_mounts(closer)
                assert closer.risk(file.fileno()) is risk
                subprocess.run(["umount", "-l", tmp_path], check=True)
                # The close of the last descriptor ends the file system.
                assert closer.risk(file.fileno()) is Risk.HIGH
        except BaseException:
            subprocess.run(["umount", "-l", tmp_path], check=False)
            raise


@pytest.mark.root
def test_the_last_descriptor_on_a_detached_mount(closer: ClosePool, tmp_path: Path) -> None:
    """The last descriptor on a detached mount, also with O_PATH, unmounts it, which may be slow."""
    subprocess.run(["mount", "-t", "tmpfs", "test", tmp_path], check=True)
    with Fd(os.open(tmp_path, os.O_PATH)) as fd:
        knows_mounts(closer)
        assert closer.risk(fd.fileno()) is Risk.NONE
        subprocess.run(["umount", "-l", tmp_path], check=True)
        assert closer.risk(fd.fileno()) is Risk.HIGH


def test_a_place_that_is_no_file_of_a_mount(closer: ClosePool) -> None:
    with Pipe() as pipe, Fd(os.open(f"/proc/self/fd/{pipe.fileno()}", os.O_PATH)) as fd:
        assert closer.risk(fd.fileno()) is Risk.HIGH


def test_lanes_are_by_device_and_uid(closer: ClosePool, tmp_path: Path) -> None:
    """Descriptors of one device, charged to one uid, share a lane of threads."""
    with (
        open(tmp_path / "one", "w") as one,
        open(tmp_path / "other", "w") as other,
        socket.socket(socket.AF_NETLINK, socket.SOCK_RAW) as sock,
        open("/dev/null") as null,
        open("/dev/zero") as zero,
    ):
        assert closer.lane(one, 1) == closer.lane(other, 1) != closer.lane(one, 2)
        assert len({closer.lane(each, 1) for each in (one, sock, null, zero)}) == 4


# -- closing -----------------------------------------------------------------------------------


def _threads() -> int:
    """Return the number of threads of this process."""
    return len(os.listdir("/proc/self/task"))


def test_ordinary_ones_are_closed_without_a_thread(closer: ClosePool, tmp_path: Path) -> None:
    threads = _threads()
    with Pipe() as pipe, open(tmp_path / "file", "w") as file:
        fds = [Fd(os.dup(pipe.fileno())), Fd(os.dup(file.fileno())), Fd(os.open("/dev/null", 0))]
        pipe.release()
        assert closer.close(fds) is None
        assert all(fd.closed for fd in fds)
        assert not pipe.held()
    assert closer.pending == 0
    assert _threads() == threads


def test_duplicates(closer: ClosePool, tmp_path: Path) -> None:
    """A duplicate of a kind that only the last close may block is closed at once."""
    threads = _threads()
    with _lingering() as sock, open(tmp_path / "file", "w") as file:
        fds = [Fd(os.dup(sock.fileno())), Fd(os.dup(file.fileno()))]
        assert all(closer.is_quick_duplicate(fd.fileno()) for fd in fds)
        closer.close_duplicates(fds)
        assert all(fd.closed for fd in fds)
        closer.shut_down()  # no file system is known to be local
        unknown, quick = Fd(os.dup(file.fileno())), Fd(os.dup(file.fileno()))
        assert not closer.is_quick_duplicate(unknown.fileno())
        closer.close_duplicates([quick], {quick})
        assert closer.pending == 0
        assert _threads() == threads
        closer.close_duplicates([unknown])
        until(lambda: not closer.pending)
        assert unknown.closed


def test_closing_is_complete_when_reported(closer: ClosePool) -> None:
    pairs = [socket.socketpair() for _ in range(50)]
    closed(closer.close([Fd(its.detach()) for _, its in pairs]))
    for ours, _ in pairs:
        with ours:
            ours.setblocking(False)
            assert ours.recv(1) == b""


def test_closed_twice(closer: ClosePool) -> None:
    fd = Fd(os.dup(0))
    fd.close()
    closer.close([fd])


def _cloak(sock: socket.socket) -> tuple[Fd, socket.socket]:
    """Return a Unix socket with *sock* in its queue, and its peer."""
    left, right = socket.socketpair()
    send_now(left, b"x", [sock])
    return Fd(right.detach()), left


def test_a_hanging_close_delays_no_other(closer: ClosePool) -> None:
    """A close that hangs unexpectedly delays no other."""
    with _lingering() as sock:
        duplicate = Fd(os.dup(sock.fileno()))
        cloaked, left = _cloak(sock)
        sock.close()
        closed(closer.close([duplicate]))  # not the last duplicate: the close does not hang
        ours, its = socket.socketpair()
        with ours, left:
            left.close()
            hanging = closer.close([cloaked, Fd(its.detach())])
            assert hanging is not None
            ours.settimeout(PATIENCE)
            assert ours.recv(1) == b""
            assert not hanging.is_done
        until(lambda: closer.pending == 1)


def test_a_hanging_close_delays_no_other_uid(
    closer: ClosePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each uid has threads of its own, and its pending closes count against it."""
    monkeypatch.setattr(close_pool, "_MAX_WAIT", PATIENCE)
    closed_there = threading.Event()
    for _ in range(100):
        fd = Fd(socket.socket().detach())
        closer.close_after(fd, closed_there)
        closer.close([fd], uid=1)
    assert closer.pending_by_uid.get(1, 0) == closer.pending == 100
    mine = Fd(socket.socket().detach())
    closed(closer.close([mine], uid=2))
    assert mine.closed
    assert closer.pending_by_uid.get(2, 0) == 0
    assert closer.pending_by_uid.get(1, 0) == 100
    # A removal by another uid counts against the uid that added the descriptor.
    theirs = Fd(socket.socket().detach())
    theirs.uid = 1
    closer.close_after(theirs, closed_there)
    closer.close([theirs], uid=2)
    assert [closer.pending_by_uid.get(1, 0), closer.pending_by_uid.get(2, 0)] == [101, 0]
    closed_there.set()


def test_closed_after_its_duplicate(closer: ClosePool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The descriptor is closed after its duplicate in another process, which confirms that."""
    monkeypatch.setattr(close_pool, "_MAX_WAIT", PATIENCE)
    fd, closed_there = Fd(socket.socket().detach()), threading.Event()
    closer.close_after(fd, closed_there)
    closing = closer.close([fd])
    assert closing is not None
    assert not fd.closed
    closed_there.set()
    closed(closing)
    assert fd.number == -1


def test_more_closes_than_threads(closer: ClosePool) -> None:
    epolls = [Fd(os.dup(epoll.fileno())) for epoll in [select.epoll() for _ in range(100)]]
    inotifies = [Fd(number) for number in (_inotify() for _ in range(100)) if number >= 0]
    closer.close(epolls + inotifies)
    until(lambda: not closer.pending)
    assert all(fd.closed for fd in epolls + inotifies)


def test_a_close_starts_one_thread(closer: ClosePool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Starting a thread may be slow: the caller starts one, which starts the others."""
    starters = []
    start = _thread.start_new_thread

    def noting(function: Callable[[], None], arguments: tuple[()]) -> int:
        starters.append(_thread.get_ident())
        return start(function, arguments)

    monkeypatch.setattr("_thread.start_new_thread", noting)
    inotifies = [Fd(number) for number in (_inotify() for _ in range(60)) if number >= 0]
    closer.close(inotifies)
    until(lambda: not closer.pending)
    assert starters.count(_thread.get_ident()) == 1


def test_no_thread_to_be_had(closer: ClosePool, monkeypatch: pytest.MonkeyPatch) -> None:
    """If no thread can be started, the next close starts one for all that is pending."""

    def fails(function: Callable[[], None], arguments: tuple[()]) -> int:
        raise RuntimeError("can't start new thread")

    fd = Fd(_inotify())
    with monkeypatch.context() as patch:
        patch.setattr("_thread.start_new_thread", fails)
        closer.close([fd])
        assert not fd.closed
        assert closer.pending == 1
    closer.close([Fd(_inotify())], uid=1000)  # any uid
    until(lambda: fd.closed)


def test_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without /proc every file system is unknown, except those in memory."""

    def fails() -> None:
        raise FileNotFoundError

    monkeypatch.setattr(close_risk, "LocalFileSystems", fails)
    closer = ClosePool()
    with open("/proc/self/status") as file:  # no temporary file: /tmp is often in memory
        assert closer.risk(file.fileno()) is Risk.HIGH
    closer.shut_down()


@pytest.mark.parametrize("mounted", [False, True], ids=["", "mounted meanwhile"])
@pytest.mark.parametrize("in_file_system", [False, True])
def test_closed_after_a_duplicate_here(
    closer: ClosePool, monkeypatch: pytest.MonkeyPatch, in_file_system: bool, mounted: bool
) -> None:
    """A duplicate whose close cannot block, because another one is open, is closed at once; else a
    thread closes it, and then the original: the file system gets a FLUSH at each close.
    """
    monkeypatch.setattr(closer._risks, "_file_systems", None)  # no file system is known to be local
    fd = Fd(os.open("/proc/self/status", os.O_RDONLY) if in_file_system else _inotify())
    duplicate, go_on = Duplicate(fd), threading.Event()
    order: list[Fd] = []
    close = Fd.close

    def noting(self: Fd) -> None:
        if self is duplicate and in_file_system:
            go_on.wait(PATIENCE)
        order.append(self)
        close(self)

    monkeypatch.setattr(Fd, "close", noting)
    closer.close([duplicate])
    assert duplicate.closed != in_file_system
    if mounted:  # the close of the original cannot block now
        monkeypatch.setattr(closer, "risk", lambda _: Risk.NONE)
        assert not closer.may_block(fd)
    closing = closer.close([fd])
    assert (closing is None) == (mounted and not in_file_system)
    go_on.set()
    if closing is not None:
        closed(closing)
    assert order == [duplicate, fd]


def test_a_duplicate_that_outlives_its_original(closer: ClosePool) -> None:
    """A duplicate that is closed after its original may be the last: a thread closes it."""
    fd = Fd(_inotify())
    duplicate = Duplicate(fd)
    first, second = closer.close([fd]), closer.close([duplicate])
    for closing in (first, second):
        assert closing is not None
        closed(closing)
    assert fd.closed
    assert duplicate.closed
