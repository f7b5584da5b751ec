"""The states of a session, and every transition between them."""

from __future__ import annotations

from enum import Enum, auto


class SessionState(Enum):
    """State of a session."""

    SERVING = auto()  #: executing requests or sending replies
    WAITING = auto()  #: waiting for input; every request is answered
    PAUSED = auto()  #: the daemon is paused, and the session has stopped between two steps
    EVICTED = auto()  #: the client was idle for too long and is being disconnected


class Event(Enum):
    """Event that changes the state."""

    WAIT = auto()
    INPUT = auto()  # the client has sent something, or has closed the connection
    PAUSE = auto()
    RESUME = auto()
    EVICT = auto()


TRANSITIONS = {
    (SessionState.SERVING, Event.WAIT): SessionState.WAITING,
    (SessionState.WAITING, Event.INPUT): SessionState.SERVING,
    (SessionState.SERVING, Event.PAUSE): SessionState.PAUSED,
    (SessionState.PAUSED, Event.RESUME): SessionState.SERVING,
    **{(state, Event.EVICT): SessionState.EVICTED for state in SessionState},
    **{(SessionState.EVICTED, event): SessionState.EVICTED for event in Event},
}


class SessionEnd(Enum):
    """Reason for the end of a session."""

    #: The client has disconnected or was evicted, or the daemon stops.
    CLOSED = auto()
    #: The client asked for a takeover: the sender uses the connection from now on.
    TAKEOVER = auto()
