"""The states of the daemon, and every transition between them."""

from __future__ import annotations

from enum import Enum, auto

import trio


class State(Enum):
    """What the daemon is doing."""

    #: Restoring saved state, binding sockets: nobody is served yet.
    STARTING = auto()
    #: Accepting clients and carrying out their requests.
    RUNNING = auto()
    #: The same, while a successor gets ready to take over.
    OFFERED = auto()
    #: The same, and the daemon was told to stop: it ends whether or not the takeover succeeds.
    OFFERED_STOPPING = auto()
    #: The successor is ready: nobody is accepted, no session reads or writes.
    PAUSED = auto()
    #: The same, and the daemon was told to stop: it ends whether or not the takeover succeeds.
    PAUSED_STOPPING = auto()
    #: Accepting nobody; what was received is carried out and answered.
    DRAINING = auto()
    #: As the three above, told by ``quit``: at the end the second copy of the store goes as well.
    OFFERED_QUITTING = auto()
    PAUSED_QUITTING = auto()
    QUITTING = auto()
    #: A successor owns the sockets, the store and the connections.
    HANDED_OVER = auto()
    #: Every session is over and every stored descriptor is closed.
    ENDED = auto()


class Event(Enum):
    """What changes the state."""

    START = auto()
    OFFER = auto()
    WITHDRAW = auto()
    PAUSE = auto()
    RESUME = auto()
    STOP = auto()
    QUIT = auto()
    HAND_OVER = auto()
    END = auto()


TRANSITIONS: dict[tuple[State, Event], State] = {
    (State.STARTING, Event.START): State.RUNNING,
    (State.STARTING, Event.STOP): State.DRAINING,
    (State.RUNNING, Event.STOP): State.DRAINING,
    (State.RUNNING, Event.OFFER): State.OFFERED,
    (State.OFFERED, Event.WITHDRAW): State.RUNNING,
    (State.OFFERED, Event.STOP): State.OFFERED_STOPPING,
    (State.OFFERED, Event.PAUSE): State.PAUSED,
    (State.OFFERED_STOPPING, Event.WITHDRAW): State.DRAINING,
    (State.OFFERED_STOPPING, Event.PAUSE): State.PAUSED_STOPPING,
    (State.PAUSED, Event.RESUME): State.OFFERED,
    (State.PAUSED, Event.STOP): State.PAUSED_STOPPING,
    (State.PAUSED, Event.HAND_OVER): State.HANDED_OVER,
    (State.PAUSED_STOPPING, Event.RESUME): State.OFFERED_STOPPING,
    (State.PAUSED_STOPPING, Event.HAND_OVER): State.HANDED_OVER,
    (State.OFFERED_QUITTING, Event.WITHDRAW): State.QUITTING,
    (State.OFFERED_QUITTING, Event.PAUSE): State.PAUSED_QUITTING,
    (State.PAUSED_QUITTING, Event.RESUME): State.OFFERED_QUITTING,
    (State.PAUSED_QUITTING, Event.HAND_OVER): State.HANDED_OVER,
    # A client may say quit to a daemon that was told to stop already.
    (State.RUNNING, Event.QUIT): State.QUITTING,
    (State.OFFERED, Event.QUIT): State.OFFERED_QUITTING,
    (State.OFFERED_STOPPING, Event.QUIT): State.OFFERED_QUITTING,
    (State.PAUSED, Event.QUIT): State.PAUSED_QUITTING,
    (State.PAUSED_STOPPING, Event.QUIT): State.PAUSED_QUITTING,
    (State.DRAINING, Event.QUIT): State.QUITTING,
    **{(state, Event.END): State.ENDED for state in State},
}

_PAUSED = frozenset({State.PAUSED, State.PAUSED_STOPPING, State.PAUSED_QUITTING, State.HANDED_OVER})
#: No client is accepted any more, no takeover is under way.
DRAINING = frozenset({State.DRAINING, State.QUITTING})
_STOPPING = DRAINING | _PAUSED - {State.PAUSED} | {State.ENDED}


class Lifecycle:
    """The state that the daemon is in, and tasks that wait for another one."""

    def __init__(self) -> None:
        self._enter(State.STARTING)
        #: Set with :attr:`State.ENDED`.
        self.ended = trio.Event()
        self._changed = trio.Event()

    def can(self, event: Event) -> bool:
        """Whether *event* is possible in the present state."""
        return (self.state, event) in TRANSITIONS

    def handle(self, event: Event) -> None:
        """Change the state.

        Raises:
            KeyError: *event* is impossible in the present state.
        """
        self._enter(TRANSITIONS[self.state, event])
        self._changed.set()
        self._changed = trio.Event()
        if self.state is State.ENDED:
            self.ended.set()

    def _enter(self, state: State) -> None:
        self.state = state
        # Kept, as each request asks for both.
        #: Whether no connection may be read or written: a takeover is under way, or complete.
        self.paused = state in _PAUSED
        #: Whether the daemon was told to end, or has handed over.
        self.stopping = state in _STOPPING

    @property
    def handed_over(self) -> bool:
        """Whether a successor owns everything: what is open here is a duplicate."""
        return self.state is State.HANDED_OVER

    async def wait_running(self) -> None:
        """Wait while :attr:`paused`, for ever once a successor owns everything; without a
        checkpoint otherwise.
        """
        while self.paused:
            await self._changed.wait()

    async def wait_stopping(self) -> None:
        """Wait until the daemon was told to end, or has handed over."""
        while not self.stopping:
            await self._changed.wait()

    async def wait_for(self, *states: State) -> None:
        """Wait until the daemon is in one of *states*."""
        while self.state not in states:
            await self._changed.wait()
