"""Server side of a connection: decodes requests, encodes replies."""

from __future__ import annotations

import sys
from collections.abc import Container, Hashable, Iterator
from itertools import islice
from typing import Any, TypeAlias

import msgspec
from msgspec import UNSET, Struct, to_builtins
from outcome import Error, Outcome, Value

from ..errors import QEMU_CLASSES, CommandNotFound, FdNotSupplied, GenericError, QMPError
from ..kernel.fd import Fd
from ..limits import MAX_ERRORS_IN_A_ROW, MAX_REQUEST_BYTES
from .budget import Budget
from .connection import Connection, Event, State
from .encode import LONG_TEXT, JSONStream, RawJSON, encode, encode_any, templates
from .parser import Parser
from .receive_buffer import NO_FDS, ReceiveBuffer
from .request_decoder import Request, RequestDecoder
from .saved import ReceiveBufferState
from .streamed_reply import StreamedReply

#: A request, or the error that refuses it; its id; its descriptors.
ReceivedRequest: TypeAlias = "tuple[Request | Error, Any, list[Fd]]"


class MessageState(Struct, forbid_unknown_fields=True):
    """A complete message that was not executed yet.

    Args:
        text: its JSON; empty if it has a parse error.
        error: the text of that error; empty if it has none.
        fds: number of its descriptors; None if it is not :class:`Received`.
        lost: why descriptors of the message were lost; empty if none were.
    """

    text: bytes
    error: str
    fds: int | None
    lost: str


class ConnectionState(Struct, forbid_unknown_fields=True):
    """State of a connection, without the descriptors themselves.

    Args:
        state: greeting, negotiation or commands.
        oob_enabled: whether the client has enabled out-of-band execution.
        errors_in_a_row: number of errors since the last valid request.
        receive_buffer: the incomplete input.
        messages: the complete messages that were not executed yet.
    """

    state: State
    oob_enabled: bool
    errors_in_a_row: int
    receive_buffer: ReceiveBufferState
    messages: list[MessageState]


