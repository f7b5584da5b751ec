"""Entries of the store: fd sets and the descriptors in them."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from itertools import islice, takewhile
from math import inf
from typing import NamedTuple

from ..kernel.fd import Fd


class Peer(NamedTuple):
    """Credentials of a connection's client (SO_PEERCRED, unix(7))."""

    pid: int
    uid: int
    gid: int


@dataclass(frozen=True, slots=True)
class Lifetime:
    """When a descriptor is removed without a command: at the first of these events.

    Args:
        owner: the connection whose end removes the descriptor, or None.
        expires_at: the time of expiry, by the daemon's clock, or None.
        watch_hangup: whether a hang-up of the socket's or pipe's peer removes the descriptor.
    """

    owner: Hashable | None = None
    expires_at: float | None = None
    watch_hangup: bool = False


PERMANENT = Lifetime()

#: Entries that ``iter_stable`` copies at a time: each listing in progress holds such a copy.
BATCH = 512


@dataclass(slots=True, eq=False)
class StoredFd:
    """A descriptor in an fd set.

    Args:
        fd: the descriptor; this entry is its only owner.
        fdset: the set that contains the descriptor, or did before it was removed.
        opaque: the free-form text that the client gave, or None.
        added_by: the client that added it, or None for a descriptor added at start-up.
        added_at: time of addition, by the daemon's clock; never decreases within a set.
        lifetime: when the descriptor is removed without a command.
        access: cached access mode, None until first queried; F_SETFL (fcntl(2)) cannot change it.
        removed: whether the entry was removed from its set.
    """

    fd: Fd
    fdset: FdSet
    opaque: str | None
    added_by: Peer | None
    added_at: float
    lifetime: Lifetime
    access: str | None = None
    removed: bool = False


@dataclass(slots=True)
class Progress:
    """Position of an iteration over the descriptors of a set.

    Args:
        at: time of addition of the newest visited descriptor.
        numbers: numbers of all visited descriptors that were added at that time.
    """

    at: float = -inf
    numbers: set[int] = field(default_factory=set)

    def visit(self, stored: StoredFd) -> None:
        """Mark *stored* as visited."""
        if stored.added_at > self.at:
            self.at = stored.added_at
            self.numbers.clear()
        self.numbers.add(stored.fd.fileno())


class FdSet:
    """An fd set."""

    # Most sets hold one descriptor, which needs no dict: a dict of one entry takes 232 bytes.
    __slots__ = ("_several", "_single", "id", "listing")

    def __init__(self, fdset_id: int) -> None:
        self.id = fdset_id
        #: The set's part of a query-fdsets reply, cached; None after a change.
        self.listing: bytes | None = None
        self._single: StoredFd | None = None
        self._several: dict[int, StoredFd] | None = None  # if set, _single is None

    @property
    def fds(self) -> dict[int, StoredFd]:
        """The set's descriptors by number, oldest first."""
        if self._several is not None:
            return self._several
        return {} if self._single is None else {self._single.fd.number: self._single}

    @property
    def newest_at(self) -> float:
        """Time of addition of the newest descriptor; minus infinity for an empty set."""
        if self._several is not None:
            return next(reversed(self._several.values())).added_at
        return -inf if self._single is None else self._single.added_at

    def select(self, number: int | None) -> list[StoredFd]:
        """Return the descriptor *number*, if it is in the set; all, oldest first, for None."""
        single, several = self._single, self._several
        if several is not None:
            if number is None:
                return list(several.values())
            return [several[number]] if number in several else []
        if single is None or (number is not None and single.fd.number != number):
            return []
        return [single]

    def put(self, stored: StoredFd) -> None:
        """Add a descriptor."""
        self.listing = None
        if self._several is not None:
            self._several[stored.fd.number] = stored
        elif self._single is None:
            self._single = stored
        else:
            both = self._single, stored
            self._several = {each.fd.number: each for each in both}
            self._single = None

    def pop(self, stored: StoredFd) -> bool:
        """Remove a descriptor of the set; return whether the set is empty now."""
        self.listing = None
        if self._several is None:
            self._single = None
            return True
        del self._several[stored.fd.number]
        return not self._several

    def iter_stable(self, until: float, progress: Progress | None = None) -> Iterator[StoredFd]:
        """Yield the descriptors that were added up to the time *until*, oldest first.

        The set may change between two steps: a descriptor removed before its turn is skipped.

        Args:
            until: the time, by the daemon's clock.
            progress: where to begin; advanced before each descriptor is yielded.
        """
        if progress is None:
            progress = Progress()
        while True:
            batch = list(islice(self._after(progress, until), BATCH))
            for stored in batch:
                if not stored.removed:
                    progress.visit(stored)
                    yield stored
            if len(batch) < BATCH:
                return

    def _after(self, progress: Progress, until: float) -> Iterator[StoredFd]:
        at, seen = progress.at, progress.numbers
        return (
            stored
            for number, stored in self.fds.items()
            if at < stored.added_at <= until or (stored.added_at == at and number not in seen)
        )

    def next_number(self, progress: Progress, until: float) -> int | None:
        """Return the number that :meth:`iter_stable` would yield next; None if it would end."""
        stored = next(self._after(progress, until), None)
        return None if stored is None else stored.fd.fileno()

    def progress_before(self, number: int) -> Progress:
        """Return the progress of an iteration that yields the descriptor *number* next."""
        at = self.fds[number].added_at
        before = takewhile(lambda other: other != number, self.fds)
        return Progress(at, {other for other in before if self.fds[other].added_at == at})
