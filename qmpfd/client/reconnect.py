"""A dialogue with a server, and another one when that is broken, if the caller wants so.

There is no background task here either: the call that needs a connection makes it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Container, Mapping, Sequence
from typing import Any

import trio

from ..errors import QMPError
from ..kernel.fd import FileDescriptorLike, close_all
from ..protocol import ProtocolError, QMPEvent, Reply
from ..transport import FdStream
from .connection import Call, QMPConnection

#: Seconds between two tries to connect.
_RETRY = 0.05

#: Why there may be no connection; what is in it for the next try.
_TRANSIENT = (OSError, QMPError, ProtocolError, trio.BrokenResourceError)


class ReplyLost(trio.BrokenResourceError):
    """The connection was lost between a request and its reply: it may have been carried out, or
    not.  Calls made from now on go over a new connection.
    """


def _is_repeatable(command: str) -> bool:
    """Whether it makes no difference that a command is carried out twice."""
    return command.startswith("query-") or command in ("open-fdset", "watch-fdsets")


async def open_dialogue(path: str | os.PathLike[str]) -> QMPConnection:
    """Connect to the server at *path*, and negotiate.

    Raises:
        OSError: nobody can be reached at *path*.
        QMPError: the server turns us away.
        ProtocolError: the peer does not speak QMP.
        trio.BrokenResourceError: it closed the connection before it was ready.
    """
    sock = trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM)
    with sock:
        await sock.connect(os.fspath(path))
        dialogue = QMPConnection(FdStream(sock))
    try:
        await dialogue.negotiate()
    except BaseException:
        dialogue.close()
        raise
    return dialogue


class ReconnectingConnection:
    """Carries requests and events, over the connection that there is.

    Args:
        path: the server's socket.
        dialogue: the first connection to it; owned from here on.
        reconnect: seconds that a call waits at most for another one; None if there is no other.
    """

    def __init__(
        self, path: str | os.PathLike[str], dialogue: QMPConnection, reconnect: float | None
    ) -> None:
        self._path = path
        self._dialogue = dialogue
        self._reconnect = reconnect
        self._connecting = trio.Lock()
        self._why: Exception | None = None  # there is no connection
        self._closed = False
        self._waiting: set[trio.CancelScope] = set()  # for a connection
        self._redone: dict[str, Mapping[str, Any]] = {}

    @property
    def greeting(self) -> Mapping[str, Any]:
        """What the server said of itself."""
        return self._dialogue.greeting

    def drop_events(self, names: Container[str]) -> None:
        """Forget the events of these names that nobody has asked for."""
        self._dialogue.drop_events(names)

    async def request(
        self,
        command: str,
        arguments: Mapping[str, Any] | None = None,
        fds: Sequence[FileDescriptorLike] = (),
    ) -> Reply:
        """Carry out a command; its reply.

        Raises:
            ReplyLost: it may have been carried out.
            trio.BrokenResourceError: there is no connection any more.
            OSError: *fds* cannot be passed.
        """
        while True:
            dialogue = await self._working()
            call = Call()
            try:
                return await dialogue.request(command, arguments, fds, call)
            except Exception as exc:
                if not self._goes_on_after(dialogue):
                    raise
                if call.sent and not _is_repeatable(command):
                    raise ReplyLost(
                        f"the connection was lost before the reply to {command!r} came: "
                        "it may have been carried out"
                    ) from exc

    async def next_event(self) -> QMPEvent:
        """The server's next event."""
        while True:
            dialogue = await self._working()
            try:
                return await dialogue.next_event()
            except Exception:
                if not self._goes_on_after(dialogue):
                    raise

    async def begin(self, command: str, arguments: Mapping[str, Any]) -> None:
        """Carry out a command, over this connection and each later one."""
        reply = await self.request(command, arguments)
        close_all(reply.fds)
        reply.unwrap()
        self._redone[command] = arguments

    async def cease(self, command: str, arguments: Mapping[str, Any]) -> None:
        """Undo what :meth:`begin` has begun by another command of that name."""
        self._redone.pop(command, None)
        dialogue = self._dialogue
        if dialogue.failed:
            return
        try:
            reply = await dialogue.request(command, arguments)
            close_all(reply.fds)
            reply.unwrap()
        except Exception:
            if not self._goes_on_after(dialogue):  # there is nothing to undo in another one
                raise

    def _goes_on_after(self, dialogue: QMPConnection) -> bool:
        """Whether *dialogue* is broken, and another one may be tried."""
        return self._reconnect is not None and not self._closed and dialogue.failed

    async def _working(self) -> QMPConnection:
        """A connection that is not broken, as far as is known.

        Raises:
            trio.BrokenResourceError: there is none within the time for that.
            trio.ClosedResourceError: the client is closed.
        """
        if not self._goes_on_after(self._dialogue):
            return self._dialogue
        assert self._reconnect is not None
        with trio.move_on_after(self._reconnect) as scope:
            self._waiting.add(scope)
            try:
                async with self._connecting:
                    if self._goes_on_after(self._dialogue):  # else another call has done so
                        await self._renew()
            finally:
                self._waiting.discard(scope)
            return self._dialogue
        if self._closed:
            raise trio.ClosedResourceError("this client is closed")
        raise trio.BrokenResourceError(
            f"no connection to {os.fspath(self._path)!r} again within {self._reconnect:g} s"
        ) from self._why

    async def _renew(self) -> None:
        while True:
            try:
                dialogue = await self._open_again()
            except _TRANSIENT as exc:
                self._why = exc
                await trio.sleep(_RETRY)
                continue
            lost = QMPEvent("FD_EVENTS_LOST", {"count": 0}, time.time())
            dialogue.prepend_events([*self._dialogue.retire(), lost])
            self._dialogue = dialogue
            return

    async def _open_again(self) -> QMPConnection:
        dialogue = await open_dialogue(self._path)
        try:
            for command, arguments in list(self._redone.items()):
                reply = await dialogue.request(command, arguments)
                close_all(reply.fds)
                reply.unwrap()
        except BaseException:
            dialogue.close()
            raise
        return dialogue

    def close(self) -> None:
        """Close the connection; calls that wait raise ClosedResourceError."""
        self._closed = True
        for scope in self._waiting:
            scope.cancel()
        self._dialogue.close()
