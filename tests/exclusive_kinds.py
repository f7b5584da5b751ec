"""Descriptors that show whether all their duplicates are closed: while one is open, a second one
cannot be opened, or the peer's end shows that.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from qmpfd.kernel.fd import Fd

#: Opens the next descriptor; raises OSError while a duplicate of the last one is open.
Opener: TypeAlias = Callable[[], Fd]

Kind: TypeAlias = Callable[[Path], AbstractContextManager[Opener]]


# -- sockets -----------------------------------------------------------------------------------


@contextmanager
def _bound(_: Path, family: int, kind: int, address: Any) -> Iterator[Opener]:
    """Open sockets that are bound to one address: bind(2) fails while another one has it."""
    with socket.socket(family, kind) as first:
        first.bind(address)
        address = first.getsockname()

    def opened() -> Fd:
        with socket.socket(family, kind) as sock:
            sock.bind(address)
            if sock.type in (socket.SOCK_STREAM, socket.SOCK_SEQPACKET):
                sock.listen()
            return Fd(sock.detach())

    yield opened


# -- one end shows that the other is closed ----------------------------------------------------

#: One end, the other end, and a function that raises OSError while the first is open.
_Pair: TypeAlias = tuple[Fd, Fd, Callable[[Fd], object]]


@contextmanager
def _ends(_: Path, pair: Callable[[], _Pair]) -> Iterator[Opener]:
    with ExitStack() as before:

        def opened() -> Fd:
            for check in checks:
                check()
            checks.clear()
            before.close()
            one, other, is_gone = pair()
            before.enter_context(other)
            os.set_blocking(other.fileno(), False)
            checks.append(partial(is_gone, other))
            return one

        checks: list[Callable[[], object]] = []
        yield opened


def _at_end(fd: Fd) -> None:
    try:
        assert not os.read(fd.fileno(), 1)
    except ConnectionResetError:
        pass


def _hung_up(fd: Fd) -> None:
    poll = select.poll()
    poll.register(fd, 0)
    if not poll.poll(0):
        raise OSError("nothing has hung up")


def _pipe() -> _Pair:
    reader, writer = map(Fd, os.pipe2(os.O_CLOEXEC))
    return writer, reader, _at_end


def _terminal() -> _Pair:
    master, slave = map(Fd, os.openpty())
    return master, slave, _hung_up


def _lingering() -> _Pair:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        one = socket.create_connection(listener.getsockname())
        other, _ = listener.accept()
    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    return Fd(one.detach()), Fd(other.detach()), _at_end


def _in_a_queue(*, itself: bool = False) -> _Pair:
    """Make a Unix socket, to be sent, with a pipe's write end in its queue.

    Args:
        itself: whether the socket's peer is in the queue too, a cycle of references.
    """
    writer, reader, is_gone = _pipe()
    left, right = socket.socketpair()
    with left, right, writer:
        socket.send_fds(left, [b"x"], [writer.fileno(), *([left.fileno()] if itself else [])])
        return Fd(right.detach()), reader, is_gone


# -- files -------------------------------------------------------------------------------------


@contextmanager
def _locked(folder: Path, lock: Callable[[int], object]) -> Iterator[Opener]:
    path = folder / "locked"
    path.touch()

    def opened() -> Fd:
        with Fd(os.open(path, os.O_RDWR | os.O_CLOEXEC)) as fd:
            lock(fd.fileno())
            return Fd(fd.detach())

    yield opened


def _flock(number: int) -> None:
    fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _ofd_lock(number: int) -> None:
    # F_OFD_SETLK, fcntl(2)
    fcntl.fcntl(number, 37, struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))


@contextmanager
def _lease(folder: Path) -> Iterator[Opener]:
    path = folder / "leased"
    path.touch()
    before = signal.signal(signal.SIGIO, signal.SIG_IGN)  # sent when a lease is broken

    def opened() -> Fd:
        os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC))
        fd = Fd(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        fcntl.fcntl(fd.fileno(), fcntl.F_SETLEASE, fcntl.F_RDLCK)
        return fd

    try:
        yield opened
    finally:
        signal.signal(signal.SIGIO, before)


@contextmanager
def _written_program(folder: Path) -> Iterator[Opener]:
    """Open a program for writing: execve(2) fails with ETXTBSY while it is open."""
    path = folder / "true"
    shutil.copy(shutil.which("true") or "/bin/true", path)

    def opened() -> Fd:
        subprocess.run([path], check=True)
        return Fd(os.open(path, os.O_WRONLY | os.O_CLOEXEC))

    yield opened


# -- devices, and others of the kernel's -------------------------------------------------------


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
        os.pwrite(fd.fileno(), os.urandom(1 << 18), 0)  # dirty pages: the close has to flush them
        return fd

    try:
        yield opened
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


def _checked(result: int) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


@contextmanager
def _userfaultfd(_: Path) -> Iterator[Opener]:
    """Register a memory range, which can have one userfaultfd at a time (UFFDIO_REGISTER)."""
    libc = ctypes.CDLL(None, use_errno=True)
    memory = mmap.mmap(-1, mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))

    def opened() -> Fd:
        # UFFD_USER_MODE_ONLY needs no privilege.
        with Fd(_checked(libc.syscall(323, os.O_CLOEXEC | 1))) as fd:
            api = bytearray(struct.pack("QQQ", 0xAA, 0, 0))
            fcntl.ioctl(fd.fileno(), 0xC018AA3F, api)
            register = bytearray(struct.pack("QQQQ", address, mmap.PAGESIZE, 1, 0))
            fcntl.ioctl(fd.fileno(), 0xC020AA00, register)
            return Fd(fd.detach())

    try:
        opened().close()
    except OSError as exc:
        pytest.skip(f"no userfaultfd: {exc}")
    yield opened


#: Program of a process in namespaces of its own, which may set limits and mount: it opens a
#: descriptor for each byte received, and sends the descriptor or the errno.
_ELSEWHERE = """
import array, ctypes, os, socket, sys
libc = ctypes.CDLL(None, use_errno=True)
sock, what, folder = socket.socket(fileno=int(sys.argv[1])), sys.argv[2], os.fsencode(sys.argv[3])
def checked(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), "")
    return result
