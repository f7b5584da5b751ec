"""Quotas of clients: stored descriptors, opaque texts, descriptors pending in connections."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from math import inf

from ..errors import GenericError
from ..fdsets import Peer, StoredFd
from ..kernel.close_pool import ClosePool
from ..kernel.credentials import is_owner
from ..kernel.fd import open_files_limit
from ..limits import (
    FDS_AT_ONCE,
    MAX_OPAQUE_PER_UID,
    MAX_OPAQUE_TOTAL,
    REFRESH_INTERVAL,
    Limits,
    left_to_others,
)


def memory_size(text: str) -> int:
    """Return the maximum memory of *text* in bytes; one wide character makes all of them wide.

    The result is the same for charge and refund.  That of :func:`sys.getsizeof` is not: it grows
    when the text is encoded for the first time.
    """
    return len(text) if text.isascii() else 4 * len(text)


def _add(counts: dict[int, int], uid: int, more: int) -> None:
    """Add *more*, which may be negative, to the count of *uid*; delete a count of 0."""
    counts[uid] = left = counts.get(uid, 0) + more
    if not left:
        del counts[uid]


@dataclass(slots=True)
class Quotas:
    """Counts what the daemon holds for clients, in all and by user, and checks the limits.

    Args:
        limits: the configured limits.
        clock: returns the time in seconds, monotonic.
        closer: counts the descriptors whose close is pending: they count for the quotas too.
        refresh_in_flight: refunds the descriptors that clients have received since the last call.
    """

    limits: Limits
    clock: Callable[[], float]
    closer: ClosePool
    refresh_in_flight: Callable[[], None] = lambda: None
    fds_total: int = 0  #: stored descriptors, those of ``getfd`` and inherited ones included
    fds_by_uid: dict[int, int] = field(default_factory=dict)
    opaque_total: int = 0  #: bytes of the stored opaque texts and names
    opaque_by_uid: dict[int, int] = field(default_factory=dict)
    waiting: int = 0  #: received descriptors without a command, and sent ones not yet received
    waiting_by_uid: dict[int, int] = field(default_factory=dict)
    waiting_limit: int = field(init=False)  #: half of RLIMIT_NOFILE, in all and by user
    others_table: int = field(init=False)  #: numbers of descriptors from which on users are refused
    refreshed_at: float = -inf  #: time of the last refresh_in_flight()
    _usual_limit: int = field(init=False)  # of descriptors, for every user

    def __post_init__(self) -> None:
        table = open_files_limit()
        self.limits = self.limits.within(table)
        self.waiting_limit = table // 2
        self.others_table = left_to_others(table)
        self._usual_limit = min(self.limits.max_fds_per_uid, left_to_others(self.limits.max_fds))

    def check_table(self, uid: int, number: int) -> None:
        """Check that the descriptor table has room for one more descriptor of a user.

        Args:
            uid: the user.
            number: number of the descriptor that this process has just got for it.  The kernel
                gives the lowest free one (POSIX, "File Descriptor Allocation"), so all below it
                are in use.

        Raises:
            GenericError: only the part that is left for root and the daemon's own user is free.
        """
        if number >= self.others_table and not is_owner(uid):
            raise GenericError(f"Too many open files: the limit is {self.others_table}")

    # -- stored descriptors and texts ------------------------------------------------------------

    def charge(self, peer: Peer | None, text: str | None, count: int = 1) -> None:
        """Count *count* more descriptors of *peer*, or inherited ones (None), each with the opaque
        text or name *text*.
        """
        self.fds_total += count
        if peer is not None:
            self.fds_by_uid[peer.uid] = self.fds_by_uid.get(peer.uid, 0) + count
        if text:
            self._count_text(peer, count * memory_size(text))

    def refund(self, peer: Peer | None, text: str | None) -> None:
        """Undo :meth:`charge` for one descriptor."""
        self.fds_total -= 1
        if peer is not None:
            _add(self.fds_by_uid, peer.uid, -1)
        if text:
            self._count_text(peer, -memory_size(text))

    def charge_until_freed(self, holder: object, peer: Peer, texts: Iterable[str]) -> None:
        """Count opaque texts of removed descriptors for *peer* as long as *holder* exists: a reply,
        which keeps them in memory until the client has read it.
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
        """Check the quotas for *count* more descriptors of a client.

        Args:
            uid: the client's user.
            count: number of descriptors.
            opaque: the opaque text of each.
            replaced: the entries that are removed in the same step.

        Raises:
            GenericError: a quota is exceeded; the text names the limit.
        """
        limits = self.limits
        total = self.fds_total + count
        if (
            total <= self.waiting_limit
            and total <= self._usual_limit
            and not (opaque or self.closer.pending_by_uid)
        ):
            return  # the usual case: no user has more than the total
        freed = 0  # replaced descriptors of this user
        for stored in replaced:
            freed += stored.added_by is not None and stored.added_by.uid == uid
        closing = self.closer.pending_by_uid.get(uid, 0)  # other users' do not count for this one
        most, most_text = limits.max_fds, MAX_OPAQUE_TOTAL
        if not is_owner(uid):
            most, most_text = left_to_others(most), left_to_others(most_text)
        if self.fds_total + closing + count - len(replaced) > most:
            raise GenericError(f"Too many file descriptors: the limit is {most}")
        if opaque:
            size = memory_size(opaque)
            if self.opaque_total + (count - len(replaced)) * size > most_text:
                raise GenericError(f"Too much opaque text: the limit is {most_text} bytes in all")
            total = self.opaque_by_uid.get(uid, 0) + (count - freed) * size
            if total > MAX_OPAQUE_PER_UID and not is_owner(uid):
                raise GenericError(
                    f"Too much opaque text of uid {uid}: the limit is {MAX_OPAQUE_PER_UID} bytes"
                )
        held = self.fds_by_uid.get(uid, 0) + closing + count - freed
        if held > limits.max_fds_per_uid or held > self.waiting_limit:
            limit = self.fds_limit(uid)
            if held > limit:
                raise GenericError(f"Too many file descriptors of uid {uid}: the limit is {limit}")

    def fds_limit(self, uid: int) -> int:
        """Return how many descriptors the clients of *uid* may store.

        At most half of RLIMIT_NOFILE, so that other users find room too; root and the daemon's own
        user are exempt.
        """
        limit = self.limits.max_fds_per_uid
        return limit if is_owner(uid) else min(limit, self.waiting_limit)

    # -- descriptors pending in connections ------------------------------------------------------

    def fds_at_once(self) -> int:
        """Return how many descriptors a connection may receive before it executes their commands.

        One if the descriptor table may become full: the commands may remove descriptors first.
        """
        full = self.fds_total + self.waiting + FDS_AT_ONCE > self.limits.max_fds
        return 1 if full else FDS_AT_ONCE

    def charge_waiting(self, uid: int, more: int) -> None:
        """Add *more*, which may be negative, to the descriptors pending in connections of *uid*."""
        self.waiting += more
        _add(self.waiting_by_uid, uid, more)

    def check_waiting(self, uid: int, more: int) -> None:
        """Check the quota for *more* pending descriptors in a connection of *uid*.

        Root and the daemon's own user may use all that is free.  Any other user may have as many as
        remain free afterwards: one user gets half of the limit, each of two a third, and some are
        always free for the next user.

        Raises:
            GenericError: the quota is exceeded; the text names the limit.
        """
        refused = self._refused_waiting(uid, more)
        if refused and self.clock() - self.refreshed_at > REFRESH_INTERVAL:
            self.refreshed_at = self.clock()
            self.refresh_in_flight()
            refused = self._refused_waiting(uid, more)
        if refused:
            raise GenericError(refused)

    def _refused_waiting(self, uid: int, more: int) -> str:
        free = self.waiting_limit - self.waiting - more
        held = self.waiting_by_uid.get(uid, 0) + self.closer.pending_by_uid.get(uid, 0) + more
        if held > free and not is_owner(uid):
            return (
                f"Too many file descriptors of uid {uid} wait in its connections: "
                f"the limit is {(held + free) // 2}"
            )
        if free < 0:
            return (
                f"Too many file descriptors wait in connections: the limit is {self.waiting_limit}"
            )
        return ""
