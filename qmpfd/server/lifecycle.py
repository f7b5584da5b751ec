"""The states of the daemon, and every transition between them."""

from __future__ import annotations

from enum import Enum, auto

import trio


class State(Enum):
    """State of the daemon."""

    #: Restores saved state and binds sockets; serves no client yet.
    STARTING = auto()
    #: Accepts clients and executes their commands.
    RUNNING = auto()
    #: As RUNNING, while a successor prepares a takeover.
    OFFERED = auto()
    #: As OFFERED, after a stop request: the daemon ends whether or not the takeover succeeds.
    OFFERED_STOPPING = auto()
    #: The successor is ready: no client is accepted, no session reads or writes.
    PAUSED = auto()
    #: As PAUSED, after a stop request: the daemon ends whether or not the takeover succeeds.
    PAUSED_STOPPING = auto()
    #: Accepts no client; executes and answers the commands received.
    DRAINING = auto()
    #: As OFFERED_STOPPING, PAUSED_STOPPING and DRAINING, but requested by ``quit``: at the end the
    #: second copy of the store is removed as well.
    OFFERED_QUITTING = auto()
    PAUSED_QUITTING = auto()
    QUITTING = auto()
    #: A successor owns the sockets, the store and the connections.
    HANDED_OVER = auto()
    #: Every session has ended and every stored descriptor is closed.
    ENDED = auto()


class Event(Enum):
    """Event that changes the state of the daemon."""

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
    # A client may send quit after SIGTERM has begun a stop.
    (State.RUNNING, Event.QUIT): State.QUITTING,
    (State.OFFERED, Event.QUIT): State.OFFERED_QUITTING,
    (State.OFFERED_STOPPING, Event.QUIT): State.OFFERED_QUITTING,
    (State.PAUSED, Event.QUIT): State.PAUSED_QUITTING,
    (State.PAUSED_STOPPING, Event.QUIT): State.PAUSED_QUITTING,
    (State.DRAINING, Event.QUIT): State.QUITTING,
    **{(state, Event.END): State.ENDED for state in State},
}

_PAUSED = frozenset({State.PAUSED, State.PAUSED_STOPPING, State.PAUSED_QUITTING, State.HANDED_OVER})
#: States of a daemon that ends, accepts no more clients and has no takeover under way.
DRAINING = frozenset({State.DRAINING, State.QUITTING})
#: States of a daemon that ends, after stop or quit, or because it has handed over.
STOPPING = DRAINING | _PAUSED - {State.PAUSED} | {State.ENDED}


class Lifecycle:
    """Present state of the daemon; tasks can wait for another state."""

    def __init__(self) -> None:
        self._enter(State.STARTING)
        #: Set on entering :attr:`State.ENDED`.
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
        # Stored, not computed: every request reads both.
        #: Whether no session may read or write: a takeover is in its last step, or complete.
        self.paused = state in _PAUSED
        #: Whether the daemon ends: after stop or quit, or because it has handed over.
        self.stopping = state in STOPPING

    @property
    def handed_over(self) -> bool:
        """Whether a successor owns everything: all descriptors here are duplicates of its own."""
        return self.state is State.HANDED_OVER

    async def wait_running(self) -> None:
        """Wait while paused (for ever once handed over); without a checkpoint if not paused."""
        while self.paused:
            await self._changed.wait()

    async def wait_for(self, *states: State) -> None:
        """Wait until the daemon is in one of *states*."""
        while self.state not in states:
            await self._changed.wait()
