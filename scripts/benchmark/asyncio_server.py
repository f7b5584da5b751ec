"""Minimal fd holder in asyncio and json: what somebody without qmpfd would write.

    python asyncio_server.py SOCKET

The server has six commands, and no limits, no access rights and no error classes.  It relies on
clients that send each command as one whole line, with the command's descriptors on it.
"""

from __future__ import annotations

import array
import asyncio
import json
import os
import socket
import sys
from collections.abc import Callable
from typing import Any

#: fd sets by id: the descriptors in each.
SETS: dict[int, list[int]] = {}


def add_fd(arguments: dict[str, Any], fds: list[int]) -> Any:
    """Add a descriptor to the set named, or to a new set with the lowest free id."""
    fdset_id = arguments.get("fdset-id")
    if fdset_id is None:
        fdset_id = 0
        if SETS and len(SETS) <= max(SETS):
            while fdset_id in SETS:
                fdset_id += 1
        else:
            fdset_id = len(SETS)
    fd = fds.pop(0)
    SETS.setdefault(fdset_id, []).append(fd)
    return {"fdset-id": fdset_id, "fd": fd}


def add_fds(arguments: dict[str, Any], fds: list[int]) -> Any:
    """Add all received descriptors to one set."""
    first = add_fd(arguments, fds)
    found = SETS[first["fdset-id"]]
    found += fds
    fds.clear()
    return {"fdset-id": first["fdset-id"], "fds": [{"fd": fd} for fd in found]}


def remove_fd(arguments: dict[str, Any], fds: list[int]) -> Any:
    """Remove and close one descriptor, or all descriptors of a set."""
    fdset = SETS[arguments["fdset-id"]]
    for fd in [arguments["fd"]] if "fd" in arguments else list(fdset):
        fdset.remove(fd)
        os.close(fd)
    if not fdset:
        del SETS[arguments["fdset-id"]]
    return {}


def query_fdsets(arguments: dict[str, Any], fds: list[int]) -> Any:
    """List all sets, by descending id."""
    return [
        {"fdset-id": fdset_id, "fds": [{"fd": fd} for fd in SETS[fdset_id]]}
        for fdset_id in sorted(SETS, reverse=True)
    ]


def open_fdset(arguments: dict[str, Any], fds: list[int]) -> Any:
    """Send the newest descriptor of a set with the reply."""
    fdset_id = arguments["fdset-id"]
    fd = SETS[fdset_id][-1]
    fds.append(fd)
    return {"fdset-id": fdset_id, "fd": fd}


COMMANDS: dict[str, Callable[[dict[str, Any], list[int]], Any]] = {
    "qmp_capabilities": lambda arguments, fds: {},
    "add-fd": add_fd,
    "add-fds": add_fds,
    "remove-fd": remove_fd,
    "query-fdsets": query_fdsets,
    "open-fdset": open_fdset,
}


class Client:
    """One connection.

    asyncio's streams and transports drop received descriptors: this class calls recvmsg(2) itself.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._buffer = b""
        self._unsent = b""
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(sock, self._readable)
        sock.setblocking(False)
        self._send(b'{"QMP": {}}\r\n', [])

    def _readable(self) -> None:
        try:
            data, control, _, _ = self._sock.recvmsg(1 << 16, 4096, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return
        except ConnectionError:
            data, control = b"", []
        if not data:
            self._loop.remove_reader(self._sock)
            self._loop.remove_writer(self._sock)
            self._sock.close()
            return
        fds = array.array("i")
        for _, _, payload in control:
            fds.frombytes(payload)
        waiting = list(fds)
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        for line in lines:
            request = json.loads(line)
            command = COMMANDS[request["execute"]]
            passed = waiting if command in (add_fd, add_fds) else []
            reply = {"return": command(request.get("arguments", {}), passed)}
            if "id" in request:
                reply["id"] = request["id"]
            self._send(json.dumps(reply).encode() + b"\r\n", [] if passed is waiting else passed)

    def _send(self, data: bytes, fds: list[int]) -> None:
        if self._unsent:
            self._unsent += data
            return
        try:
            sent = socket.send_fds(self._sock, [data], fds) if fds else self._sock.send(data)
        except BlockingIOError:
            sent = 0
        except ConnectionError:
            return
        if sent < len(data):
            self._unsent = data[sent:]
            self._loop.add_writer(self._sock, self._writable)

    def _writable(self) -> None:
        data, self._unsent = self._unsent, b""
        self._loop.remove_writer(self._sock)
        self._send(data, [])


async def main(path: str) -> None:
    """Accept clients until the process is killed."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(4096)
        listener.setblocking(False)
        loop = asyncio.get_running_loop()
        while True:
            sock, _ = await loop.sock_accept(listener)
            Client(sock)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
