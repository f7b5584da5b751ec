"""QMP by hand: what a client library does not let you send, or is too orderly for."""

from __future__ import annotations

import array
import json
import os
import socket
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import trio
from daemon import Broken


class RawClient:
    """A connection on which nothing happens by itself; made by :func:`raw_connect`."""

    def __init__(self, sock: trio.socket.SocketType) -> None:
        self._sock = sock
        self._unfinished = b""
        self._lines: deque[bytes] = deque()

    async def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send bytes, with descriptors on the first of them, if any."""
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        while data:
            data = data[await self._sock.sendmsg([data], rights) :]
            rights = []

    async def ask(self, command: str, request_id: object = None, **arguments: object) -> None:
        """Send a command without waiting for its reply; ``fds`` is what goes with it."""
        fds = arguments.pop("fds", ())
        assert isinstance(fds, Sequence)
        members = {name.replace("_", "-"): value for name, value in arguments.items()}
        request: dict[str, object] = {"execute": command}
        if members:
            request["arguments"] = members
        if request_id is not None:
            request["id"] = request_id
        await self.send(json.dumps(request).encode(), fds)

    async def read(self) -> dict[str, Any]:
        """The next object that the server sends.

        Raises:
            Broken: it closes the connection, or sends something else.
        """
        while not self._lines:
            try:
                data = await self._sock.recv(65536)
            except ConnectionResetError:
                data = b""
            if not data:
                raise Broken("the daemon has closed the connection")
            *lines, self._unfinished = (self._unfinished + data).split(b"\r\n")
            self._lines += lines
        line = self._lines.popleft()
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise Broken(f"not a JSON object: {line!r}")
        return value

    async def negotiate(self) -> None:
        """Take the greeting, and enter command mode."""
        if "QMP" not in await self.read():
            raise Broken("the daemon does not greet")
        await self.ask("qmp_capabilities")
        if await self.read() != {"return": {}}:
            raise Broken("the daemon does not negotiate")


@asynccontextmanager
async def raw_connect(path: str | os.PathLike[str]) -> AsyncGenerator[RawClient, None]:
    """Connect to the server at *path*; nothing is sent or read yet."""
    with trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        await sock.connect(os.fspath(path))
        yield RawClient(sock)
