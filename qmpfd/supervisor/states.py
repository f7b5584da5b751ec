"""The states of a worker in its parent, and every transition between them."""

from __future__ import annotations

from enum import Enum


class State(Enum):
    """State of the worker."""

    FIRST_WAIT = "no worker has served yet, and none runs"
    FIRST_START = "no worker has served yet, and one starts"
    WAITING = "no worker runs; the next start is scheduled"
    STARTING = "a worker starts again"
    SERVING = "the worker serves"
    GONE = "the worker has closed its socket to the parent: it is dying"
    HUNG = "the worker missed a deadline and was killed"
    STOPPING = "the worker was sent SIGTERM or SIGINT"
    DRAINING = "the worker has answered STOPPING=1"
    KILLED = "the worker did not stop in time and was killed"
    ENDED = "the worker has ended, and so does the parent"


class Event(Enum):
    """Event that changes the state of the worker."""

    START = "the worker is started"
    READY = "the worker sends READY=1"
    STOP = "the parent receives SIGTERM or SIGINT"
    STOPS = "the worker sends STOPPING=1"
    TIMEOUT = "the worker misses a deadline"
    HANGUP = "the worker closes its socket"
    DIED = "the worker dies, and is to be restarted"
    END = "the worker dies, and the parent ends too"


_TO_THE_END = {Event.END: State.ENDED}
_RUNNING = {Event.STOP: State.STOPPING, Event.TIMEOUT: State.HUNG} | _TO_THE_END
_READY = {Event.READY: State.SERVING}
_HANGUP = {Event.HANGUP: State.GONE}
_DIED = {Event.DIED: State.WAITING}

#: The transitions of each state; an event that is not listed does not change the state.
TRANSITIONS = {
    State.FIRST_WAIT: {Event.START: State.FIRST_START} | _TO_THE_END,
    State.FIRST_START: {Event.DIED: State.FIRST_WAIT} | _READY | _RUNNING,
    State.WAITING: {Event.START: State.STARTING} | _TO_THE_END,
    State.STARTING: _READY | _HANGUP | _DIED | _RUNNING,
    State.SERVING: _HANGUP | _DIED | _RUNNING,
    State.GONE: _DIED | _RUNNING,
    State.HUNG: {Event.STOP: State.KILLED} | _DIED | _TO_THE_END,
    State.STOPPING: {Event.STOPS: State.DRAINING, Event.TIMEOUT: State.KILLED} | _TO_THE_END,
    State.DRAINING: {Event.TIMEOUT: State.KILLED} | _TO_THE_END,
    State.KILLED: _TO_THE_END,
    State.ENDED: {},
}

#: States of a worker that was told to end.
ENDING = (State.STOPPING, State.DRAINING, State.KILLED)
