"""One QMP connection, without I/O: its states, the same at both ends, and what it receives.

One class serves both roles; what each of them says is in ``server.py`` and ``client.py``.  The
states are those of the QEMU Machine Protocol Specification
(section 2.2, "Server Greeting", section 4, "Capabilities Negotiation"), the same on both sides.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterator
from enum import Enum, auto
from typing import TYPE_CHECKING, Any

from ..kernel.fd import Fd
from .receive_buffer import NO_FDS, ChunkDecoder, ReceiveBuffer, WithFds

if TYPE_CHECKING:
    from .parser import Budget


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


class ProtocolError(Exception):
    """The peer does not speak QMP."""


class Connection:
    """What both roles share; made by :class:`ServerConnection` and :class:`ClientConnection`."""

    def __init__(
        self,
        decode: ChunkDecoder,
        wanted: Callable[[Any], int],
        max_bytes: int,
        lines: bool,
        budget: Budget | None = None,
        owner: Hashable = None,
    ) -> None:
        #: Descriptors that nobody takes; whoever does the I/O closes them.
        self.garbage: list[Fd] = []
        self.state = State.CONNECTED
        self._inbox = ReceiveBuffer(
            decode,
            wanted,
            max_bytes=max_bytes,
            garbage=self.garbage,
            lines=lines,
            budget=budget,
            owner=owner,
        )
        self._ready = self._inbox.ready  # what has come, and was not asked for yet
        self._unclaimed = self._inbox.unclaimed
        #: See :class:`ReceiveBuffer`.
        self.receive = self._inbox.receive
        self.receive_with_fds = self._inbox.receive_with_fds

    def _move(self, event: Event) -> None:
        try:
            self._enter(_TRANSITIONS[self.state, event])
        except KeyError:
            raise ProtocolError(f"{event.name} is out of place: {self.state.name}") from None

    def _enter(self, state: State) -> None:
        self.state = state

    @property
    def has_news(self) -> bool:
        """Whether something has come that was not asked for yet; not for blanks alone."""
        return bool(self._ready or self._inbox.pieces)

    @property
    def is_unsure(self) -> bool:
        """Whether descriptors have come of which only asking for messages tells whose they are."""
        return bool(self._inbox.pieces)

    def _messages(self) -> Iterator[tuple[Any, list[Fd], str]]:
        """What has come, taken away one by one: each value with its descriptors, and why there are
        less of them than there should be, if so.
        """
        ready = self._look()
        while ready:
            message = ready.popleft()
            yield message if type(message) is WithFds else (message, NO_FDS, "")

    def _look(self) -> deque[Any]:
        """What has come: to be taken from the left."""
        if self._inbox.pieces:
            self._inbox.look()
        return self._ready

    @property
    def waiting_fds(self) -> int:
        """How many descriptors have come that no command has yet."""
        count = len(self._unclaimed.fds)
        if self._ready:
            count += sum(len(each[1]) for each in self._ready if type(each) is WithFds)
        return count

    def refuse_fds(self, why: str) -> None:
        """Close those descriptors: the commands that should have had them are told why not."""
        for number, message in enumerate(self._ready):
            if type(message) is WithFds:
                value, fds, lost = message
                if fds:
                    self.garbage += fds
                    self._ready[number] = WithFds((value, [], lost or why))
        self._unclaimed.refuse(why)

    def close(self) -> None:
        """The connection is over: what waits for a command becomes garbage."""
        self._move(Event.CLOSE)
        for _, fds, _ in self._messages():
            self.garbage += fds
        self._inbox.close()