class ServerConnection(Connection):
    """Server side: decodes requests, encodes replies and events.

    Args:
        decoder: the commands of the server.
        max_request_bytes: maximum size of a request.
        qemu_classes: whether errors have only the classes of current QEMU.
        budget: limit of the memory for incomplete requests, shared with other connections.
        owner: the user whom that memory counts for.
    """

    def __init__(
        self,
        decoder: RequestDecoder,
        *,
        max_request_bytes: int = MAX_REQUEST_BYTES,
        qemu_classes: bool = False,
        budget: Budget | None = None,
        owner: Hashable = None,
    ) -> None:
        super().__init__(
            ReceiveBuffer(
                decoder.decode_chunk,
                decoder.max_fds,
                max_bytes=max_request_bytes,
                budget=budget,
                owner=owner,
            )
        )
        self._decoder = decoder
        self._qemu_classes = qemu_classes
        self._oob_enabled = False
        self._errors_in_a_row = 0
        # The request types that need no check of the state: all in COMMANDS, else none.
        self._unchecked_types: Container[type] = ()

    def greeting(self, version: object) -> bytes:
        """Return the greeting to send; *version* is the result of ``query-version``."""
        self._move(Event.GREETING)
        return encode({"QMP": {"version": version, "capabilities": ["oob"]}}) + b"\r\n"

    def snapshot(self) -> tuple[ConnectionState, list[Fd]]:
        """Return the state and the received descriptors, for :meth:`restore`.

        The descriptors stay owned by this connection.
        """
        receive_buffer, fds = self._receive_buffer.snapshot()
        fds = list(fds)
        messages = []
        for message in self.ready:
            received = type(message) is tuple
            value, its_fds, lost = message if received else (message, NO_FDS, "")
            text, error = b"", ""
            if isinstance(value, GenericError):
                error = value.desc
            elif isinstance(value, Request):
                text = msgspec.json.encode(value)
            else:
                text = encode_any(value)
            messages.append(MessageState(text, error, len(its_fds) if received else None, lost))
            fds += its_fds
        state = ConnectionState(
            self.state, self._oob_enabled, self._errors_in_a_row, receive_buffer, messages
        )
        return state, fds

    def restore(self, saved: ConnectionState, fds: Iterator[Fd]) -> None:
        """Restore the state of another connection's :meth:`snapshot`.

        Args:
            saved: the state.
            fds: the descriptors, owned from here on; those that the state counts are consumed.

        Raises:
            ValueError: the state is inconsistent.
        """
        self._enter(saved.state)
        self._oob_enabled = saved.oob_enabled
        self._errors_in_a_row = saved.errors_in_a_row
        self._receive_buffer.restore(
            saved.receive_buffer, list(islice(fds, saved.receive_buffer.fds))
        )
        for message in saved.messages:
            value = GenericError(message.error) if message.error else self._decoded(message.text)
            if message.fds is not None:
                value = (value, list(islice(fds, message.fds)), message.lost)
            self.ready.append(value)

    def _decoded(self, text: bytes) -> Any:
        """Return the message that *text* encodes: a typed request, or else a value."""
        requests = self._decoder.decode_chunk(text)
        if requests is not None and len(requests) == 1:
            return requests[0]
        (found,) = Parser(sys.maxsize).feed(text + b"\n")
        return found[0]

    def negotiate(self, capabilities: list[str]) -> None:
        """Execute ``qmp_capabilities``.

        Raises:
            CommandNotFound: negotiation was completed before.
        """
        if self.state is not State.NEGOTIATING:
            raise CommandNotFound("Capabilities negotiation is already complete, command ignored")
        self._oob_enabled = "oob" in capabilities
        self._move(Event.CAPABILITIES)

    def _enter(self, state: State) -> None:
        super()._enter(state)
        self._unchecked_types = self._decoder.names if state is State.COMMANDS else ()

    def next_request(self) -> ReceivedRequest | None:
        """Pop the next complete request, in order of arrival; None if there is none.

        Execute it before the next call: the next request is checked against the resulting state.
        """
        ready = self.ready
        while ready:
            message = ready.popleft()
            value, fds, lost = message if type(message) is tuple else (message, NO_FDS, "")
            if type(value) in self._unchecked_types and not lost:
                self._errors_in_a_row = 0
                return value, value.id, fds
            received = self._check(value, fds, lost)
            if received is not None:
                return received
        return None

    def _check(self, value: Any, fds: list[Fd], lost: str) -> ReceivedRequest | None:
        """Return a message as a request or as the error that refuses it.

        Returns None for a parse error beyond ``MAX_ERRORS_IN_A_ROW``, which gets no reply.
        """
        if isinstance(value, Request):
            request_id = value.id
        else:
            request_id = value.get("id", UNSET) if isinstance(value, dict) else UNSET
        try:
            if isinstance(value, GenericError):
                raise value
            request = self._request(value)
            if lost:
                raise FdNotSupplied(lost)
        except QMPError as exc:
            self.fds_to_close += fds
            if not isinstance(value, dict | Request):
                # Input that is no request: a flood of it gets one error reply a read.
                self._errors_in_a_row += 1
                replied = self._errors_in_a_row <= MAX_ERRORS_IN_A_ROW + 1
                if not self.ready:
                    self._errors_in_a_row = min(self._errors_in_a_row, MAX_ERRORS_IN_A_ROW)
                if not replied:
                    return None
            return Error(exc), request_id, []
        self._errors_in_a_row = 0
        return request, request_id, fds

    def _request(self, value: Any) -> Request:
        """Return *value* as a request; raise QMPError if the current state does not allow it."""
        decoder = self._decoder
        if self.state is State.COMMANDS:
            if isinstance(value, Request):
                return value
            return decoder.request(value, oob_enabled=self._oob_enabled)
        try:
            if not isinstance(value, Request):
                return decoder.request(
                    value, oob_enabled=self._oob_enabled, only="qmp_capabilities"
                )
            if decoder.names[type(value)] == "qmp_capabilities":
                return value
        except CommandNotFound:
            pass
        raise CommandNotFound("Expecting capabilities negotiation with 'qmp_capabilities'")

    def answer(self, result: Outcome[object], request_id: Any) -> bytes | StreamedReply:
        """Encode the reply to a request: its result or QMPError; as a stream if it may be long."""
        if request_id is UNSET and type(result) is Value:  # the usual case
            value = result.value
            if type(value) is RawJSON:
                return b'{"return": %b}\r\n' % value
            if (template := templates[type(value)]) is not None:
                text, get_numbers = template
                return b'{"return": %b}\r\n' % (text % get_numbers(value))
        if self._may_be_long(result, request_id):
            return self.streamed_reply(result, request_id)
        return self.reply(result, request_id)

    def reply(self, result: Outcome[object], request_id: Any) -> bytes:
        """Encode the reply to a request as one piece."""
        if type(result) is Value:
            returned = encode(result.value)
            if request_id is UNSET:
                return b'{"return": %b}\r\n' % returned
            return b'{"return": %b, "id": %b}\r\n' % (returned, encode_any(request_id))
        body = b'"error": ' + encode(self._error(result)) + b"}\r\n"
        if request_id is UNSET:
            return b"{" + body
        return b'{"id": ' + encode_any(request_id) + b", " + body

    def _error(self, result: Outcome[object]) -> dict[str, str]:
        """Return the ``error`` member of a reply."""
        assert isinstance(result, Error)
        error = result.error
        assert isinstance(error, QMPError)
        error_class = error.error_class
        if self._qemu_classes and error_class not in QEMU_CLASSES:
            error_class = "GenericError"
        return {"class": error_class, "desc": error.desc}

    @staticmethod
    def _may_be_long(result: Outcome[object], request_id: Any) -> bool:
        kind = type(request_id)
        if kind is dict or kind is list or (kind is str and len(request_id) > LONG_TEXT):
            return True
        if type(result) is Value:
            return isinstance(result.value, JSONStream)
        # An error's text may quote the client's input.
        return isinstance(result, Error) and len(str(result.error)) > LONG_TEXT

    def streamed_reply(self, result: Outcome[object], request_id: Any) -> StreamedReply:
        """Encode the reply to a request in parts: listings and ids may be megabytes long."""
        id_member = {} if request_id is UNSET else {"id": request_id}
        if not isinstance(result, Value):
            return StreamedReply({**id_member, "error": self._error(result)})
        value = result.value
        if isinstance(value, JSONStream) and value.value is None:
            return StreamedReply(id_member, value)
        whole = value.value if isinstance(value, JSONStream) else value
        returned = whole if type(whole) is RawJSON else to_builtins(whole)
        return StreamedReply({"return": returned, **id_member}, source=value)
