"""The client's end of a connection: commands out; greeting, replies and events in.

The command line's short verbs stand on this, so it imports nothing that is slow to import: with
msgspec in place of json, ``qmpfd ls`` would take twice as long.
"""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate, count
from math import isfinite, nan
from typing import Any, NamedTuple

from ..errors import FdNotSupplied, QMPError, error_of_class
from ..kernel.fd import Fd, close_all
from ..limits import MAX_EVENTS, MAX_NESTING, MAX_REPLY_BYTES, MAX_REQUEST_BYTES, SCM_MAX_FD
from .connection import Connection, Event, ProtocolError


def _has_noncharacter(text: str) -> bool:
    """Whether there is a code point that QEMU's parser refuses (Unicode 15, section 23.7)."""
    return any(c >= "\ufdd0" and (c <= "\ufdef" or ord(c) & 0xFFFE == 0xFFFE) for c in text)


def _nesting(data: bytes) -> int:
    """How deep the objects and arrays of a JSON text are nested, at most.  The interpreter has a
    limit too, which is below QEMU's in Python 3.11 and far above it in 3.14.
    """
    if data.count(b"[") + data.count(b"{") <= MAX_NESTING:
        return 0  # not too deep, whatever it is
    steps = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}
    outside = re.sub(rb'"(?:[^"\\]|\\.)*"', b"", data)
    return max(accumulate(steps.get(byte, 0) for byte in outside))


class Reply(NamedTuple):
    """What the server answered.

    Args:
        id: the request's; None if it has none.
        value: the result; of no meaning with an error.
        error: why the request was refused; None if it was not.
        fds: the descriptors that came with it.
    """

    id: Any
    value: Any
    error: QMPError | None
    fds: list[Fd]

    def unwrap(self) -> Any:
        """The result; an error is raised, and the descriptors that came with it are closed."""
        if self.error is not None:
            close_all(self.fds)
            raise self.error
        return self.value


class QMPEvent(NamedTuple):
    """What the server told unasked (QMP specification, "Asynchronous events").

    Args:
        name: the event's name, such as ``FD_ADDED``.
        data: its data; empty if it has none.
        seconds: when it happened, in seconds since the epoch by the server's clock.
    """

    name: str
    data: dict[str, Any]
    seconds: float


def _decode_replies(data: bytes) -> list[Any] | None:
    try:
        return [json.loads(line) for line in data.split(b"\n") if line.strip()]
    except (ValueError, RecursionError):  # UnicodeDecodeError is a ValueError
        return None


def _fds_of_reply(message: Any) -> int:
    return SCM_MAX_FD if isinstance(message, dict) and "return" in message else 0


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


class ClientConnection(Connection):
    """The client's end: commands out; greeting, replies and events in.

    Args:
        events: where the server's events go.
        max_reply_bytes: bytes of one reply.
    """

    def __init__(
        self, events: deque[QMPEvent] | None = None, *, max_reply_bytes: int = MAX_REPLY_BYTES
    ) -> None:
        super().__init__(_decode_replies, _fds_of_reply, max_reply_bytes, True)
        #: What the server said of itself, once it has.
        self.greeting: dict[str, Any] | None = None
        #: Why the server turns this client away, if it does.
        self.refusal: QMPError | None = None
        #: The events that nobody has asked for yet.
        self.events = deque(maxlen=MAX_EVENTS) if events is None else events
        self._ids = count(1)
        #: The requests that were sent and not answered, in that order: an error without an id is
        #: about the oldest, whose text the server could not read.
        self.unanswered: dict[int, Request] = {}

    def execute(self, command: str, arguments: Mapping[str, Any] | None, request_id: Any) -> bytes:
        """The bytes that ask for *command*.

        Raises:
            ValueError: JSON cannot carry it, or no server reads it: what a server cannot parse gets
                an error without an id, and one bad text may get several.
        """
        request: dict[str, Any] = {"execute": command}
        if arguments:
            request["arguments"] = dict(arguments)
        request["id"] = request_id
        try:
            data = json.dumps(request, allow_nan=False).encode("ascii")
            if b"\\u" in data:
                # A lone surrogate raises UnicodeEncodeError here.
                plain = json.dumps(request, ensure_ascii=False).encode()
                if _has_noncharacter(plain.decode()):
                    raise ValueError("QEMU's JSON has no noncharacters")
                if len(data) >= MAX_REQUEST_BYTES:
                    data = plain  # UTF-8 is a third as long
            if _nesting(data) > MAX_NESTING:
                raise ValueError(f"it is nested deeper than {MAX_NESTING} levels")
        except (TypeError, ValueError, RecursionError) as exc:
            raise ValueError(f"{command!r} cannot be sent as JSON: {exc}") from None
        if len(data) >= MAX_REQUEST_BYTES:
            raise ValueError(
                f"{command!r} cannot be sent: {len(data)} bytes, at most {MAX_REQUEST_BYTES}"
            )
        return data + b"\n"

    def negotiated(self) -> None:
        """The server has accepted ``qmp_capabilities``."""
        self._move(Event.CAPABILITIES)

    def messages(self) -> Iterator[Reply | QMPEvent]:
        """The complete replies and events, in the order in which they came.

        Raises:
            ProtocolError: this is no QMP server.
        """
        for value, fds, lost in self._messages():
            if not isinstance(value, dict):
                self.fds_to_close += fds
                why = value if isinstance(value, QMPError) else "no JSON object"
                raise ProtocolError(f"not a QMP server: {why}")
            if "QMP" in value:
                self.fds_to_close += fds
                if not isinstance(value["QMP"], dict):
                    raise ProtocolError("not a QMP server: its greeting is no JSON object")
                self._move(Event.GREETING)
                self.greeting = value["QMP"]
            elif "event" in value:
                yield _event(value)
            elif lost:
                yield Reply(value.get("id"), None, FdNotSupplied(lost), fds)
            elif "error" in value:
                yield Reply(value.get("id"), None, _told(value["error"]), fds)
            elif "return" in value:
                yield Reply(value.get("id"), value["return"], None, fds)
            else:
                self.fds_to_close += fds
                raise ProtocolError("not a QMP server: this is neither a reply nor an event")

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
        """Hand out what has come: replies to their requests, and events to :attr:`events`.

        Raises:
            ProtocolError: the peer is no QMP server.
        """
        try:
            for message in self.messages():
                if isinstance(message, QMPEvent):
                    self.events.append(message)
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


def _told(error: Any) -> QMPError:
    members = error if isinstance(error, dict) else {}
    return error_of_class(str(members.get("class")), str(members.get("desc")))


def _event(value: dict[str, Any]) -> QMPEvent:
    name, data, stamp = value["event"], value.get("data", {}), value.get("timestamp", {})
    if not (isinstance(name, str) and isinstance(data, dict) and isinstance(stamp, dict)):
        raise ProtocolError("not a QMP server: this is no event")
    try:
        seconds = float(stamp.get("seconds", 0)) + float(stamp.get("microseconds", 0)) / 1e6
    except (TypeError, ValueError, OverflowError):
        seconds = nan
    if not isfinite(seconds):
        raise ProtocolError("not a QMP server: an event's timestamp is no time")
    return QMPEvent(name, data, seconds)
