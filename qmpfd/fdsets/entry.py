"""The entries of the store: a descriptor, and the fd set that it is in."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from itertools import islice, takewhile
from math import inf
from typing import NamedTuple

from ..kernel.fd import Fd


class Peer(NamedTuple):
    """Who is at the other end of a connection (SO_PEERCRED, unix(7))."""

    pid: int
    uid: int
    gid: int


@dataclass(frozen=True, slots=True)
class Lifetime:
    """How long a descriptor is kept: until it is removed, or until the first of these.

    Args:
        owner: the connection whose end it is kept until, or None.
        expires_at: the time, by the daemon's clock, or None.
        watch_hangup: until the other end of the socket or pipe is gone.
    """

    owner: Hashable | None = None
    expires_at: float | None = None
    watch_hangup: bool = False


PERMANENT = Lifetime()

#: Entries that ``iter_stable`` copies at a time: a copy costs memory for each listing under way.
BATCH = 512


@dataclass(slots=True, eq=False)
class StoredFd:
    """A descriptor in an fd set.

    Args:
        fd: the descriptor; this is its one owner.
        fdset: the set it is in, or was in before it was removed.
        opaque: the free-form text that its client gave it, or None.
        added_by: the client, or None if it was there from the start.
        added_at: when, by the daemon's clock; not before any older one of its set.
        lifetime: how long it is kept.
        access: how it was opened, once somebody has asked; that never changes (fcntl(2), F_SETFL).
        removed: it was taken out of its set.
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
    """The position of an iteration over the descriptors of a set.

    Args:
        at: when the newest descriptor that it has visited was added.
        numbers: all that it has visited of those that were added then.
    """

    at: float = -inf
    numbers: set[int] = field(default_factory=set)

    def visit(self, stored: StoredFd) -> None:
        """*stored* is visited."""
        if stored.added_at > self.at:
            self.at = stored.added_at
            self.numbers.clear()
        self.numbers.add(stored.fd.fileno())


class FdSet:
    """An fd set."""

    # Most sets hold a single descriptor, and a dict of one takes 232 bytes.
    __slots__ = ("_several", "_single", "id", "listing")

    def __init__(self, fdset_id: int) -> None:
        self.id = fdset_id
        #: The set's part of a query-fdsets reply, cached; None after a change.
        self.listing: bytes | None = None
        self._single: StoredFd | None = None
        self._several: dict[int, StoredFd] | None = None  # then there is no single one

    @property
    def fds(self) -> dict[int, StoredFd]:
        """Its descriptors by number, oldest first."""
        if self._several is not None:
            return self._several
        return {} if self._single is None else {self._single.fd.number: self._single}

    @property
    def newest_at(self) -> float:
        """When its newest descriptor was added; minus infinity if it has none."""
        if self._several is not None:
            return next(reversed(self._several.values())).added_at
        return -inf if self._single is None else self._single.added_at

    def select(self, number: int | None) -> list[StoredFd]:
        """Its descriptor of that *number*, if it is here; None for all, oldest first."""
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
        """Take a descriptor of the set out; whether it was the last."""
        self.listing = None
        if self._several is None:
            self._single = None
            return True
        del self._several[stored.fd.number]
        return not self._several

    def iter_stable(self, until: float, progress: Progress | None = None) -> Iterator[StoredFd]:
        """Its descriptors that were added up to the time *until*, oldest first.

        The set may change between two steps: what is removed before its turn comes is left out.

        Args:
            until: the time, by the daemon's clock.
            progress: where to begin; brought forward before each descriptor is given.
        """
        if progress is None:
            progress = Progress()
        while True:
            ahead = list(islice(self._after(progress, until), BATCH))
            for stored in ahead:
                if not stored.removed:
                    progress.visit(stored)
                    yield stored
            if len(ahead) < BATCH:
                return

    def _after(self, progress: Progress, until: float) -> Iterator[StoredFd]:
        at, seen = progress.at, progress.numbers
        return (
            stored
            for number, stored in self.fds.items()
            if at < stored.added_at <= until or (stored.added_at == at and number not in seen)
        )

    def next_number(self, progress: Progress, until: float) -> int | None:
        """Which descriptor :meth:`iter_stable` would give next; None if there is none any more."""
        stored = next(self._after(progress, until), None)
        return None if stored is None else stored.fd.fileno()

    def progress_before(self, number: int) -> Progress:
        """The progress of an iteration that gives the descriptor *number* next."""
        at = self.fds[number].added_at
        before = takewhile(lambda other: other != number, self.fds)
        return Progress(at, {other for other in before if self.fds[other].added_at == at})
