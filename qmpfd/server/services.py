"""Services of the daemon that its sessions use."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from time import monotonic

import trio

from ..commands import SharedState
from ..limits import LIGHT_SECONDS, ROUND_SECONDS, TURN_SECONDS
from ..protocol.budget import Budget
from ..transport import FdStream
from .connection.reader import Reader
from .durability import Durability
from .lifecycle import Lifecycle


@asynccontextmanager
async def held(lock: trio.Lock) -> AsyncGenerator[None, None]:
    """Hold *lock* while the block runs.  An uncontended lock is acquired without a checkpoint:
    ``async with lock`` has one after acquiring, and so holds the lock for a pass of the event loop.
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
    """Services of the daemon that its sessions use.

    Args:
        shared: state shared by the commands: the store, quotas, counters.
        lifecycle: state of the daemon: running, paused for a takeover, ending.
        durability: the second copy of the store.
        lock: guards the store.
        input_budget: bytes of incomplete requests, of all connections together.
        unsent_budget: bytes of replies queued for clients, of all connections together.
        reader: serves light clients, in one task.
        gate: FIFO lock of heavy clients: ``async with gate`` has a checkpoint while it is held, so
            one heavy client is served in each pass of the event loop.
        spawn: starts another task of a session, which is passed the cancel scope that ends it.
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
        """Return the deadline (time.monotonic()) of the turn of the client that holds the gate: the
        more clients wait for the gate, the shorter the turn.
        """
        waiting = self.gate.statistics().tasks_waiting
        length = min(TURN_SECONDS, ROUND_SECONDS / (waiting + 1))
        return monotonic() + max(LIGHT_SECONDS / 2, length)

    def locked(self) -> AbstractAsyncContextManager[None]:
        """Hold the store's lock while the block runs."""
        return held(self.lock)

    def close_stream(self, stream: FdStream, uid: int) -> None:
        """Close a connection, in the close pool: descriptors in its unread input are closed with
        it, which may block.  The close is charged to the client's user.  After a takeover the
        connection is in use by the successor: it is closed without shutdown(2).
        """
        if self.lifecycle.handed_over:
            stream.close()
            return
        fd = stream.shutdown()
        if fd is not None:
            self.shared.closer.close([fd], uid)
