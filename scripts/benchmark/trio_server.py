"""Lower bounds for a server in Trio: the cost of Trio, the system calls and msgspec.

    python trio_server.py SOCKET [--strict]

One task for each connection: wait_readable, recvmsg, decode, execute, encode, send.  The server
has only ``add-fd`` and ``remove-fd``, no checks and no limits.  It relies on clients that send one
command a line, with the command's descriptor on it, and that read the replies.

With ``--strict``, it also does what qmpfd cannot leave out, and nothing else: it looks at the bytes
before it receives them (MSG_PEEK), which tells whose the descriptors are; finds out whether a close
may block; acquires the store's lock for all commands that it has read; and makes an outcome of each
result.
"""

from __future__ import annotations

import array
import itertools
import os
import socket
import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import msgspec
import trio
from outcome import Value

from qmpfd.kernel.close_risk import CloseRisks

#: fd sets by id: the descriptors in each.
SETS: dict[int, list[int]] = {}
_ids = itertools.count()
_lock = trio.Lock()
_risks = CloseRisks()
close = os.close


class Request(msgspec.Struct):
    """A QMP command."""

    execute: str
    arguments: dict[str, Any] = {}


_decode = msgspec.json.Decoder(Request).decode
_encode = msgspec.json.Encoder().encode


def execute(request: Request, fds: list[int]) -> dict[str, int]:
    """Execute one command; return its value."""
    if request.execute == "add-fd":
        fdset_id, fd = next(_ids), fds.pop(0)
        SETS[fdset_id] = [fd]
        return {"fdset-id": fdset_id, "fd": fd}
    if request.execute == "remove-fd":
        for fd in SETS.pop(request.arguments["fdset-id"]):
            close(fd)
    return {}


async def serve(sock: socket.socket) -> None:
    """Serve one client until it disconnects."""
    rest = b""
    with sock, suppress(ConnectionError):
        sock.send(b'{"QMP": {}}\r\n')
        while True:
            await trio.lowlevel.wait_readable(sock)
            data, control, _, _ = sock.recvmsg(1 << 16, 4096, socket.MSG_CMSG_CLOEXEC)
            if not data:
                return
            fds = array.array("i")
            for _, _, payload in control:
                fds.frombytes(payload)
            waiting = fds.tolist()
            *lines, rest = (rest + data).split(b"\n")
            replies = [_encode({"return": execute(_decode(line), waiting)}) for line in lines]
            sock.send(b"\r\n".join([*replies, b""]))


async def serve_strictly(sock: socket.socket) -> None:
    """Serve one client until it disconnects, as ``--strict`` says."""
    rest = b""
    with sock, suppress(ConnectionError):
        sock.send(b'{"QMP": {}}\r\n')
        while True:
            await trio.lowlevel.wait_readable(sock)
            seen = sock.recvmsg(1 << 16, 0, socket.MSG_PEEK)[0]
            data, control, _, _ = sock.recvmsg(len(seen) or 1, 4096, socket.MSG_CMSG_CLOEXEC)
            if not data:
                return
            fds = array.array("i")
            for _, _, payload in control:
                fds.frombytes(payload)
            waiting = fds.tolist()
            *lines, rest = (rest + data).split(b"\n")
            _lock.acquire_nowait()
            try:
                outcomes = [Value(execute(_decode(line), waiting)) for line in lines]
            finally:
                _lock.release()
            replies = [_encode({"return": outcome.unwrap()}) for outcome in outcomes]
            sock.send(b"\r\n".join([*replies, b""]))


def close_strictly(fd: int) -> None:
    """Find out whether closing a descriptor may block, and close it: it does not here."""
    _risks.find(fd)
    os.close(fd)


async def main(path: str, serve: Callable[[socket.socket], Awaitable[None]]) -> None:
    """Accept clients until the process is killed."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(4096)
        async with trio.open_nursery() as nursery:
            while True:
                await trio.lowlevel.wait_readable(listener)
                sock, _ = listener.accept()
                sock.setblocking(False)
                nursery.start_soon(serve, sock)


if __name__ == "__main__":
    if "--strict" in sys.argv:
        close = close_strictly
        trio.run(main, sys.argv[1], serve_strictly)
    else:
        trio.run(main, sys.argv[1], serve)
