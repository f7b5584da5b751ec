"""The states of a worker in its parent, and every transition between them."""

from __future__ import annotations

from enum import Enum


class State(Enum):
    """State of the worker."""

    FIRST_WAIT = "none has served yet, and none runs"
    FIRST_START = "none has served yet, and one starts"
    WAITING = "none runs; the next one is started at some time"
    STARTING = "one starts again"
    SERVING = "it serves"
    GONE = "it has closed its socket to the parent: it is dead in a moment"
    HUNG = "it did not answer in time and was killed"
    STOPPING = "it was told to end"
    DRAINING = "it was told to end, and has said that it does"
    KILLED = "it was told to end, did not in time and was killed"
    ENDED = "it has ended, and so does the parent"


class Event(Enum):
    """Event that changes the state of the worker."""

    START = "it is started"
    READY = "it says READY=1"
    STOP = "it is to end: SIGTERM or SIGINT"
    STOPS = "it says STOPPING=1"
    TIMEOUT = "it does not answer in time"
    HANGUP = "it has closed its socket"
    DIED = "it is dead, and is to be started again"
    END = "it is dead, and the parent ends too"


_TO_THE_END = {Event.END: State.ENDED}
_STARTING = {
    Event.READY: State.SERVING,
    Event.STOP: State.STOPPING,
    Event.TIMEOUT: State.HUNG,
} | _TO_THE_END

#: The transitions of each state; an event that is not listed does not change the state.
TRANSITIONS = {
    State.FIRST_WAIT: {Event.START: State.FIRST_START} | _TO_THE_END,
    State.FIRST_START: {Event.DIED: State.FIRST_WAIT} | _STARTING,
    State.WAITING: {Event.START: State.STARTING} | _TO_THE_END,
    State.STARTING: {Event.HANGUP: State.GONE, Event.DIED: State.WAITING} | _STARTING,
    State.SERVING: {
        Event.HANGUP: State.GONE,
        Event.STOP: State.STOPPING,
        Event.TIMEOUT: State.HUNG,
        Event.DIED: State.WAITING,
    }
    | _TO_THE_END,
    State.GONE: {
        Event.STOP: State.STOPPING,
        Event.TIMEOUT: State.HUNG,
        Event.DIED: State.WAITING,
    }
    | _TO_THE_END,
    State.HUNG: {Event.STOP: State.KILLED, Event.DIED: State.WAITING} | _TO_THE_END,
    State.STOPPING: {Event.STOPS: State.DRAINING, Event.TIMEOUT: State.KILLED} | _TO_THE_END,
    State.DRAINING: {Event.TIMEOUT: State.KILLED} | _TO_THE_END,
    State.KILLED: _TO_THE_END,
    State.ENDED: {},
}

#: States of a worker that was told to end.
TOLD_TO_END = (State.STOPPING, State.DRAINING, State.KILLED)
