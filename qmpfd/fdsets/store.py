"""fd sets: what ``add-fd``, ``remove-fd`` and ``query-fdsets`` work on.

The rules are those of QEMU's monitor (``qapi/misc.json``: add-fd, remove-fd, query-fdsets, with
the error classes that the commands' specification of 2012 gives them).  Everything that can fail
does so before anything is changed, and nothing is closed here: what has to be closed is returned,
so that it can be done outside the critical section.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from itertools import islice
from math import inf
from typing import NamedTuple, Protocol

from ..errors import FdNotFound, InvalidParameterValue
from ..kernel.fd import Fd
from .expiry import Expiries
from .ids import IdPool


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

#: What the two ``iter_stable`` look ahead; more would be memory for each of
#: many that are under way.
_BATCH = 512


@dataclass(slots=True, eq=False)
class StoredFd:
    """A descriptor in an fd set.

    Args:
        fd: the descriptor; this is its one owner.
        fdset: the set it is in; None once it was removed.
        opaque: the free-form text that its client gave it, or None.
        added_by: the client, or None if it was there from the start.
        added_at: when, by the daemon's clock; not before any older one of its set.
        lifetime: how long it is kept.
        access: how it was opened, once somebody has asked; that never changes (fcntl(2), F_SETFL).
    """

    fd: Fd
    fdset: FdSet | None
    opaque: str | None
    added_by: Peer | None
    added_at: float
    lifetime: Lifetime
    access: str | None = None


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
            ahead = list(islice(rest, _BATCH))
            for stored in ahead:
                if stored.fdset is not self:
                    continue
                if stored.added_at > last:
                    last = stored.added_at
                    with_last.clear()
                with_last.add(stored.fd.fileno())
                yield stored
            if len(ahead) < _BATCH:
                return


class Observer(Protocol):
    """Who is told of changes, inside the critical section."""

    def added(self, fdset: FdSet, stored: StoredFd) -> None:
        """*stored* is now in *fdset*."""

    def removed(self, fdset: FdSet, stored: StoredFd, reason: str) -> None:
        """*stored* is no longer in *fdset*."""


class FdSets:
    """All fd sets of a daemon."""

    def __init__(self) -> None:
        self._sets: dict[int, FdSet] = {}
        self._ids = IdPool(self._sets)
        self._ascending: list[int] | None = None  # the ids, once somebody has asked
        self._count = 0
        self._owned: dict[Hashable, dict[StoredFd, None]] = {}
        #: The descriptors that are kept for a time only.
        self.expiries = Expiries()
        #: Who is told of changes, or None.
        self.observer: Observer | None = None

    def __len__(self) -> int:
        """How many fd sets there are."""
        return len(self._sets)

    @property
    def fd_count(self) -> int:
        """How many descriptors are stored."""
        return self._count

    def __iter__(self) -> Iterator[FdSet]:
        """The sets by descending id, the order in which QEMU lists them."""
        for fdset_id in sorted(self._sets, reverse=True):
            yield self._sets[fdset_id]

    def iter_stable(self) -> Iterator[FdSet]:
        """As iteration, but there may be changes between two steps: a set that goes before it is
        its turn is left out, and one that comes is given if its turn is still to come.
        """
        below: float = inf
        while True:
            if self._ascending is None:
                self._ascending = sorted(self._sets)
            end = bisect_left(self._ascending, below)
            ahead = self._ascending[max(0, end - _BATCH) : end]
            for fdset_id in reversed(ahead):
                fdset = self._sets.get(fdset_id)
                if fdset is not None:
                    yield fdset
            if len(ahead) < _BATCH:
                return
            below = ahead[0]

    @property
    def next_id(self) -> int:
        """The id that the next new set gets, if none is named."""
        return self._ids.lowest()

    def get(self, fdset_id: int, number: int | None = None) -> FdSet:
        """The set of that id, in which the descriptor *number* is, if one is named.

        Raises:
            FdNotFound: there is no such set, or no such descriptor in it.
        """
        fdset = self._sets.get(fdset_id)
        if fdset is None or (number is not None and not fdset.select(number)):
            raise _not_found(fdset_id, number)
        return fdset

    def add(
        self,
        fd: Fd,
        fdset_id: int | None = None,
        opaque: str | None = None,
        added_by: Peer | None = None,
        now: float = 0.0,
        create: bool = False,
        lifetime: Lifetime = PERMANENT,
    ) -> FdSet:
        """Take over *fd* and store it; the set it is in.

        Args:
            fd: the descriptor; it stays the caller's when this raises.
            fdset_id: the set to join; None for a new set under the lowest free id.
            opaque: a free-form text to find the descriptor by.
            added_by: whose it is.
            now: the time, by the daemon's clock.
            create: create the set of that id where there is none, as QEMU has done since 1.3;
                the specification of the command refuses it.
            lifetime: how long it is kept.

        Raises:
            InvalidParameterValue: *fdset_id* names no set, or none that can be created.
        """
        fd.fileno()  # it is open
        fdset = None
        if fdset_id is None:
            fdset_id = self._ids.take()
        else:
            fdset = self._sets.get(fdset_id)
            if fdset is None:
                if not create:
                    raise InvalidParameterValue("Parameter 'fdset-id' expects an existing fdset-id")
                if fdset_id < 0:
                    raise InvalidParameterValue("Parameter 'fdset-id' expects a non-negative value")
        if fdset is None:
            fdset = self._sets[fdset_id] = FdSet(fdset_id)
            self._ascending = None
        else:  # as they are listed: the oldest first
            now = max(now, next(reversed(fdset.fds.values())).added_at)
        stored = StoredFd(fd, fdset, opaque, added_by, now, lifetime)
        fdset.put(stored)
        self._count += 1
        if lifetime is not PERMANENT:
            if lifetime.owner is not None:
                self._owned.setdefault(lifetime.owner, {})[stored] = None
            if lifetime.expires_at is not None:
                self.expiries.add(lifetime.expires_at, stored)
        if self.observer is not None:
            self.observer.added(fdset, stored)
        return fdset

    def remove(self, fdset_id: int, number: int | None = None) -> list[StoredFd]:
        """Take one descriptor, or all, out of a set; a set without descriptors is gone.

        Args:
            fdset_id: the set.
            number: the descriptor; None for all in the set.

        Returns:
            What was removed: the caller owns it, and closes it.

        Raises:
            FdNotFound: no such set, or no such descriptor in it.
        """
        fdset = self._sets.get(fdset_id)
        removed = fdset.select(number) if fdset is not None else []
        if not removed:
            raise _not_found(fdset_id, number)
        for stored in removed:
            self.pop(stored, "removed")
        return removed

    def pop(self, stored: StoredFd, reason: str) -> None:
        """Take *stored* out of its set: the caller owns it, and closes it.

        Args:
            stored: a descriptor that is in a set.
            reason: why, as watchers are told.
        """
        fdset = stored.fdset
        assert fdset is not None
        stored.fdset = None
        self._count -= 1
        if fdset.pop(stored):
            del self._sets[fdset.id]
            self._ascending = None
            self._ids.free(fdset.id)
        lifetime = stored.lifetime
        if lifetime is not PERMANENT:
            if lifetime.owner is not None:
                owned = self._owned[lifetime.owner]
                del owned[stored]
                if not owned:
                    del self._owned[lifetime.owner]
            if lifetime.expires_at is not None:
                self.expiries.discard()
        if self.observer is not None:
            self.observer.removed(fdset, stored, reason)

    def owned_count(self, owner: Hashable) -> int:
        """How many descriptors are kept until the end of *owner*."""
        return len(self._owned.get(owner, ()))

    def remove_owned(self, owner: Hashable, most: int | None = None) -> list[StoredFd]:
        """Take out what is kept until the end of *owner*: the caller closes it.

        Args:
            owner: the connection.
            most: how many descriptors; None for all.
        """
        removed = list(islice(self._owned.get(owner, ()), most))
        for stored in removed:
            self.pop(stored, "connection")
        return removed

    def remove_expired(self, now: float, most: int | None = None) -> list[StoredFd]:
        """Take out what is kept until *now* or less: the caller closes it.

        Args:
            now: the time, by the daemon's clock.
            most: how many descriptors; None for all.
        """
        removed = list(islice(self.expiries.until(now), most))
        for stored in removed:
            self.pop(stored, "expired")
        return removed

    def clear(self) -> list[StoredFd]:
        """Take out everything, at the daemon's end: the caller closes it."""
        removed = [stored for fdset in self for stored in fdset.fds.values()]
        for stored in removed:
            self.pop(stored, "removed")
        return removed


def _not_found(fdset_id: int, number: int | None) -> FdNotFound:
    which = "" if number is None else f", fd:{number}"
    return FdNotFound(f"File descriptor named 'fdset-id:{fdset_id}{which}' not found")
