"""One client: chunks in, commands under the lock, replies out."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import trio
from outcome import Error, Outcome

from ..commands import VERSION, VOCABULARY, Context, execute
from ..fd import close_all
from ..protocol import ServerConnection
from ..transport import FdStream

if TYPE_CHECKING:
    from .server import Server

_log = logging.getLogger("qmpfd")

#: Chunks that a client may have served in a row before the others get their turn.
_CHUNKS_A_TURN = 16


class Session:
    """Serves one client.

    Args:
        server: the daemon.
        stream: the connection; owned from here on.
    """

    def __init__(self, server: Server, stream: FdStream) -> None:
        self._server = server
        self._stream = stream
        self._connection = ServerConnection(
            VOCABULARY,
            max_request_bytes=server.limits.max_request_bytes,
            qemu_classes=server.dialect == "qemu",
        )
        self._context = Context(server.daemon, self._connection)
        self._scope = trio.CancelScope()
        self._waiting = False  # for the client; nothing of it is unanswered
        self._deaf = False  # the client takes no replies any more, but what it sent is carried out

    async def run(self) -> None:
        """Serve the client until it is gone, or the daemon ends."""
        try:
            with self._scope:
                await self._send(self._connection.greeting(VERSION))
                await self._serve()
            if self._scope.cancelled_caught:
                # Told to finish: carry out what the client has sent so far.
                await self._serve_rest()
        except Exception:  # noqa: BLE001 - one client's trouble must not become everybody's
            _log.exception("a connection failed")
        finally:
            self._context.close()
            self._connection.close()
            self._close_garbage()
            self._stream.close()

    def finish(self) -> None:
        """End as soon as all that the client has sent is answered."""
        if self._waiting:
            self._scope.cancel()

    async def _serve(self) -> None:
        chunks = 0
        while True:
            try:
                more = self._stream.receive_nowait(self._connection)
            except trio.WouldBlock:
                if self._server.stopping:
                    return
                self._waiting = True
                await self._stream.wait_readable()
                self._waiting = False
                chunks = 0
                continue
            if not more:
                return
            await self._answer()
            chunks += 1
            if chunks % _CHUNKS_A_TURN == 0:
                await trio.lowlevel.checkpoint()

    async def _serve_rest(self) -> None:
        try:
            while self._stream.receive_nowait(self._connection):
                await self._answer()
        except trio.WouldBlock:
            pass

    async def _answer(self) -> None:
        """Carry out the complete requests and send the replies, in one write."""
        lock = self._server.lock
        try:
            lock.acquire_nowait()
        except trio.WouldBlock:
            await lock.acquire()
        try:
            replies = self._carry_out()
        finally:
            lock.release()
        # Before the replies: what is removed is closed once its client has read so.
        self._close_garbage()
        if replies:
            await self._send(b"".join(replies))

    def _carry_out(self) -> list[bytes]:
        connection, context = self._connection, self._context
        replies = []
        for request, request_id, fds in connection.requests():
            if isinstance(request, Error):
                result: Outcome[object] = request
            else:
                result = execute(context, request, fds)
            replies.append(connection.reply(result, request_id))
            if self._server.quitting:
                break
        return replies

    async def _send(self, data: bytes) -> None:
        if self._deaf:
            return
        try:
            sent = self._stream.send_nowait(data)
            if sent < len(data):
                with trio.fail_after(self._server.limits.write_timeout):
                    await self._stream.send_all(data[sent:])
        except trio.BrokenResourceError:
            self._deaf = True
        except trio.TooSlowError:
            _log.warning("a client does not take its replies: disconnected")
            self._deaf = True
            self._stream.socket.shutdown(2)

    def _close_garbage(self) -> None:
        garbage = self._connection.garbage
        if garbage:
            close_all(garbage)
            garbage.clear()
