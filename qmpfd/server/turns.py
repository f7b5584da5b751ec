"""Turns: whoever asks for much does not hold up those who ask for little.

A client that asks now and then is served at once.  One that has used up its share of the loop's
time queues, with all others of its kind, for a turn that only one of them has at a time: however
many they are, between two of their turns everybody else is served.
"""

from __future__ import annotations

from time import monotonic

import trio

from ..limits import SHARE, SHARE_SECONDS, TURN_SECONDS


class Turns:
    """The queue of those who have used up their share."""

    def __init__(self) -> None:
        self._lock = trio.Lock()  # first come, first served

    async def wait(self) -> None:
        """Wait for a turn."""
        async with self._lock:
            # Whoever is next gets the lock when this is over: not in the same pass of the loop.
            await trio.lowlevel.checkpoint()


class Share:
    """What one client has of the loop's time.

    Args:
        turns: where it queues once that is used up.
    """

    __slots__ = ("_ends", "_left", "_paused_at", "_turns")

    def __init__(self, turns: Turns) -> None:
        self._turns = turns
        self._left = SHARE_SECONDS
        self._paused_at = monotonic()
        self._ends = self._paused_at + self._left

    @property
    def over(self) -> bool:
        """Whether it is used up."""
        return monotonic() > self._ends

    def pause(self) -> None:
        """The client is not being served: it is waited for."""
        now = monotonic()
        self._left = self._ends - now
        self._paused_at = now

    def resume(self) -> None:
        """It is being served; since :meth:`pause` its share has grown."""
        now = monotonic()
        self._ends = now + min(SHARE_SECONDS, self._left + (now - self._paused_at) * SHARE)

    async def next_turn(self) -> None:
        """Wait for a turn."""
        await self._turns.wait()
        self._ends = monotonic() + TURN_SECONDS
