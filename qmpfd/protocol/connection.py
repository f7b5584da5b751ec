"""One QMP connection without I/O: the states and the receive buffer, common to both roles.

The messages that each role sends are in ``server.py`` and ``client.py``.  The states are those of
the QEMU Machine Protocol Specification (section 2.2, "Server Greeting", section 4, "Capabilities
Negotiation").
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum, auto
from typing import Any

from ..kernel.fd import Fd
from .receive_buffer import NO_FDS, ReceiveBuffer


class State(Enum):
    """State of a connection; the values are part of the takeover protocol."""

    CONNECTED = "connected"  #: the greeting has not been sent yet
    NEGOTIATING = "negotiating"  #: only ``qmp_capabilities`` is accepted
    COMMANDS = "commands"
    CLOSED = "closed"


class Event(Enum):
    """Event that changes the state of a connection."""

    GREETING = auto()
    CAPABILITIES = auto()
    CLOSE = auto()


_TRANSITIONS = {
    (State.CONNECTED, Event.GREETING): State.NEGOTIATING,
    (State.NEGOTIATING, Event.CAPABILITIES): State.COMMANDS,
    **{(state, Event.CLOSE): State.CLOSED for state in State},
}


class ProtocolError(Exception):
    """The peer does not speak QMP."""


class Connection:
    """Base class of :class:`ServerConnection` and :class:`ClientConnection`."""

    def __init__(self, receive_buffer: ReceiveBuffer) -> None:
        self.state = State.CONNECTED
        self._receive_buffer = receive_buffer
        #: Complete messages that were received and not fetched yet.
        self.ready = receive_buffer.ready
        #: The received descriptors that no command has taken yet.
        self.pending_fds = receive_buffer.pending_fds
        #: Descriptors that no message takes; the caller, which does the I/O, closes them.
        self.fds_to_close = self.pending_fds.fds_to_close
        #: See :class:`ReceiveBuffer`.
        self.plan = receive_buffer.plan
        self.received = receive_buffer.received

    def _move(self, event: Event) -> None:
        try:
            self._enter(_TRANSITIONS[self.state, event])
        except KeyError:
            raise ProtocolError(f"{event.name} is out of place: {self.state.name}") from None

    def _enter(self, state: State) -> None:
        self.state = state

    @property
    def has_unassigned_fds(self) -> bool:
        """Whether descriptors were received that no complete message takes."""
        return bool(self.fds_to_close or self.pending_fds.fds)

    def _messages(self) -> Iterator[tuple[Any, list[Fd], str]]:
        """Pop each complete message: its value, its descriptors, and why some were lost, or ""."""
        ready = self.ready
        while ready:
            message = ready.popleft()
            yield message if type(message) is tuple else (message, NO_FDS, "")

    @property
    def waiting_fds(self) -> int:
        """Number of received descriptors that no command has been given yet."""
        count = len(self.pending_fds.fds)
        if self.ready:
            count += sum(len(each[1]) for each in self.ready if type(each) is tuple)
        return count

    def refuse_fds(self, why: str) -> None:
        """Discard the descriptors counted by :attr:`waiting_fds`: the commands fail with *why*."""
        for number, message in enumerate(self.ready):
            if type(message) is tuple:
                value, fds, lost = message
                if fds:
                    self.fds_to_close += fds
                    self.ready[number] = (value, [], lost or why)
        self.pending_fds.refuse(why)

    def close(self) -> None:
        """End the connection; move the descriptors not yet used to :attr:`fds_to_close`."""
        self._move(Event.CLOSE)
        for _, fds, _ in self._messages():
            self.fds_to_close += fds
        self._receive_buffer.close()
