"""Owners of descriptors, and the system calls that send and receive them."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from qmpfd.kernel.fd import (
    DENIED,
    OUT_OF_FDS,
    Fd,
    close_all,
    discard,
    fileno,
    peek,
    receive,
    send,
)
from qmpfd.limits import READ_BYTES, SCM_MAX_FD, SEGMENT_BYTES


def is_open(number: int) -> bool:
    try:
        fcntl.fcntl(number, fcntl.F_GETFD)
    except OSError as exc:
        if exc.errno != errno.EBADF:
            raise
        return False
    return True


@pytest.fixture
def fd() -> Iterator[Fd]:
    with Fd(os.open("/dev/null", os.O_RDWR)) as fd:
        yield fd


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    a, b = socket.socketpair()
    a.setblocking(False)
    b.setblocking(False)
    with a, b:
        yield a, b


Pair = tuple[socket.socket, socket.socket]


# -- one owner -------------------------------------------------------------------------------------


def test_close_once(fd: Fd) -> None:
    number = fd.fileno()
    assert repr(fd) == f"<Fd {number}>"
    fd.close()
    assert repr(fd) == "<Fd closed>"
    assert fd.closed
    assert not is_open(number)
    assert os.open("/dev/null", os.O_RDONLY) == number  # reused
    fd.close()
    fd.__exit__()
    assert is_open(number)
    os.close(number)


@pytest.mark.parametrize("call", [Fd.fileno, Fd.detach, Fd.dup])
def test_a_closed_owner_raises(fd: Fd, call: object) -> None:
    fd.close()
    assert callable(call)
    with pytest.raises(ValueError, match="closed"):
        call(fd)


def test_detach(fd: Fd) -> None:
    number = fd.detach()
    assert fd.closed
    fd.close()
    assert is_open(number)
    os.close(number)


def test_dup(fd: Fd) -> None:
    with fd.dup() as other:
        assert other.fileno() != fd.fileno()
        assert os.path.sameopenfile(other.fileno(), fd.fileno())
        assert not os.get_inheritable(other.fileno())
        fd.close()
        assert is_open(other.fileno())
    assert other.closed


def test_close_that_reports_an_error_has_closed() -> None:
    """close(2) may report an error, such as a lost write, though it has closed the descriptor."""
    number = os.open("/dev/null", os.O_RDONLY)
    fd = Fd(number)
    os.close(number)
    fd.close()
    assert fd.closed


def test_close_all(fd: Fd) -> None:
    fds = [fd.dup() for _ in range(3)]
    close_all(iter(fds))
    assert all(fd.closed for fd in fds)


def test_close_all_in_rows(fd: Fd) -> None:
    """close_range(2) for consecutive numbers, in any order; others between them stay open."""
    fds = [fd.dup() for _ in range(12)]
    numbers = [each.number for each in fds]
    left = [fds[2], fds[7], fds[11]]
    gone = [each for each in fds if each not in left]
    fds[4].close()
    close_all([])
    close_all([fds[4]])
    assert is_open(0)
    close_all([*gone[5:], *reversed(gone[:5])])
    assert [number for number in numbers if is_open(number)] == [each.number for each in left]
    close_all(left)


def test_a_forgotten_owner_raises_a_resource_warning() -> None:
    number = os.open("/dev/null", os.O_RDONLY)
    fd = Fd(number)
    with pytest.warns(ResourceWarning, match=f"unclosed <Fd {number}>"):
        del fd
    assert not is_open(number)


def test_fileno(fd: Fd) -> None:
    assert fileno(fd) == fd.fileno()
    assert fileno(7) == 7
    for bad in (-1, socket.socket()):
        if isinstance(bad, socket.socket):
            bad.close()
        with pytest.raises(ValueError, match="-1 is no file descriptor"):
            fileno(bad)


# -- over a socket ---------------------------------------------------------------------------------


def test_nothing_there(pair: Pair) -> None:
    with pytest.raises(BlockingIOError):
        peek(pair[0])
    with pytest.raises(BlockingIOError):
        receive(pair[0], 100)


def test_end(pair: Pair) -> None:
    pair[1].close()
    assert peek(pair[0]) == (b"", False)
    assert receive(pair[0], 100) == (b"", [], "")


def test_bytes(pair: Pair) -> None:
    assert send(pair[1], b"hello", ()) == 5
    assert send(pair[1], memoryview(b" you"), []) == 4
    assert peek(pair[0]) == peek(pair[0]) == (b"hello you", False)
    assert receive(pair[0], 3) == (b"hel", [], "")
    assert receive(pair[0], 100) == (b"lo you", [], "")


def test_fds(pair: Pair, fd: Fd) -> None:
    send(pair[1], b"plain", ())
    send(pair[1], b"with", [fd, fd.fileno()])
    send(pair[1], b"after", ())
    assert peek(pair[0]) == peek(pair[0]) == (b"plainwith", True)
    data, fds, lost = receive(pair[0], READ_BYTES)
    assert (data, len(fds), lost) == (b"plainwith", 2, "")
    for received in fds:
        assert os.path.sameopenfile(received.fileno(), fd.fileno())
        assert not os.get_inheritable(received.fileno())
    close_all(fds)
    assert not fd.closed
    assert peek(pair[0]) == (b"after", False)


def test_a_read_never_has_a_descriptor_before_its_first_byte(pair: Pair, fd: Fd) -> None:
    send(pair[1], b"plain", ())
    send(pair[1], b"with", [fd])
    assert receive(pair[0], 5) == (b"plain", [], "")
    data, fds, _ = receive(pair[0], 1)
    assert (data, len(fds)) == (b"w", 1)
    close_all(fds)
    assert peek(pair[0]) == (b"ith", False)


def test_status_flags_are_not_touched(pair: Pair, fd: Fd) -> None:
    """Status flags are not changed, because the sender shares them (QEMU clears O_NONBLOCK)."""
    flags = fcntl.fcntl(fd.fileno(), fcntl.F_GETFL) | os.O_NONBLOCK | os.O_APPEND
    fcntl.fcntl(fd.fileno(), fcntl.F_SETFL, flags)
    send(pair[1], b"x", [fd])
    _, fds, _ = receive(pair[0], 1)
    assert fcntl.fcntl(fds[0].fileno(), fcntl.F_GETFL) == flags
    close_all(fds)


def test_as_many_as_the_kernel_passes(pair: Pair, fd: Fd) -> None:
    assert send(pair[1], b"x", [fd] * SCM_MAX_FD) == 1
    _, fds, lost = receive(pair[0], 1)
    assert (len(fds), lost) == (SCM_MAX_FD, "")
    close_all(fds)
    with pytest.raises(OSError, match="Invalid argument"):
        send(pair[1], b"x", [fd] * (SCM_MAX_FD + 1))


@contextmanager
def room_for(count: int) -> Iterator[None]:
    """Limit this process to *count* more descriptors."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken: list[int] = []
    try:
        spare = [os.open("/dev/null", os.O_RDONLY) for _ in range(count)]
        lowest = os.open("/dev/null", os.O_RDONLY)
        taken = [lowest]
        highest = max(int(name) for name in os.listdir("/proc/self/fd"))
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, before[1]))
        while True:
            try:
                taken.append(os.dup(lowest))
            except OSError:
                break
        for number in spare:
            os.close(number)
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        for number in taken:
            os.close(number)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_out_of_descriptors(pair: Pair, fd: Fd, count: int) -> None:
    send(pair[1], b"abc", [fd] * 3)
    with room_for(count):
        data, fds, lost = receive(pair[0], 2)
    assert (data, len(fds), lost) == (b"ab", count, OUT_OF_FDS)
    close_all(fds)
    assert receive(pair[0], 2) == (b"c", [], "")


