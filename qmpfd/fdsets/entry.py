"""What is stored: a descriptor, and the fd set that it is in."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from itertools import islice
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


class FdSet:
    """An fd set.

    Args:
        fdset_id: its id.
    """

    # Most sets hold a single descriptor, and a dict of one takes 232 bytes.
    __slots__ = ("_several", "_single", "id", "listing")

    def __init__(self, fdset_id: int) -> None:
        self.id = fdset_id
        #: What a listing says of it, once somebody has asked; None after a change.
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
        """When its newest descriptor was added; minus infinity where it has none."""
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

    def iter_stable(self, until: float) -> Iterator[StoredFd]:
        """Its descriptors that were added up to the time *until*, oldest first.

        The set may change between two steps: what is removed before it is its turn is left out.
        """
        last, with_last = -inf, set[int]()  # when the last one was added, and which were then
        while True:
            rest = (
                stored
                for number, stored in self.fds.items()
                if last < stored.added_at <= until
                or (stored.added_at == last and number not in with_last)
            )
            ahead = list(islice(rest, BATCH))
            for stored in ahead:
                if stored.removed:
                    continue
                if stored.added_at > last:
                    last = stored.added_at
                    with_last.clear()
                with_last.add(stored.fd.fileno())
                yield stored
            if len(ahead) < BATCH:
                return
