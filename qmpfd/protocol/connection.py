"""One QMP connection, without I/O: its states, the same at both ends, and what it receives.

One class serves both roles; what each of them says is in ``server.py`` and ``client.py``.  The
states are those of the QEMU Machine Protocol Specification
(section 2.2, "Server Greeting", section 4, "Capabilities Negotiation"), the same on both sides.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from enum import Enum, auto
from typing import TYPE_CHECKING, Any

from ..kernel.fd import Fd
from .receive_buffer import NO_FDS, ChunkDecoder, ReceiveBuffer

if TYPE_CHECKING:
    from .parser import Budget


class State(Enum):
    """Where a connection is; the values go over in a takeover."""

    CONNECTED = "connected"  #: the greeting has not gone over yet
    NEGOTIATING = "negotiating"  #: only ``qmp_capabilities`` is possible
    COMMANDS = "commands"
    CLOSED = "closed"


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


class ProtocolError(Exception):
    """The peer does not speak QMP."""


class Connection:
    """What both roles share; made by :class:`ServerConnection` and :class:`ClientConnection`."""

    def __init__(
        self,
        decode: ChunkDecoder,
        max_fds: Callable[[Any], int],
        max_bytes: int,
        lines: bool,
        budget: Budget | None = None,
        owner: Hashable = None,
    ) -> None:
        #: Descriptors that nobody takes; whoever does the I/O closes them.
        self.fds_to_close: list[Fd] = []
        self.state = State.CONNECTED
        self._receive_buffer = ReceiveBuffer(
            decode,
            max_fds,
            max_bytes=max_bytes,
            fds_to_close=self.fds_to_close,
            lines=lines,
            budget=budget,
            owner=owner,
        )
        #: What has come, and was not asked for yet.
        self.ready = self._receive_buffer.ready
        #: The descriptors that wait for a command.
        self.pending_fds = self._receive_buffer.pending_fds
        #: See :class:`ReceiveBuffer`.
        self.plan = self._receive_buffer.plan
        self.received = self._receive_buffer.received

    def _move(self, event: Event) -> None:
        try:
            self._enter(_TRANSITIONS[self.state, event])
        except KeyError:
            raise ProtocolError(f"{event.name} is out of place: {self.state.name}") from None

    def _enter(self, state: State) -> None:
        self.state = state

    @property
    def has_pending_input(self) -> bool:
        """Whether something has come that was not asked for yet; not for blanks alone."""
        return bool(self.ready)

    @property
    def has_unassigned_fds(self) -> bool:
        """Whether descriptors have come that none of the messages takes so far."""
        return bool(self.fds_to_close or self.pending_fds.fds)

    def _messages(self) -> Iterator[tuple[Any, list[Fd], str]]:
        """What has come, taken away one by one: each value with its descriptors, and why there are
        less of them than there should be, if so.
        """
        ready = self.ready
        while ready:
            message = ready.popleft()
            yield message if type(message) is tuple else (message, NO_FDS, "")

    @property
    def waiting_fds(self) -> int:
        """How many descriptors have come that no command has yet."""
        count = len(self.pending_fds.fds)
        if self.ready:
            count += sum(len(each[1]) for each in self.ready if type(each) is tuple)
        return count

    def refuse_fds(self, why: str) -> None:
        """Close those descriptors: the commands that should have had them are told why not."""
        for number, message in enumerate(self.ready):
            if type(message) is tuple:
                value, fds, lost = message
                if fds:
                    self.fds_to_close += fds
                    self.ready[number] = (value, [], lost or why)
        self.pending_fds.refuse(why)

    def close(self) -> None:
        """The connection is over: close what waits for a command."""
        self._move(Event.CLOSE)
        for _, fds, _ in self._messages():
            self.fds_to_close += fds
        self._receive_buffer.close()
