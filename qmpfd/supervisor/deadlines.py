"""Until when a worker has to do what its state waits for."""

from __future__ import annotations

from .states import State
from .worker import Worker

#: A time that does not come.
NEVER = float("inf")

#: Seconds that the end of a worker that drains takes beyond --drain-timeout.
_END_TIMEOUT = 2.0

#: Seconds until the parent does not wait any more for the end of a worker that was killed: the
#: close of a descriptor hangs (a FUSE mount that does not answer).  No code of it runs any more.
_DEATH_TIMEOUT = 1.0


def deadline(worker: Worker, state: State, heartbeat: float, drain_timeout: float) -> float:
    """When a worker is too late (time.monotonic()).

    Args:
        worker: the worker.
        state: what it does.
        heartbeat: seconds within which one that serves says that its loop turns.
        drain_timeout: seconds that one may take to end.
    """
    if state is State.SERVING:
        return worker.heard_at + heartbeat
    if state in (State.FIRST_START, State.STARTING):
        return worker.started_at + worker.start_timeout
    if state is State.STOPPING:
        return worker.stopped_at + drain_timeout
    if state is State.DRAINING:
        return worker.stopped_at + drain_timeout + _END_TIMEOUT
    if state in (State.GONE, State.HUNG, State.KILLED):
        return worker.gone_at + _DEATH_TIMEOUT
    return NEVER
