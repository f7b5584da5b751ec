"""The states of the second copy, and every transition between them."""

from __future__ import annotations

from enum import Enum, auto


class State(Enum):
    """What becomes of what is stored."""

    KEPT = auto()  #: it is kept
    DISTRUSTED = auto()  #: it may not be: no more is sent, but what is removed is removed there too
    OVER = auto()  #: nobody is there to keep it


class Event(Enum):
    """What changes the state."""

    DROPPED = auto()  # the service manager does not keep what it is sent
    END = auto()  # the link has ended


#: An event that is not here changes nothing.
TRANSITIONS = {
    (State.KEPT, Event.DROPPED): State.DISTRUSTED,
    (State.KEPT, Event.END): State.OVER,
    (State.DISTRUSTED, Event.END): State.OVER,
}