def limit(name, most):
    with open("/proc/sys/user/max_" + name, "w") as file:
        file.write(str(most))
if what == "inotify":
    limit("inotify_instances", 1)
    def opened():
        fd = checked(libc.inotify_init1(os.O_CLOEXEC))
        checked(libc.inotify_add_watch(fd, folder, 0xfff))
        return fd
elif what == "fanotify":
    limit("fanotify_groups", 1)
    def opened():
        return checked(libc.fanotify_init(0x201, 0))  # FAN_CLOEXEC, FAN_REPORT_FID
elif what == "namespace":
    own = os.open("/proc/self/ns/uts", os.O_RDONLY)
    limit("uts_namespaces", 2)
    def opened():
        checked(libc.unshare(0x4000000))
        fd = os.open("/proc/self/ns/uts", os.O_RDONLY)
        checked(libc.setns(own, 0))
        return fd
else:  # a mount in a private mount namespace
    checked(libc.mount(b"none", b"/", None, 0x44000, None))  # MS_REC | MS_PRIVATE
    mounted = []
    def opened():
        if mounted:
            checked(libc.umount2(folder, 0))
        mounted[:] = [checked(libc.mount(b"none", folder, b"tmpfs", 0, None))]
        return os.open(folder, int(what))
while sock.recv(1):
    try:
        fd = opened()
    except OSError as exc:
        sock.sendall(b"%d" % exc.errno)
    else:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
        sock.sendmsg([b"0"], rights)
        os.close(fd)
"""


@contextmanager
def _elsewhere(folder: Path, what: str, *namespaces: str) -> Iterator[Opener]:
    sock, theirs = socket.socketpair()
    with sock:
        with theirs:
            command = ["unshare", *namespaces, sys.executable, "-c", _ELSEWHERE]
            process = subprocess.Popen(
                [*command, str(theirs.fileno()), what, folder], pass_fds=[theirs.fileno()]
            )

        def opened() -> Fd:
            sock.sendall(b"x")
            data, fds, _, _ = socket.recv_fds(sock, 16, 1)
            if code := int(data):
                raise OSError(code, os.strerror(code))
            return Fd(fds[0])

        try:
            yield opened
        finally:
            sock.shutdown(socket.SHUT_RDWR)
            process.wait()


_IP, _UNIX, _STREAM, _DATAGRAM = (
    socket.AF_INET,
    socket.AF_UNIX,
    socket.SOCK_STREAM,
    socket.SOCK_DGRAM,
)
_LOOPBACK = ("127.0.0.1", 0)

#: Kinds that an ordinary user can open.
KINDS: dict[str, Kind] = {
    "TCP, listening": partial(_bound, family=_IP, kind=_STREAM, address=_LOOPBACK),
    "UDP": partial(_bound, family=_IP, kind=_DATAGRAM, address=_LOOPBACK),
    "abstract Unix socket": partial(_bound, family=_UNIX, kind=_STREAM, address=""),
    "abstract Unix datagrams": partial(_bound, family=_UNIX, kind=_DATAGRAM, address=""),
    "netlink": partial(
        _bound, family=socket.AF_NETLINK, kind=socket.SOCK_RAW, address=(1_000_000 + os.getpid(), 0)
    ),
    "TCP, linger": partial(_ends, pair=_lingering),
    "pipe": partial(_ends, pair=_pipe),
    "terminal": partial(_ends, pair=_terminal),
    "pipe in a queue": partial(_ends, pair=_in_a_queue),
    "pipe in a cycle": partial(_ends, pair=partial(_in_a_queue, itself=True)),
    "flock": partial(_locked, lock=_flock),
    "OFD lock": partial(_locked, lock=_ofd_lock),
    "lease": _lease,
    "program that is written": _written_program,
    "userfaultfd": _userfaultfd,
}


def _limited(folder: Path, what: str) -> AbstractContextManager[Opener]:
    return _elsewhere(folder, what, "--user", "--map-root-user", "--ipc", "--uts")


def _mounted(folder: Path, flags: int) -> AbstractContextManager[Opener]:
    return _elsewhere(folder, str(flags), "--mount")


#: Kinds that need root and namespaces.
ROOT_KINDS: dict[str, Kind] = {
    "TAP": _tap,
    "block device": _block_device,
    "inotify": partial(_limited, what="inotify"),
    "fanotify": partial(_limited, what="fanotify"),
    "namespace": partial(_limited, what="namespace"),
    "directory of another's mount": partial(_mounted, flags=os.O_RDONLY),
    "place in another's mount": partial(_mounted, flags=os.O_PATH),
}
