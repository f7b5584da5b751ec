"""One QMP connection, without I/O: what was received, what may be said, what to send.

One class serves both roles.  The states are those of the QEMU Machine Protocol Specification
(section 2.2, "Server Greeting", section 4, "Capabilities Negotiation"), the same on both sides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, TypeAlias

import msgspec
from msgspec import UNSET, Struct
from outcome import Error, Outcome, Value

from ..errors import QEMU_CLASSES, CommandNotFound, FdNotSupplied, QMPError, error_of_class
from ..fd import Fd
from ..limits import MAX_ERRORS_IN_A_ROW, MAX_REPLY_BYTES, MAX_REQUEST_BYTES, SCM_MAX_FD
from .encode import encode, encode_any
from .inbox import ChunkDecoder, Inbox
from .parser import Budget
from .vocabulary import Request, Vocabulary


class State(Enum):
    """Where a connection is."""

    CONNECTED = auto()  #: the greeting has not gone over yet
    NEGOTIATING = auto()  #: only ``qmp_capabilities`` is possible
    COMMANDS = auto()
    CLOSED = auto()


class Event(Enum):
    """What moves a connection from one state to another."""

    GREETING = auto()
    CAPABILITIES = auto()
    CLOSE = auto()


_TRANSITIONS = {
    (State.CONNECTED, Event.GREETING): State.NEGOTIATING,
    (State.NEGOTIATING, Event.CAPABILITIES): State.COMMANDS,
    **{(state, Event.CLOSE): State.CLOSED for state in State},
}

#: A request, or the error that it is refused with; its id; its descriptors.
Received: TypeAlias = "tuple[Request | Error, Any, list[Fd]]"


class ProtocolError(Exception):
    """The peer does not speak QMP."""


_LOST = "File descriptors sent via SCM_RIGHTS were lost: the receiver is out of file descriptors"


class Connection:
    """What both roles share; made by :class:`ServerConnection` and :class:`ClientConnection`."""

    def __init__(
        self,
        decode: ChunkDecoder,
        wanted: Callable[[Any], int],
        max_bytes: int,
        lines: bool,
        budget: Budget | None = None,
    ) -> None:
        #: Descriptors that nobody takes; whoever does the I/O closes them.
        self.garbage: list[Fd] = []
        self.state = State.CONNECTED
        self._inbox = Inbox(
            decode, wanted, max_bytes=max_bytes, garbage=self.garbage, lines=lines, budget=budget
        )
        #: See :class:`Inbox`: shown the next bytes, how to consume them.
        self.receive = self._inbox.receive
        #: See :class:`Inbox`: the descriptors of each piece consumed.
        self.attach = self._inbox.attach

    def _move(self, event: Event) -> None:
        try:
            self.state = _TRANSITIONS[self.state, event]
        except KeyError:
            raise ProtocolError(f"{event.name} is out of place: {self.state.name}") from None

    def close(self) -> None:
        """The connection is over: what waits for a command becomes garbage."""
        self._move(Event.CLOSE)
        self._inbox.close()


class ServerConnection(Connection):
    """The server's end: requests in, replies and events out.

    Args:
        vocabulary: the commands there are.
        max_request_bytes: bytes of one request.
        qemu_classes: tell only the error classes that today's QEMU has.
        budget: the memory that incomplete requests share with other connections.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        *,
        max_request_bytes: int = MAX_REQUEST_BYTES,
        qemu_classes: bool = False,
        budget: Budget | None = None,
    ) -> None:
        super().__init__(
            vocabulary.decode_chunk, vocabulary.wanted_fds, max_request_bytes, False, budget
        )
        self._vocabulary = vocabulary
        self._qemu_classes = qemu_classes
        self._oob_enabled = False
        self._errors_in_a_row = 0

    def greeting(self, version: object) -> bytes:
        """What to send first; *version* is the result of ``query-version``."""
        self._move(Event.GREETING)
        return encode({"QMP": {"version": version, "capabilities": ["oob"]}}) + b"\r\n"

    def negotiate(self, capabilities: list[str]) -> None:
        """Carry out ``qmp_capabilities``.

        Raises:
            CommandNotFound: that was done before.
        """
        if self.state is not State.NEGOTIATING:
            raise CommandNotFound("Capabilities negotiation is already complete, command ignored")
        self._oob_enabled = "oob" in capabilities
        self._move(Event.CAPABILITIES)

    def requests(self) -> Iterator[Received]:
        """The complete requests, in the order in which they came.

        Carry out each before asking for the next: whether that is possible may depend on it.
        """
        flooded = False
        for value, broken, fds, dropped in self._inbox.messages():
            if isinstance(value, Request):
                request_id = value.id
            else:
                request_id = value.get("id", UNSET) if isinstance(value, dict) else UNSET
            try:
                if broken is not None:
                    raise broken
                request = self._checked(value)
                if dropped:
                    raise FdNotSupplied(_LOST)
            except QMPError as exc:
                self.garbage += fds
                if not isinstance(value, dict | Request):
                    # Not a request that waits for an answer: of a flood, one is told a read.
                    self._errors_in_a_row += 1
                    if self._errors_in_a_row > MAX_ERRORS_IN_A_ROW:
                        if flooded:
                            continue
                        flooded = True
                yield Error(exc), request_id, []
            else:
                self._errors_in_a_row = 0
                yield request, request_id, fds

    def _checked(self, value: Any) -> Request:
        """*value* as a request that may be carried out in this state."""
        vocabulary = self._vocabulary
        if self.state is State.COMMANDS:
            if isinstance(value, Request):
                return value
            return vocabulary.request(value, oob_enabled=self._oob_enabled)
        try:
            if not isinstance(value, Request):
                return vocabulary.request(
                    value, oob_enabled=self._oob_enabled, only="qmp_capabilities"
                )
            if vocabulary.names[type(value)] == "qmp_capabilities":
                return value
        except CommandNotFound:
            pass
        raise CommandNotFound("Expecting capabilities negotiation with 'qmp_capabilities'")

    def reply(self, result: Outcome[object], request_id: Any) -> bytes:
        """The reply to a request: its result, or its QMPError."""
        if isinstance(result, Value):
            body = b'"return": ' + encode(result.value)
            if request_id is UNSET:
                return b"{" + body + b"}\r\n"
            return b"{" + body + b', "id": ' + encode_any(request_id) + b"}\r\n"
        assert isinstance(result, Error)
        error = result.error
        assert isinstance(error, QMPError)
        told = error.error_class
        if self._qemu_classes and told not in QEMU_CLASSES:
            told = "GenericError"
        body = b'"error": ' + encode({"class": told, "desc": error.desc}) + b"}\r\n"
        if request_id is UNSET:
            return b"{" + body
        return b'{"id": ' + encode_any(request_id) + b", " + body


