"""Fake parent of ``serve --supervise``, in the daemon's event loop."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing, suppress
from pathlib import Path
from typing import Any

import trio
from helpers import ADD, Pipe, Wire, daemon, settle

from qmpfd.kernel.fd import Fd, close_all, receive
from qmpfd.kernel.systemd import Notifier
from qmpfd.server.fdstore.mirror import FdStoreConfig
from qmpfd.server.server import DaemonServer


class Parent:
    """The parent's end of the socket pair, and the descriptors that it stores."""

    def __init__(self) -> None:
        self._sock, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._sock.setblocking(False)
        self.kept: dict[str, Fd] = {}
        self.barriers = 0
        #: Number of further descriptors to reject for want of room, and names of the rejected ones.
        self.lose = 0
        self.lost: set[str] = set()
        self._going = trio.Event()
        self._going.set()

    def turn(self, most: int = 1 << 30) -> int:
        """Process at most *most* messages; return the number of messages processed."""
        count = 0
        with suppress(BlockingIOError):
            while count < most:
                if self._sock.fileno() < 0:
                    break
                data, fds, _ = receive(self._sock, 65536)
                if not data:  # the daemon has ended
                    break
                count += 1
                lines = dict(line.split("=", 1) for line in data.decode().split("\n"))
                names = lines.get("FDNAME", "").split(":")
                if "FDSTOREREMOVE" in lines:
                    for name in names:
                        kept = self.kept.pop(name, None)
                        assert kept is not None or name in self.lost
                        if kept is not None:
                            kept.close()
                        if "QMPFD_CLOSE" in lines:
                            self._sock.send(f"CLOSED={name}".encode())
                elif "FDSTORE" in lines:
                    assert lines["FDPOLL"] == "0"
                    assert len(names) == len(fds)
                    for name in names:
                        assert name not in self.kept
                        if self.lose:
                            self.lose -= 1
                            self.lost.add(name)
                            fds.pop(0).close()
                            self._sock.send(f"LOST={name}".encode())
                        else:
                            self.kept[name] = fds.pop(0)
                if "QMPFD_SYNC" in lines:
                    self.barriers += 1
                    self._sock.send(f"SYNCED={lines['QMPFD_SYNC']}".encode())
                close_all(fds)
        return count

    async def serve(self) -> None:
        """Process every message on arrival, except between :meth:`stop` and :meth:`go_on`."""
        with suppress(trio.ClosedResourceError):
            while self._sock.fileno() >= 0:
                await trio.lowlevel.wait_readable(self._sock)
                await self._going.wait()
                self.turn()

    def stop(self) -> None:
        """Stop processing messages on arrival."""
        self._going = trio.Event()

    def go_on(self) -> None:
        """Process messages on arrival again."""
        self._going.set()

    def die(self) -> None:
        """Close the parent's end, as if the parent had died."""
        trio.lowlevel.notify_closing(self._sock)
        self._sock.close()

    def close(self) -> None:
        """Close both ends and all stored descriptors."""
        self._sock.close()
        close_all(self.kept.values())
        if self.theirs.fileno() >= 0:
            self.theirs.close()


@asynccontextmanager
async def kept_daemon(
    path: Path, size: int = 1000, **options: Any
) -> AsyncIterator[tuple[DaemonServer, Parent]]:
    """Run a daemon with a fake parent, whose fd store has *size* places."""
    with closing(Parent()) as parent, closing(Notifier(parent.theirs, is_parent=True)) as notifier:
        config = FdStoreConfig(notifier, size, None)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(parent.serve)  # noqa: ASYNC113 - the daemon can start before it
            async with daemon(path, fd_store=config, **options) as server:
                yield server, parent
                parent.go_on()
                server.stop()
                await server.ended.wait()
            nursery.cancel_scope.cancel()


@asynccontextmanager
async def unanswered(
    path: Path, **options: Any
) -> AsyncIterator[tuple[DaemonServer, Parent, Wire, Pipe]]:
    """Yield a daemon, its stopped parent, a client whose add-fd waits for the parent, and the pipe
    whose write end the client has sent.
    """
    async with kept_daemon(path, **options) as (server, parent):
        with await Wire.session(path) as wire, Pipe() as pipe:
            parent.stop()
            wire.send(ADD, [pipe])
            await settle()
            yield server, parent, wire, pipe


async def silent(wire: Wire) -> bool:
    """Return whether the client has received nothing when all tasks wait."""
    await settle()
    with suppress(BlockingIOError):
        return wire.sock.recv(1, socket.MSG_PEEK) == b""
    return True
