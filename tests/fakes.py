"""Fake QMP server that follows a script, for tests of the clients."""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import trio
from helpers import Wire

GREETING = b'{"QMP": {"version": {"qemu": {}, "package": ""}, "capabilities": []}}\r\n'

Script = Callable[[Wire], Awaitable[None]]


@asynccontextmanager
async def fake_server(path: Path, script: Script) -> AsyncIterator[None]:
    """Run a server that runs *script* for each connection."""
    async with trio.open_nursery() as nursery:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.setblocking(False)
            listener.bind(os.fspath(path))
            listener.listen()

            async def serve(wire: Wire) -> None:
                with wire:
                    await script(wire)

            async def accept() -> None:
                while True:
                    await trio.lowlevel.wait_readable(listener)
                    nursery.start_soon(serve, Wire(listener.accept()[0]))

            nursery.start_soon(accept)
            try:
                yield
            finally:
                nursery.cancel_scope.cancel()


async def ask(wire: Wire) -> int:
    """Read the next request; return its id."""
    return int((await wire.receive())["id"])


async def negotiate(wire: Wire) -> None:
    """Send the greeting, and answer the client's ``qmp_capabilities``."""
    wire.send(GREETING)
    wire.send(b'{"return": {}, "id": %d}\r\n' % await ask(wire))