@dataclass(frozen=True, slots=True)
class Reply:
    """What the server answered: the request's id, the result or error, the descriptors with it."""

    id: Any
    outcome: Outcome[Any]
    fds: list[Fd]


@dataclass(frozen=True, slots=True)
class QMPEvent:
    """What the server told unasked (QMP specification, "Asynchronous events").

    Args:
        name: the event's name, such as ``FD_ADDED``.
        data: its data; empty if it has none.
        seconds: when it happened, in seconds since the epoch by the server's clock.
    """

    name: str
    data: dict[str, Any]
    seconds: float


_decode_objects = msgspec.json.Decoder(dict[str, Any]).decode_lines


def _decode_replies(data: bytes) -> list[Any] | None:
    try:
        return _decode_objects(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None


def _fds_of_reply(message: Any) -> int:
    return SCM_MAX_FD if isinstance(message, dict) and "return" in message else 0


class ClientConnection(Connection):
    """The client's end: commands out; greeting, replies and events in.

    Args:
        max_reply_bytes: bytes of one reply.
    """

    def __init__(self, *, max_reply_bytes: int = MAX_REPLY_BYTES) -> None:
        super().__init__(_decode_replies, _fds_of_reply, max_reply_bytes, True)
        #: What the server said of itself, once it has.
        self.greeting: dict[str, Any] | None = None

    def execute(self, command: str, arguments: Mapping[str, Any] | None, request_id: Any) -> bytes:
        """The bytes that ask for *command*."""
        request: dict[str, Any] = {"execute": command}
        if arguments:
            request["arguments"] = arguments
        request["id"] = request_id
        return encode(request) + b"\n"

    def negotiated(self) -> None:
        """The server has accepted ``qmp_capabilities``."""
        self._move(Event.CAPABILITIES)

    def messages(self) -> Iterator[Reply | QMPEvent]:
        """The complete replies and events, in the order in which they came.

        Raises:
            ProtocolError: this is no QMP server.
        """
        for value, error, fds, dropped in self._inbox.messages():
            if error is not None or not isinstance(value, dict):
                self.garbage += fds
                raise ProtocolError(f"not a QMP server: {error or 'no JSON object'}")
            if "QMP" in value:
                self.garbage += fds
                if not isinstance(value["QMP"], dict):
                    raise ProtocolError("not a QMP server: its greeting is no JSON object")
                self._move(Event.GREETING)
                self.greeting = value["QMP"]
            elif "event" in value:
                yield _event(value)
            elif dropped:
                yield Reply(value.get("id"), Error(FdNotSupplied(_LOST)), fds)
            elif "error" in value:
                yield Reply(value.get("id"), Error(_told(value["error"])), fds)
            else:
                yield Reply(value.get("id"), Value(value.get("return")), fds)


def _told(error: Any) -> QMPError:
    members = error if isinstance(error, dict) else {}
    return error_of_class(str(members.get("class")), str(members.get("desc")))


class _Timestamp(Struct, frozen=True):
    seconds: float = 0
    microseconds: float = 0


class _Event(Struct):
    event: str
    data: dict[str, Any] = {}
    timestamp: _Timestamp = _Timestamp()


def _event(value: dict[str, Any]) -> QMPEvent:
    try:
        event = msgspec.convert(value, _Event)
    except msgspec.ValidationError as exc:
        raise ProtocolError(f"not a QMP server: {exc}") from None
    stamp = event.timestamp
    return QMPEvent(event.event, event.data, stamp.seconds + stamp.microseconds / 1e6)
