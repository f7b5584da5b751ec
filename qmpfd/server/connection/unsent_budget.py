"""Replies that their clients have not taken yet: how much of that there is in all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from ...limits import MAX_UNSENT_BYTES


class UnsentBudget:
    """What waits to be sent, of all connections together.

    When it is too much in all, somebody is disconnected: of the user that has the most waiting, the
    connection that has waited for its client the longest.  So neither do those who do not read use
    it up for ever, nor the many of one user for another.
    """

    def __init__(self) -> None:
        # By user, for each connection that waits: bytes, and what disconnects it; oldest first.
        self._waiting: dict[int, dict[object, tuple[int, Callable[[], None]]]] = {}
        self._by_uid: Counter[int] = Counter()

    def begin(self, uid: int, size: int, abort: Callable[[], None]) -> object:
        """Count what a connection begins to wait with; the token is for :meth:`end`.

        Args:
            uid: the user of the connection.
            size: the bytes that wait.
            abort: disconnects it.
        """
        token = object()
        self._waiting.setdefault(uid, {})[token] = size, abort
        self._by_uid[uid] += size
        while self._by_uid.total() > MAX_UNSENT_BYTES and sum(map(len, self._waiting.values())) > 1:
            (greediest, _), *_ = self._by_uid.most_common(1)
            oldest, (_, victim) = next(iter(self._waiting[greediest].items()))
            self.end(greediest, oldest)
            victim()
        return token

    def end(self, uid: int, token: object) -> None:
        """They were sent, or never will be."""
        theirs = self._waiting.get(uid, {})
        self._by_uid[uid] -= theirs.pop(token, (0, None))[0]
        if not theirs:
            self._waiting.pop(uid, None)
            del self._by_uid[uid]
