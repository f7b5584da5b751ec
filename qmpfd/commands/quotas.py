"""Limits on what the daemon holds for clients: descriptors, opaque texts, passed descriptors."""

from __future__ import annotations

import resource
import weakref
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from math import inf

from ..errors import GenericError
from ..fdsets import Peer, StoredFd
from ..kernel.close_pool import ClosePool
from ..limits import FDS_AT_ONCE, LOOK_INTERVAL, MAX_OPAQUE_PER_UID, MAX_OPAQUE_TOTAL, Limits
from ..policy import is_owner


def memory_size(text: str) -> int:
    """Bytes that *text* takes in memory, at most.

    It depends on nothing but the text: :func:`sys.getsizeof` grows once a text was encoded, and so
    gives back more, or less, than was counted.  One wide character makes all of them wide.
    """
    return len(text) if text.isascii() else 4 * len(text)


def _add(counts: dict[int, int], uid: int, more: int) -> None:
    """Count so many more, or fewer, for *uid*; users with none are forgotten."""
    counts[uid] = left = counts.get(uid, 0) + more
    if not left:
        del counts[uid]


@dataclass(slots=True)
class Quotas:
    """Counts of what the daemon keeps for clients, in all and by user, and their limits.

    Args:
        limits: what each client is allowed.
        clock: the time in seconds, never set back.
        closer: what hangs in its close still takes a place.
        refresh_in_flight: counts what clients have received meanwhile no more as waiting.
    """

    limits: Limits
    clock: Callable[[], float]
    closer: ClosePool
    refresh_in_flight: Callable[[], None] = lambda: None
    fds_total: int = 0  #: descriptors kept, those of ``getfd`` and inherited ones included
    fds_by_uid: dict[int, int] = field(default_factory=dict)
    opaque_total: int = 0  #: bytes of the stored opaque texts, and of names
    opaque_by_uid: dict[int, int] = field(default_factory=dict)
    waiting: int = 0  #: descriptors that no command has yet, and that their clients do not take
    waiting_by_uid: dict[int, int] = field(default_factory=dict)
    waiting_limit: int = field(init=False)  #: of those, and of one user's: half of the table
    refreshed_at: float = -inf  #: when clients were last asked what they have received

    def __post_init__(self) -> None:
        table = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self.limits = self.limits.within(table)
        self.waiting_limit = table // 2

    # -- what is kept ----------------------------------------------------------------------------

    def charge(self, peer: Peer | None, text: str | None, count: int = 1) -> None:
        """Count *count* more descriptors of *peer*, each with that opaque text or name; None if the
        daemon has inherited them.
        """
        self.fds_total += count
        if peer is not None:
            self.fds_by_uid[peer.uid] = self.fds_by_uid.get(peer.uid, 0) + count
        if text:
            self._count_text(peer, count * memory_size(text))

    def refund(self, peer: Peer | None, text: str | None) -> None:
        """Undo :meth:`charge`, of one."""
        self.fds_total -= 1
        if peer is not None:
            _add(self.fds_by_uid, peer.uid, -1)
        if text:
            self._count_text(peer, -memory_size(text))

    def hold(self, holder: object, peer: Peer, texts: Iterable[str]) -> None:
        """Count opaque texts that are stored no more for *peer*, as long as *holder* exists, which
        keeps them in memory: a reply that a client does not read.
        """
        size = sum(map(memory_size, texts))
        self._count_text(peer, size)
        weakref.finalize(holder, self._count_text, peer, -size).atexit = False

    def _count_text(self, peer: Peer | None, size: int) -> None:
        self.opaque_total += size
        if peer is not None:
            _add(self.opaque_by_uid, peer.uid, size)

    def check_quota(
        self, uid: int, count: int, opaque: str | None = None, replaced: Collection[StoredFd] = ()
    ) -> None:
        """Refuse to keep *count* more descriptors for a client of *uid*, each with that opaque
        text, when that is too much.

        Args:
            uid: the client's.
            count: how many.
            opaque: the text of each.
            replaced: what is kept no more in the same step.

        Raises:
            GenericError: naming the limit.
        """
        limits = self.limits
        total = self.fds_total + count
        if (
            total <= self.waiting_limit
            and total <= limits.max_fds_per_uid
            and not (opaque or self.closer.pending_by_uid)
        ):
            return  # as nearly always: nobody has more than there are in all
        gained = 0  # places of this user
        for stored in replaced:
            gained += stored.added_by is not None and stored.added_by.uid == uid
        closing = self.closer.pending_by_uid.get(uid, 0)  # of nobody else: that is their affair
        if self.fds_total + closing + count - len(replaced) > limits.max_fds:
            raise GenericError(f"Too many file descriptors: the limit is {limits.max_fds}")
        if opaque:
            size = memory_size(opaque)
            if self.opaque_total + (count - len(replaced)) * size > MAX_OPAQUE_TOTAL:
                raise GenericError(
                    f"Too much opaque text: the limit is {MAX_OPAQUE_TOTAL} bytes in all"
                )
            total = self.opaque_by_uid.get(uid, 0) + (count - gained) * size
            if total > MAX_OPAQUE_PER_UID and not is_owner(uid):
                raise GenericError(
                    f"Too much opaque text of uid {uid}: the limit is {MAX_OPAQUE_PER_UID} bytes"
                )
        kept = self.fds_by_uid.get(uid, 0) + closing + count - gained
        if kept > limits.max_fds_per_uid or kept > self.waiting_limit:
            most = self.fds_limit(uid)
            if kept > most:
                raise GenericError(f"Too many file descriptors of uid {uid}: the limit is {most}")

    def fds_limit(self, uid: int) -> int:
        """How many descriptors clients of *uid* may have kept: half of the process's table, but for
        root and the daemon's own user, as others have to find room as well.
        """
        most = self.limits.max_fds_per_uid
        return most if is_owner(uid) else min(most, self.waiting_limit)

    # -- what waits in connections ---------------------------------------------------------------

    def fds_at_once(self) -> int:
        """How many descriptors a connection may take before the first of their commands is carried
        out: one, where the table may be full before that, and what is removed makes room.
        """
        full = self.fds_total + self.waiting + FDS_AT_ONCE > self.limits.max_fds
        return 1 if full else FDS_AT_ONCE

    def charge_waiting(self, uid: int, more: int) -> None:
        """So many descriptors more, or fewer, wait in connections of *uid*."""
        self.waiting += more
        _add(self.waiting_by_uid, uid, more)

    def check_waiting(self, uid: int, more: int) -> None:
        """Refuse to let *more* descriptors wait in a connection of *uid* when that is too much.

        Root and the daemon's own user may have all that is left.  Every other user may have as
        many as are left free after that, and no more: one has half of what may wait in all, each
        of two a third, and some are left for whoever comes next.

        Raises:
            GenericError: it is.
        """
        refused = self._refused_waiting(uid, more)
        if refused and self.clock() - self.refreshed_at > LOOK_INTERVAL:
            self.refreshed_at = self.clock()
            self.refresh_in_flight()
            refused = self._refused_waiting(uid, more)
        if refused:
            raise GenericError(refused)

    def _refused_waiting(self, uid: int, more: int) -> str:
        free = self.waiting_limit - self.waiting - more
        theirs = self.waiting_by_uid.get(uid, 0) + self.closer.pending_by_uid.get(uid, 0) + more
        if theirs > free and not is_owner(uid):
            return (
                f"Too many file descriptors of uid {uid} wait in its connections: "
                f"the limit is {(theirs + free) // 2}"
            )
        if free < 0:
            return (
                f"Too many file descriptors wait in connections: the limit is {self.waiting_limit}"
            )
        return ""
