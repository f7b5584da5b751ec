"""Client side of a connection: encodes commands; decodes the greeting, replies and events.

The short verbs of the command line use this module, so it imports nothing slow: with msgspec
instead of json, ``qmpfd ls`` would take twice as long.
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
from .receive_buffer import ReceiveBuffer


def _has_noncharacter(text: str) -> bool:
    """Whether *text* has a noncharacter, which QEMU's parser refuses (Unicode 15, section 23.7)."""
    return any(c >= "\ufdd0" and (c <= "\ufdef" or ord(c) & 0xFFFE == 0xFFFE) for c in text)


def _nesting(data: bytes) -> int:
    """Return the nesting depth of a JSON text; 0 if it cannot exceed the limit.

    The interpreter's own limit is below QEMU's in Python 3.11 and far above it in 3.14.
    """
    if data.count(b"[") + data.count(b"{") <= MAX_NESTING:
        return 0
    steps = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}
    outside = re.sub(rb'"(?:[^"\\]|\\.)*"', b"", data)
    return max(accumulate(steps.get(byte, 0) for byte in outside))


class Reply(NamedTuple):
    """Reply of the server.

    Args:
        id: the id of the request; None if the reply has none.
        value: the result; meaningless if *error* is set.
        error: the error of a refused request, or None.
        fds: the descriptors attached to the reply.
    """

    id: Any
    value: Any
    error: QMPError | None
    fds: list[Fd]

    def unwrap(self) -> Any:
        """Return the result; or close the descriptors and raise the error."""
        if self.error is not None:
            close_all(self.fds)
            raise self.error
        return self.value


class QMPEvent(NamedTuple):
    """Event of the server (QMP specification, "Asynchronous events").

    Args:
        name: the event's name, such as ``FD_ADDED``.
        data: the event's data; empty if it has none.
        seconds: time of the event, in seconds since the epoch by the server's clock.
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
    """A request and its reply; a context manager for the time in which the reply is awaited.

    The reply's descriptors are closed if it arrives after the block, or if the block raises; after
    the block the caller owns those that :meth:`result` has returned.

    Args:
        request_id: the id that the reply echoes.
        data: the encoded request.
    """

    __slots__ = ("data", "ended", "id", "on_reply", "reply", "sent")

    def __init__(self, request_id: int, data: bytes) -> None:
        self.id = request_id
        self.data = data
        self.sent = False  # whether a byte was sent: the server may execute the request
        self.reply: Reply | None = None
        self.ended = False  # whether the block has ended: the reply is not awaited any more
        #: Called when the reply has been received or the connection has failed.
        self.on_reply: Callable[[], object] = lambda: None

    def result(self) -> tuple[Any, list[Fd]]:
        """Return the reply's ``return`` member and descriptors, or raise its error."""
        assert self.reply is not None
        return self.reply.unwrap(), self.reply.fds

    def __enter__(self) -> Request:
        return self

    def __exit__(self, kind: object, *exc_info: object) -> None:
        self.ended = True
        if kind is not None and self.reply is not None:
            close_all(self.reply.fds)


class ClientConnection(Connection):
    """Client side: encodes commands; decodes the greeting, replies and events.

    Args:
        events: the queue that receives the server's events; None for a new one.
        max_reply_bytes: maximum size of a reply.
    """

    def __init__(
        self, events: deque[QMPEvent] | None = None, *, max_reply_bytes: int = MAX_REPLY_BYTES
    ) -> None:
        super().__init__(
            ReceiveBuffer(_decode_replies, _fds_of_reply, max_bytes=max_reply_bytes, lines=True)
        )
        #: The ``QMP`` member of the server's greeting; None until it was received.
        self.greeting: dict[str, Any] | None = None
        #: Why the connection is unusable: the error with which the server has rejected this client,
        #: or what shows that it does not speak QMP; None while the connection works.
        self.failure: QMPError | ProtocolError | None = None
        #: The received events that were not consumed yet.
        self.events = deque(maxlen=MAX_EVENTS) if events is None else events
        self._ids = count(1)
        #: The requests sent and not replied to, oldest first: an error without an id is the reply
        #: to the oldest, which the server could not parse.
        self.unanswered: dict[int, Request] = {}

    def request(self, command: str, arguments: Mapping[str, Any] | None = None) -> Request:
        """Create a request, which is not sent yet.

        Raises:
            ValueError: JSON cannot express it, or it exceeds the limits of QEMU's parser: a request
                that a server cannot parse gets one or more errors without an id.
        """
        request_id = next(self._ids)
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
        return Request(request_id, data + b"\n")

    def negotiated(self) -> None:
        """Enter the command state, after the reply to ``qmp_capabilities``."""
        self._move(Event.CAPABILITIES)

    def messages(self) -> Iterator[Reply | QMPEvent]:
        """Pop the complete replies and events, in order of arrival.

        Raises:
            ProtocolError: the peer is no QMP server.
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
                self.fds_to_close += fds
                yield _event(value)
            elif lost:
                yield Reply(value.get("id"), None, FdNotSupplied(lost), fds)
            elif "error" in value:
                yield Reply(value.get("id"), None, _decode_error(value["error"]), fds)
            elif "return" in value:
                yield Reply(value.get("id"), value["return"], None, fds)
            else:
                self.fds_to_close += fds
                raise ProtocolError("not a QMP server: this is neither a reply nor an event")

    def mark_sent(self, request: Request) -> None:
        """Record that the first bytes of *request* were sent: a reply to it is due."""
        request.sent = True
        self.unanswered[request.id] = request

    def deliver(self) -> None:
        """Assign the received replies to their requests; append the events to :attr:`events`."""
        try:
            for message in self.messages():
                if isinstance(message, QMPEvent):
                    self.events.append(message)
                else:
                    self._answer(message)
        except ProtocolError as exc:
            self.failure = exc
        finally:
            close_all(self.fds_to_close)
            self.fds_to_close.clear()

    def _answer(self, reply: Reply) -> None:
        answered = reply.id
        if answered is None and reply.error is not None:
            answered = next(iter(self.unanswered), None)
        request = self.unanswered.pop(answered, None) if type(answered) is int else None
        if request is not None and not request.ended:
            request.reply = reply
            request.on_reply()
            return
        self.fds_to_close += reply.fds
        if request is None and reply.id is None and reply.error is not None:
            self.failure = reply.error

    def close(self) -> None:
        """End the connection, and close the received descriptors that no reply has delivered."""
        super().close()
        close_all(self.fds_to_close)
        self.fds_to_close.clear()


def _decode_error(error: Any) -> QMPError:
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
