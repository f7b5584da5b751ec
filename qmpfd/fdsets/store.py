"""fd sets: what ``add-fd``, ``remove-fd`` and ``query-fdsets`` work on.

The rules are those of QEMU's monitor (``qapi/misc.json``: add-fd, remove-fd, query-fdsets, with
the error classes that the commands' specification of 2012 gives them).  Everything that can fail
is in :meth:`FdSets.prepare`; :meth:`FdSets.commit` and :meth:`FdSets.pop` cannot.  The store calls
nobody and closes nothing: its caller knows what was changed, and closes outside the critical
section.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Hashable, Iterable, Iterator
from itertools import islice
from math import inf

from ..errors import InvalidParameterValue
from ..kernel.fd import Fd
from .entry import BATCH, PERMANENT, FdSet, Lifetime, Peer, StoredFd
from .expiry import Expiries
from .ids import IdPool


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

    def iter_stable(self, below: float = inf) -> Iterator[FdSet]:
        """As iteration, but the store may change between two steps: a set that is removed before
        its turn is skipped, and a new one is included where its turn is still to come.
        """
        while True:
            if self._ascending is None:
                self._ascending = sorted(self._sets)
            end = bisect_left(self._ascending, below)
            ahead = self._ascending[max(0, end - BATCH) : end]
            for fdset_id in reversed(ahead):
                fdset = self._sets.get(fdset_id)
                if fdset is not None:
                    yield fdset
            if len(ahead) < BATCH:
                return
            below = ahead[0]

    @property
    def next_id(self) -> int:
        """The id that the next new set gets, if none is named."""
        return self._ids.lowest()

    def get(self, fdset_id: int) -> FdSet | None:
        """The set of that id, if there is one."""
        return self._sets.get(fdset_id)

    def prepare(
        self,
        fds: Iterable[Fd],
        fdset_id: int | None = None,
        opaque: str | None = None,
        added_by: Peer | None = None,
        now: float = 0.0,
        create: bool = False,
        lifetime: Lifetime = PERMANENT,
    ) -> list[StoredFd]:
        """Make the entries of descriptors that are to be stored; nothing is changed yet.

        Args:
            fds: the descriptors.
            fdset_id: the set to join; None for a new set under the lowest free id.
            opaque: the opaque text, a name to find the descriptors by.
            added_by: whose they are.
            now: the time, by the daemon's clock.
            create: create the set of that id where there is none, as QEMU has done since 1.3;
                the specification of the command refuses it.
            lifetime: how long they are kept.

        Raises:
            InvalidParameterValue: *fdset_id* names no set, or none that can be created.
            ValueError: one of the descriptors is closed.
        """
        fdset = None
        if fdset_id is None:
            fdset_id = self._ids.lowest()
        else:
            fdset = self._sets.get(fdset_id)
            if fdset is None:
                if not create:
                    raise InvalidParameterValue("Parameter 'fdset-id' expects an existing fdset-id")
                if fdset_id < 0:
                    raise InvalidParameterValue("Parameter 'fdset-id' expects a non-negative value")
        if fdset is None:
            fdset = FdSet(fdset_id)
        else:  # as they are listed: the oldest first
            now = max(now, fdset.newest_at)
        entries = []
        for fd in fds:
            if fd.number < 0:
                fd.fileno()  # raises ValueError
            entries.append(StoredFd(fd, fdset, opaque, added_by, now, lifetime))
        return entries

    def commit(self, entries: list[StoredFd]) -> None:
        """Store what :meth:`prepare` has made, in the same critical section; owned from here on."""
        for stored in entries:
            fdset, lifetime = stored.fdset, stored.lifetime
            if fdset.id not in self._sets:
                self._sets[fdset.id] = fdset
                self._ascending = None
            fdset.put(stored)
            self._count += 1
            if lifetime is not PERMANENT:
                if lifetime.owner is not None:
                    self._owned.setdefault(lifetime.owner, {})[stored] = None
                if lifetime.expires_at is not None:
                    self.expiries.add(lifetime.expires_at, stored)

    def pop(self, stored: StoredFd) -> None:
        """Take *stored* out of its set: the caller owns it, and closes it.  A set without
        descriptors is gone.
        """
        fdset, lifetime = stored.fdset, stored.lifetime
        stored.removed = True
        self._count -= 1
        if fdset.pop(stored):
            del self._sets[fdset.id]
            self._ascending = None
            self._ids.free(fdset.id)
        if lifetime is not PERMANENT:
            if lifetime.owner is not None:
                owned = self._owned[lifetime.owner]
                del owned[stored]
                if not owned:
                    del self._owned[lifetime.owner]
            if lifetime.expires_at is not None:
                self.expiries.discard()

    def owned_count(self, owner: Hashable) -> int:
        """The number of descriptors that are removed when *owner* ends."""
        return len(self._owned.get(owner, ()))

    def owned(self, owner: Hashable, limit: int | None = None) -> list[StoredFd]:
        """The descriptors that are kept until the end of *owner*, up to *limit* of them."""
        return list(islice(self._owned.get(owner, ()), limit))

    def expired(self, now: float, limit: int | None = None) -> list[StoredFd]:
        """The descriptors that have expired by *now*, in order, up to *limit* of them: the caller
        removes them.
        """
        return list(islice(self.expiries.until(now), limit))

    def drop_all(self) -> list[Fd]:
        """Give up all descriptors, in O(1): the caller owns them.  The store is not used again."""
        fds = [stored.fd for fdset in self._sets.values() for stored in fdset.fds.values()]
        self._sets.clear()
        self._owned.clear()
        self._count = 0
        return fds

    def everything(self) -> list[StoredFd]:
        """All that is stored."""
        return [stored for fdset in self for stored in fdset.fds.values()]
