"""The requests of one connection and their replies, and its events, without I/O: the same for both
clients.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from itertools import count
from typing import Any

from ..errors import QMPError
from ..kernel.fd import Fd, close_all
from ..protocol.client import ClientConnection, QMPEvent, Reply


class Request:
    """A request that waits for its reply.  After its ``with`` block, or where the block raises, the
    reply's descriptors are closed: they are the caller's once :meth:`result` has returned them.

    Args:
        request_id: its id.
        data: what to send.
    """

    __slots__ = ("data", "id", "on_reply", "over", "reply", "sent")

    def __init__(self, request_id: int, data: bytes) -> None:
        self.id = request_id
        self.data = data
        self.sent = False  # some of it, so that the server may execute it
        self.reply: Reply | None = None
        self.over = False  # nobody waits for the reply any more
        #: Called when the reply has come, or the connection has failed.
        self.on_reply: Callable[[], object] = lambda: None

    def result(self) -> tuple[Any, list[Fd]]:
        """The ``return`` member of the reply, and the descriptors with it; the error is raised."""
        assert self.reply is not None
        return self.reply.unwrap(), self.reply.fds

    def __enter__(self) -> Request:
        return self

    def __exit__(self, kind: object, *exc_info: object) -> None:
        self.over = True
        if kind is not None and self.reply is not None:
            close_all(self.reply.fds)


class Exchange(ClientConnection):
    """A client's end of a connection, and the requests that are not answered yet.

    Args:
        events: where the server's events go.
    """

    def __init__(self, events: deque[QMPEvent]) -> None:
        super().__init__()
        self._events = events
        #: Why the server turns this client away, if it does.
        self.refusal: QMPError | None = None
        self._ids = count(1)
        #: The requests that were sent and not answered, in that order: an error without an id is
        #: about the oldest, whose text the server could not read.
        self.unanswered: dict[int, Request] = {}

    def request(self, command: str, arguments: Mapping[str, Any] | None = None) -> Request:
        """A new request.

        Raises:
            ValueError: JSON cannot carry *arguments*.
        """
        request_id = next(self._ids)
        return Request(request_id, self.execute(command, arguments, request_id))

    def begun(self, request: Request) -> None:
        """The first bytes of *request* were sent."""
        request.sent = True
        self.unanswered[request.id] = request

    def deliver(self) -> None:
        """Hand out what has come: replies to their requests, and events to where they go.

        Raises:
            ProtocolError: the peer is no QMP server.
        """
        try:
            for message in self.messages():
                if isinstance(message, QMPEvent):
                    self._events.append(message)
                else:
                    self._answer(message)
        finally:
            close_all(self.fds_to_close)
            self.fds_to_close.clear()

    def _answer(self, reply: Reply) -> None:
        answered = reply.id
        if answered is None and reply.error is not None:
            answered = next(iter(self.unanswered), None)
        request = self.unanswered.pop(answered, None) if type(answered) is int else None
        if request is not None and not request.over:
            request.reply = reply
            request.on_reply()
            return
        self.fds_to_close += reply.fds
        if request is None and reply.id is None and reply.error is not None:
            self.refusal = reply.error

    def close(self) -> None:
        """The connection is over: close the descriptors that nobody has asked for."""
        super().close()
        close_all(self.fds_to_close)
        self.fds_to_close.clear()