def test_room_for_all(pair: Pair, fd: Fd) -> None:
    send(pair[1], b"abc", [fd] * 3)
    with room_for(3):
        _, fds, lost = receive(pair[0], 2)
    assert (len(fds), lost) == (3, "")
    close_all(fds)


def test_full(pair: Pair, fd: Fd) -> None:
    chunk = bytes(65536)
    while True:
        try:
            assert send(pair[1], chunk, ()) > 0
        except BlockingIOError:
            break
    with pytest.raises(BlockingIOError):
        send(pair[1], b"x", [fd])
    while receive(pair[0], READ_BYTES)[0]:
        try:
            send(pair[1], b"x", [fd])
        except BlockingIOError:
            continue
        break
    seen: list[Fd] = []
    while not seen:
        _, seen, _ = receive(pair[0], READ_BYTES)
    assert len(seen) == 1  # sent once, though tried twice
    close_all(seen)


def test_peer_is_gone(pair: Pair, fd: Fd) -> None:
    pair[0].close()
    with pytest.raises(BrokenPipeError):
        send(pair[1], b"x", ())
    with pytest.raises(BrokenPipeError):
        send(pair[1], b"x", [fd])


@pytest.mark.parametrize("ahead", [READ_BYTES - SEGMENT_BYTES, READ_BYTES - 10, READ_BYTES - 1])
def test_a_peek_shows_a_segment_with_fds_completely(pair: Pair, fd: Fd, ahead: int) -> None:
    """A peek shows a segment with descriptors completely, up to its end."""
    half = ahead // 2
    send(pair[1], b"a" * half, ())
    send(pair[1], b"b" * (ahead - half), ())
    sent = send(pair[1], b"c" * 30_000, [fd])
    send(pair[1], b"d", ())
    while True:
        data, fds_follow = peek(pair[0])
        seen = data.count(b"c")
        if fds_follow and seen:
            break
        got, fds, _ = receive(pair[0], len(data))
        assert (got, fds) == (data, [])
    assert seen == sent
    assert data.endswith(b"c")
    _, fds, _ = receive(pair[0], len(data))
    assert len(fds) == 1
    close_all(fds)


def test_segments_are_at_most_segment_bytes(pair: Pair, fd: Fd) -> None:
    """Descriptors are on the first buffer of a send, of at most SEGMENT_BYTES."""
    pair[1].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    assert send(pair[1], bytes(100_000), [fd]) > SEGMENT_BYTES
    data, fds, _ = receive(pair[0], 1 << 20)
    close_all(fds)
    assert 0 < len(data) <= SEGMENT_BYTES


def test_peeking_from_many_threads() -> None:
    """Threads that peek at the same time each get their own socket's bytes."""
    rounds, failures = 3000, []

    def look(tag: bytes) -> None:
        near, far = socket.socketpair()
        with near, far:
            for _ in range(rounds):
                near.send(tag * 500)
                data, _ = peek(far)
                discard(far, len(data))
                if data != tag * 500:
                    failures.append(data)

    threads = [threading.Thread(target=look, args=[bytes([65 + n])]) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_what_is_lost_with_room_for_it_was_denied(
    pair: Pair, fd: Fd, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A security module can make the kernel drop descriptors though the table has room.  Here a
    control buffer that is too small has the same effect.
    """
    monkeypatch.setattr("qmpfd.kernel.fd._CONTROL_BYTES", 0)
    send(pair[1], b"x", [fd])
    assert receive(pair[0], 1) == (b"x", [], DENIED)
