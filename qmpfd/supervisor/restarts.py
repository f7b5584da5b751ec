"""When a worker is started again."""

from __future__ import annotations

#: Seconds until the next start of a worker that died before it served: doubled each time.
FIRST_DELAY, LAST_DELAY = 0.1, 30.0

#: Deaths in a row after which the log says what can be done.
MANY_FAILURES = 7

#: Seconds that a worker serves at least, or it waits for as long before it is started again.
SHORT_LIFE, PAUSE = 1.0, 0.02


class Restarts:
    """The next start, after deaths."""

    def __init__(self) -> None:
        #: When it is (time.monotonic()).
        self.at = 0.0
        #: Starts in a row that have come to nothing.
        self.failures = 0

    @property
    def are_many(self) -> bool:
        """Whether so many have come to nothing that somebody should do something."""
        return self.failures >= MANY_FAILURES

    def failed(self, now: float) -> float:
        """A start has come to nothing; seconds until the next one."""
        delay = float(min(FIRST_DELAY * 2 ** min(self.failures, 32), LAST_DELAY))
        self.failures += 1
        self.at = now + delay
        return delay

    def served(self, now: float, ready_at: float) -> None:
        """A worker is dead that had served since *ready_at*."""
        self.failures = 0
        self.at = now + (PAUSE if now - ready_at < SHORT_LIFE else 0)
