"""Store of fd sets, which ``add-fd``, ``remove-fd`` and ``query-fdsets`` work on.

The rules are those of QEMU's monitor (``qapi/misc.json``: add-fd, remove-fd, query-fdsets, with
the error classes of the commands' specification of 2012).  Everything that can fail is in
:meth:`FdSets.prepare`; :meth:`FdSets.commit` and :meth:`FdSets.pop` cannot fail.  The store makes
no callbacks and closes no descriptors: the caller closes them outside the critical section.
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
        self._ascending: list[int] | None = None  # cache of the sorted ids
        self._count = 0
        self._owned: dict[Hashable, dict[StoredFd, None]] = {}
        #: The descriptors that have a time of expiry.
        self.expiries = Expiries()

    def __len__(self) -> int:
        """Number of fd sets."""
        return len(self._sets)

    @property
    def fd_count(self) -> int:
        """Number of stored descriptors."""
        return self._count

    def __iter__(self) -> Iterator[FdSet]:
        """Yield the sets by descending id, the order in which QEMU lists them."""
        for fdset_id in sorted(self._sets, reverse=True):
            yield self._sets[fdset_id]

    def iter_stable(self, below: float = inf) -> Iterator[FdSet]:
        """Yield the sets below an id, by descending id; the store may change between two steps.

        A set removed before its turn is skipped; a new set is included if its turn is to come.
        """
        while True:
            if self._ascending is None:
                self._ascending = sorted(self._sets)
            end = bisect_left(self._ascending, below)
            batch = self._ascending[max(0, end - BATCH) : end]
            for fdset_id in reversed(batch):
                fdset = self._sets.get(fdset_id)
                if fdset is not None:
                    yield fdset
            if len(batch) < BATCH:
                return
            below = batch[0]

    @property
    def next_id(self) -> int:
        """Id of the next new set for which the client names no id."""
        return self._ids.lowest()

    def get(self, fdset_id: int) -> FdSet | None:
        """Return the set with the id *fdset_id*, or None."""
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
        """Create entries for descriptors, without changing the store.

        Args:
            fds: the descriptors.
            fdset_id: the set to add to; None for a new set under the lowest free id.
            opaque: free-form text, a name to find the descriptors by.
            added_by: the client that adds them.
            now: the time, by the daemon's clock.
            create: whether to create a set of that id if none exists, as QEMU has done since 1.3;
                the specification of the command refuses an unknown id.
            lifetime: when the descriptors are removed without a command.

        Raises:
            InvalidParameterValue: *fdset_id* names no set, and none can be created.
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
        else:  # added_at never decreases within a set, even if the clock goes back
            now = max(now, fdset.newest_at)
        entries = []
        for fd in fds:
            if fd.number < 0:
                fd.fileno()  # raises ValueError
            entries.append(StoredFd(fd, fdset, opaque, added_by, now, lifetime))
        return entries

    def commit(self, entries: list[StoredFd]) -> None:
        """Store the entries that :meth:`prepare` created in the same critical section.

        The store owns the descriptors from here on.
        """
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
        """Remove *stored* from its set, and the set if it is empty now.

        The caller owns the descriptor from here on.
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
        """Return the number of descriptors that are removed when *owner* ends."""
        return len(self._owned.get(owner, ()))

    def owned(self, owner: Hashable, limit: int | None = None) -> list[StoredFd]:
        """Return up to *limit* of the descriptors that are removed when *owner* ends."""
        return list(islice(self._owned.get(owner, ()), limit))

    def expired(self, now: float, limit: int | None = None) -> list[StoredFd]:
        """Return up to *limit* of the descriptors that have expired by *now*, in order of expiry.

        The caller has to remove each with :meth:`pop`.
        """
        return list(islice(self.expiries.pop_expired(now), limit))

    def drop_all(self) -> list[Fd]:
        """Empty the store and return all descriptors, which the caller owns from here on.

        The store cannot be used again.
        """
        fds = [stored.fd for fdset in self._sets.values() for stored in fdset.fds.values()]
        self._sets.clear()
        self._owned.clear()
        self._count = 0
        return fds

    def everything(self) -> list[StoredFd]:
        """Return the entries of all stored descriptors."""
        return [stored for fdset in self for stored in fdset.fds.values()]
