"""What a connection needs of the daemon."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from time import monotonic

import trio

from ..commands import SharedState
from ..limits import LAP_SECONDS, LIGHT_SECONDS, TURN_SECONDS
from ..protocol.parser import Budget
from ..transport import FdStream
from .connection.reader import Reader
from .durability import Durability
from .lifecycle import Lifecycle


@asynccontextmanager
async def held(lock: trio.Lock) -> AsyncGenerator[None, None]:
    """Hold *lock* while the block runs.  An uncontended lock is acquired without a checkpoint,
    during which ``async with lock`` would hold it for a pass of the loop.
    """
    try:
        lock.acquire_nowait()
    except trio.WouldBlock:
        await lock.acquire()
    try:
        yield
    finally:
        lock.release()


@dataclass(frozen=True, slots=True)
class Services:
    """What the daemon gives to each of its connections.

    Args:
        shared: what the commands share: the store, quotas, counters.
        lifecycle: whether the daemon runs, is paused for a takeover, or ends.
        durability: whether changes of the store are safe.
        lock: guards the store.
        input_budget: bytes of incomplete requests, of all connections together.
        unsent_budget: bytes of replies that clients have not taken, of all connections together.
        reader: serves clients that ask for little.
        gate: lets in one client that has much to do in each pass of the loop, in the order in which
            they come: ``async with gate`` has a checkpoint while it is held.
        spawn: runs a task of a session beside it; it is given the cancel scope that ends it.
    """

    shared: SharedState
    lifecycle: Lifecycle
    durability: Durability
    lock: trio.Lock
    input_budget: Budget
    unsent_budget: Budget
    reader: Reader
    gate: trio.Lock
    spawn: Callable[[Callable[[trio.CancelScope], Awaitable[None]], trio.CancelScope], None]

    def turn_ends(self) -> float:
        """When the turn of the client in the gate is to be over (time.monotonic()): the more others
        wait for theirs, the sooner.
        """
        waiting = self.gate.statistics().tasks_waiting
        length = min(TURN_SECONDS, LAP_SECONDS / (waiting + 1))
        return monotonic() + max(LIGHT_SECONDS / 2, length)

    def locked(self) -> AbstractAsyncContextManager[None]:
        """Hold the store's lock while the block runs."""
        return held(self.lock)

    def close_stream(self, stream: FdStream, uid: int) -> None:
        """Close a connection.  Descriptors in its unread input are closed with it, which may block:
        so that is done off the loop, and counts for the client's user.  After a takeover the
        connection goes on in the successor: it is closed without shutdown(2).
        """
        if self.lifecycle.handed_over:
            stream.close()
            return
        fd = stream.shutdown()
        if fd is not None:
            self.shared.closer.close([fd], uid)
