"""The states of a session, and every transition between them."""

from __future__ import annotations

from enum import Enum, auto


class SessionState(Enum):
    """What a session does."""

    SERVING = auto()  #: it carries out what its client has sent, or sends the replies
    WAITING = auto()  #: it waits for its client, of which nothing is unanswered
    PAUSED = auto()  #: the daemon is paused, and nothing of it is under way
    EVICTED = auto()  #: its client has been idle for too long, is told so and disconnected


class Event(Enum):
    """What changes the state."""

    WAIT = auto()
    INPUT = auto()  # the client has sent something, or is gone
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
    """Why a session serves its client no more."""

    #: The client is gone, was told to go, or the daemon ends.
    CLOSED = auto()
    #: The client asked for a takeover: its connection is for that from here on.
    TAKEOVER = auto()
