"""What a connection needs of the daemon."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from time import monotonic
from typing import Protocol

import trio

from ..commands import SharedState
from ..kernel.close_pool import ClosePool
from ..kernel.fd import Fd
from ..limits import LAP_SECONDS, LIGHT_SECONDS, TURN_SECONDS
from ..protocol import Budget
from ..transport import FdStream
from .connection.reader import Reader
from .connection.unsent_budget import UnsentBudget
from .lifecycle import Lifecycle


class Durability(Protocol):
    """Whether changes of the store would survive a crash of this process."""

    @property
    def is_synced(self) -> bool:
        """Whether the second copy has every change of the store."""

    async def sync(self) -> None:
        """Wait until the second copy has every change made so far; without a checkpoint if it has.

        Returns as well when the second copy is lost for good.
        """

    def on_synced(self, action: Callable[[], object]) -> None:
        """Call *action* once the second copy has every change made so far, or is lost for good."""

    def close_after_sync(self, fds: list[Fd], uid: int | None = None) -> None:
        """Close descriptors that were taken out of the store, once the second copy has let go of
        theirs.

        Args:
            fds: the descriptors; owned from here on.
            uid: the user whom they count for until they are closed.
        """

    @property
    def journal(self) -> Fd | None:
        """The journal, which a successor reads to learn whether the takeover was completed; None
        if there is none.  It stays the daemon's own.
        """

    @property
    def store(self) -> str | None:
        """The invocation id of the service whose fd store has the second copy (systemd.exec(5))."""

    def confirm(self) -> None:
        """The takeover that this daemon began with is complete: the predecessor has let go."""

    def log_handover(self, handed_over: bool | None) -> None:
        """Write into the journal that a successor owns everything, or does not after all; None
        while that is undecided.
        """

    def release_all(self, quick: Iterable[Fd] = ()) -> None:
        """A successor owns everything: drop the second copy, and record no more changes.

        Args:
            quick: descriptors that are closed without waiting for anybody.
        """


class Unmirrored:
    """The durability of a daemon of which nobody has a second copy: a change is as safe as it gets.

    Args:
        closer: closes what was removed.
    """

    is_synced = True
    journal = store = None

    def __init__(self, closer: ClosePool) -> None:
        self._closer = closer

    async def sync(self) -> None:
        pass

    def on_synced(self, action: Callable[[], object]) -> None:
        action()

    def close_after_sync(self, fds: list[Fd], uid: int | None = None) -> None:
        self._closer.close(fds, uid)

    def confirm(self) -> None:
        pass

    def log_handover(self, handed_over: bool | None) -> None:
        pass

    def release_all(self, quick: Iterable[Fd] = ()) -> None:
        pass


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
    unsent_budget: UnsentBudget
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

    @asynccontextmanager
    async def locked(self) -> AsyncGenerator[None, None]:
        """Hold the store's lock while the block runs.  An uncontended lock is acquired without a
        checkpoint, during which ``async with lock`` would hold it for a pass of the loop.
        """
        try:
            self.lock.acquire_nowait()
        except trio.WouldBlock:
            await self.lock.acquire()
        try:
            yield
        finally:
            self.lock.release()

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
