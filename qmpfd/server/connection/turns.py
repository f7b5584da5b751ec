"""Turns: whoever asks for much does not hold up those who ask for little.

A client that asks now and then is served at once.  One that has used up its share of the loop's
time queues, with all others of its kind, for a turn that only one of them has at a time: however
many they are, between two of their turns everybody else is served.
"""

from __future__ import annotations

from heapq import heappop, heappush
from itertools import count
from time import monotonic, thread_time

import trio

from ...limits import (
    FIRST_TURN_SECONDS,
    LAP_SECONDS,
    MOST_USED_SECONDS,
    PATIENCE,
    SHARE,
    SHARE_SECONDS,
    TURN_SECONDS,
)

#: Seconds in which so little happens that it does not matter whose they are.
_MOMENT = 0.0002


class Turns:
    """The queue of those who have used up their share; who has used the least is next."""

    def __init__(self) -> None:
        self.cpu = _Cpu()
        self._queue: list[tuple[float, int, trio.Event]] = []
        self._numbers = count()  # of equals, the first to come
        self._busy = False

    @property
    def length(self) -> float:
        """Seconds that a turn may take: the shorter, the more wait for theirs."""
        return min(TURN_SECONDS, LAP_SECONDS / (len(self._queue) + 1))

    async def wait(self, used: float) -> None:
        """Wait for a turn.

        Args:
            used: the time that the client has used, or will have; who has the least is next.
        """
        if self._busy:
            turn = trio.Event()
            heappush(self._queue, (used, next(self._numbers), turn))
            try:
                await turn.wait()
            except trio.Cancelled:
                if turn.is_set():
                    self._pass_on()
                else:
                    self._queue = [entry for entry in self._queue if entry[2] is not turn]
                    self._queue.sort()
                raise
        self._busy = True
        try:
            # Whoever is next gets it when this is over: not in the same pass of the loop.
            await trio.lowlevel.checkpoint()
        finally:
            self._pass_on()

    def _pass_on(self) -> None:
        if self._queue:
            heappop(self._queue)[2].set()
        else:
            self._busy = False


class _Cpu:
    """The CPU time of the loop's thread.  Asking the kernel for it takes long, so what a moment ago
    it was is good enough.
    """

    def __init__(self) -> None:
        self._asked_at = 0.0
        self._seconds = 0.0

    def lately(self, now: float) -> float:
        """What it was, at most a moment ago: no more than it is."""
        if now - self._asked_at > _MOMENT:
            return self.exactly(now)
        return self._seconds

    def exactly(self, now: float) -> float:
        """What it is."""
        self._asked_at, self._seconds = now, thread_time()
        return self._seconds


class Share:
    """What one client has of the loop's time.

    Args:
        turns: where it queues once that is used up.
    """

    __slots__ = ("_began", "_cpu", "_turns", "_used", "ends", "in_turn")

    def __init__(self, turns: Turns) -> None:
        self._turns = turns
        self._used = 0.0  # seconds, beyond what it may use
        self._began = monotonic()
        self._cpu = turns.cpu.lately(self._began)
        #: When it is used up, if the client goes on being served.
        self.ends = self._began + SHARE_SECONDS
        #: Nobody else has a turn now: it may take its time.
        self.in_turn = False

    @property
    def over(self) -> bool:
        """Whether it is used up."""
        return monotonic() > self.ends

    def pause(self) -> None:
        """The client is not being served: it is waited for."""
        now = monotonic()
        used = now - self._began
        if used > _MOMENT:
            # Not all that passed on the clock: the machine may have been busy with something else.
            used = min(used, self._turns.cpu.exactly(now) - self._cpu)
        self._used = min(self._used + used, MOST_USED_SECONDS)
        self._began = now

    def resume(self) -> None:
        """It is being served; since :meth:`pause` its share has grown."""
        now = monotonic()
        self._used = max(0.0, self._used - (now - self._began) * SHARE)
        self._began = now
        self._cpu = self._turns.cpu.lately(now)
        self.ends = now + SHARE_SECONDS - self._used
        self.in_turn = False

    async def next_turn(self, *, much: bool = False) -> None:
        """Wait for a turn.  That is no rest: what was used stays used.

        Args:
            much: there is enough to do for a whole one.  Those who may be done sooner go first, and
                have only a part of one as long as they have used little: or else two hundred
                clients that come at once held up one who asks for little for as many turns.
        """
        self.pause()
        used = self._used
        expected = used + TURN_SECONDS if much else used
        # Whoever has waited for long goes before those who have just come.
        await self._turns.wait(expected + self._began * PATIENCE)
        self._began = monotonic()
        self._cpu = self._turns.cpu.lately(self._began)
        most = self._turns.length if much else min(self._turns.length, used)
        self.ends = self._began + max(FIRST_TURN_SECONDS, most)
        self.in_turn = much
