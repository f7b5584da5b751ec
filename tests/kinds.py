"""Descriptors of every kind that a client may send."""

from __future__ import annotations

import fcntl
import os
import select
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

#: Opens the descriptor to be sent; returns it first, then others to be closed, such as its peer.
_Maker: TypeAlias = Callable[[Path], tuple[int, ...]]


def _file(flags: int) -> _Maker:
    def make(folder: Path) -> tuple[int, ...]:
        return (os.open(folder / "file", flags | os.O_CREAT | os.O_CLOEXEC, 0o600),)

    return make


def _path(name: str, flags: int) -> _Maker:
    return lambda folder: (os.open(folder / name, flags | os.O_CLOEXEC),)


def _opath(folder: Path) -> tuple[int, ...]:
    (folder / "unreadable").touch(0o000)
    return (os.open(folder / "unreadable", os.O_PATH | os.O_CLOEXEC),)


def _deleted(folder: Path) -> tuple[int, ...]:
    fd = os.open(folder / "deleted", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    (folder / "deleted").unlink()
    return (fd,)


def _fifo(folder: Path) -> tuple[int, ...]:
    os.mkfifo(folder / "fifo")
    return (os.open(folder / "fifo", os.O_RDWR | os.O_CLOEXEC),)


def _socket(family: int, kind: int) -> _Maker:
    return lambda folder: (socket.socket(family, kind).detach(),)


def _listening(folder: Path) -> tuple[int, ...]:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
        sock.listen()
        return (sock.detach(),)


def _socketpair(folder: Path) -> tuple[int, ...]:
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    return left.detach(), right.detach()


def _epoll(folder: Path) -> tuple[int, ...]:
    with select.epoll() as poll:
        return (os.dup(poll.fileno()),)


def _sealed_memfd(folder: Path) -> tuple[int, ...]:
    fd = os.memfd_create("sealed", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    return (fd,)


_MAKERS: dict[str, _Maker] = {
    "file, read": _file(os.O_RDONLY),
    "file, write": _file(os.O_WRONLY),
    "file, read and write": _file(os.O_RDWR),
    "file, append": _file(os.O_WRONLY | os.O_APPEND),
    "file, synchronous": _file(os.O_RDWR | os.O_SYNC),
    "file, not blocking": _file(os.O_RDWR | os.O_NONBLOCK),
    "file, deleted": _deleted,
    "O_PATH": _opath,
    "O_PATH of a directory": _path(".", os.O_PATH | os.O_DIRECTORY),
    "directory": _path(".", os.O_RDONLY | os.O_DIRECTORY),
    "pipe, reading end": lambda folder: os.pipe2(os.O_CLOEXEC),
    "pipe, writing end": lambda folder: os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)[::-1],
    "FIFO": _fifo,
    "TCP socket": _socket(socket.AF_INET, socket.SOCK_STREAM),
    "TCP socket, listening": _listening,
    "UDP socket": _socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK),
    "Unix socket": _socket(socket.AF_UNIX, socket.SOCK_STREAM),
    "Unix socket, connected": _socketpair,
    "netlink socket": _socket(socket.AF_NETLINK, socket.SOCK_RAW),
    "eventfd": lambda folder: (os.eventfd(7, os.EFD_CLOEXEC | os.EFD_NONBLOCK),),
    "epoll": _epoll,
    "pidfd": lambda folder: (os.pidfd_open(os.getpid()),),
    "memfd": lambda folder: (os.memfd_create("plain", os.MFD_CLOEXEC),),
    "memfd, sealed": _sealed_memfd,
    "/dev/null": _path("/dev/null", os.O_RDWR),
    "/dev/zero, read": _path("/dev/zero", os.O_RDONLY),
    "terminal": lambda folder: os.openpty(),
    "/proc file": _path("/proc/self/status", os.O_RDONLY),
    "namespace": _path("/proc/self/ns/net", os.O_RDONLY),
}

KINDS = list(_MAKERS)


@contextmanager
def open_kind(kind: str, folder: Path) -> Iterator[int]:
    """Yield a descriptor of that kind."""
    fds = _MAKERS[kind](folder)
    try:
        yield fds[0]
    finally:
        for fd in fds:
            os.close(fd)
