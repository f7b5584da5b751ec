"""Delays before a worker is restarted."""

from __future__ import annotations

#: Seconds until the next start after a worker has died before it served: doubled each time.
FIRST_DELAY, LAST_DELAY = 0.1, 30.0

#: Number of failed starts in a row after which the log gives advice.
MANY_FAILURES = 7

#: A worker that has served for less than SHORT_LIFE seconds is restarted after PAUSE seconds.
SHORT_LIFE, PAUSE = 1.0, 0.02


class Restarts:
    """Time of the next start of a worker, after failures."""

    def __init__(self) -> None:
        #: Time of the next start (time.monotonic()).
        self.at = 0.0
        #: Number of failed starts in a row.
        self.failures = 0

    @property
    def are_many(self) -> bool:
        """Whether MANY_FAILURES starts in a row have failed."""
        return self.failures >= MANY_FAILURES

    def failed(self, now: float) -> float:
        """Count a failed start; return the seconds until the next one."""
        delay = float(min(FIRST_DELAY * 2 ** min(self.failures, 32), LAST_DELAY))
        self.failures += 1
        self.at = now + delay
        return delay

    def served(self, now: float, ready_at: float) -> None:
        """Schedule the next start after the death of a worker that had served since *ready_at*."""
        self.failures = 0
        self.at = now + (PAUSE if now - ready_at < SHORT_LIFE else 0)
