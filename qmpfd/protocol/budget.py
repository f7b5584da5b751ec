"""Memory limit that many connections share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable


class Budget:
    """Shared memory limit: of all parsers' incomplete values, or all connections' unsent replies.

    Beyond the limit, one holder has to free its memory: of the owner with the most memory, the
    holder that was charged the longest time ago.  So clients that stop sending or reading cannot
    hold the memory for ever, and many connections of one user cannot take it from another user.

    Args:
        limit: the limit in bytes.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        # By owner: the size charged for each holder, least recently charged first.
        self._charges: dict[Hashable, dict[Callable[[], object], int]] = {}
        self._totals: Counter[Hashable] = Counter()

    def charge(self, give_up: Callable[[], object], owner: Hashable, size: int) -> None:
        """Set the number of bytes that a holder uses; evict holders while the limit is exceeded.

        Args:
            give_up: identifies the holder; called to have it free its memory.
            owner: the user whom the memory counts for.
            size: the number of bytes; 0 if the holder has none.
        """
        holders = self._charges.setdefault(owner, {})
        change = size - holders.pop(give_up, 0)
        self.used += change
        self._totals[owner] += change
        if size:
            holders[give_up] = size
        elif not holders:
            del self._charges[owner], self._totals[owner]
        while self.used > self.limit:
            largest_owner = max(self._charges, key=self._totals.__getitem__)
            victim = next(iter(self._charges[largest_owner]))
            self.charge(victim, largest_owner, 0)
            victim()
