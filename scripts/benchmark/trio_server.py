"""Lower bound for a server in Trio: the cost of Trio, the system calls and msgspec.

    python trio_server.py SOCKET

One task for each connection: wait_readable, recvmsg, decode, execute, encode, send.  The server
has only ``add-fd`` and ``remove-fd``, no checks and no limits.  It relies on clients that send one
command a line, with the command's descriptor on it, and that read the replies.
"""

from __future__ import annotations

import array
import itertools
import os
import socket
import sys
from contextlib import suppress
from typing import Any

import msgspec
import trio

#: fd sets by id: the descriptors in each.
SETS: dict[int, list[int]] = {}
_ids = itertools.count()


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
            os.close(fd)
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


async def main(path: str) -> None:
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
    trio.run(main, sys.argv[1])
