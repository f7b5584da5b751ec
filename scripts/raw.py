"""QMP client on a plain socket: sends what ``qmpfd.connect`` does not permit."""

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
    """A connection that sends and reads only on calls; made by :func:`raw_connect`."""

    def __init__(self, sock: trio.socket.SocketType) -> None:
        self._sock = sock
        self._unfinished = b""
        self._lines: deque[bytes] = deque()

    async def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send bytes, with *fds* on the first byte."""
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        while data:
            data = data[await self._sock.sendmsg([data], rights) :]
            rights = []

    async def ask(self, command: str, request_id: object = None, **arguments: object) -> None:
        """Send a command and *fds*; do not wait for the reply."""
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
        """Read and return the next JSON object.

        Raises:
            Broken: the server closes the connection, or sends something else.
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
        """Read the greeting, and enter command mode with ``qmp_capabilities``."""
        if "QMP" not in await self.read():
            raise Broken("the daemon does not greet")
        await self.ask("qmp_capabilities")
        if await self.read() != {"return": {}}:
            raise Broken("the daemon does not negotiate")


@asynccontextmanager
async def raw_connect(path: str | os.PathLike[str]) -> AsyncGenerator[RawClient, None]:
    """Connect to the server at *path*; send and read nothing."""
    with trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        await sock.connect(os.fspath(path))
        yield RawClient(sock)
