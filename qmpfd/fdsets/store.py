"""fd sets: what ``add-fd``, ``remove-fd`` and ``query-fdsets`` work on.

The rules are those of QEMU's monitor (``qapi/misc.json``: add-fd, remove-fd, query-fdsets, with
the error classes that the commands' specification of 2012 gives them).  Everything that can fail
does so before anything is changed, and nothing is closed here: what has to be closed is returned,
so that it can be done outside the critical section.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from ..errors import FdNotFound, InvalidParameterValue
from ..fd import Fd
from .ids import IdPool


@dataclass(slots=True, eq=False)
class StoredFd:
    """A descriptor in an fd set.

    Args:
        fd: the descriptor; this is its one owner.
        opaque: the free-form text that its client gave it, or None.
    """

    fd: Fd
    opaque: str | None = None


@dataclass(slots=True, eq=False)
class FdSet:
    """An fd set: its descriptors by number, oldest first."""

    id: int
    fds: dict[int, StoredFd] = field(default_factory=dict)


class FdSets:
    """All fd sets of a daemon."""

    def __init__(self) -> None:
        self._sets: dict[int, FdSet] = {}
        self._ids = IdPool(self._sets)
        self._count = 0

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

    def get(self, fdset_id: int) -> FdSet:
        """The set of that id.

        Raises:
            FdNotFound: there is none.
        """
        try:
            return self._sets[fdset_id]
        except KeyError:
            raise FdNotFound(f"File descriptor named 'fdset-id:{fdset_id}' not found") from None

    def add(
        self,
        fd: Fd,
        fdset_id: int | None = None,
        opaque: str | None = None,
        *,
        create: bool = False,
    ) -> FdSet:
        """Take over *fd* and store it; the set it is in.

        Args:
            fd: the descriptor; it stays the caller's when this raises.
            fdset_id: the set to join; None for a new set under the lowest free id.
            opaque: a free-form text to find the descriptor by.
            create: create the set of that id where there is none, as QEMU has done since 1.3;
                the specification of the command refuses it.

        Raises:
            InvalidParameterValue: *fdset_id* names no set, or none that can be created.
        """
        number = fd.fileno()
        if fdset_id is None:
            fdset_id = self._ids.lowest()
        elif fdset_id not in self._sets:
            if not create:
                raise InvalidParameterValue("Parameter 'fdset-id' expects an existing fdset-id")
            if fdset_id < 0:
                raise InvalidParameterValue("Parameter 'fdset-id' expects a non-negative value")
        fdset = self._sets.get(fdset_id)
        if fdset is None:
            fdset = self._sets[fdset_id] = FdSet(fdset_id)
        fdset.fds[number] = StoredFd(fd, opaque)
        self._count += 1
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
        if fdset is None or (number is not None and number not in fdset.fds):
            which = "" if number is None else f", fd:{number}"
            raise FdNotFound(f"File descriptor named 'fdset-id:{fdset_id}{which}' not found")
        if number is None:
            removed = list(fdset.fds.values())
            fdset.fds.clear()
        else:
            removed = [fdset.fds.pop(number)]
        self._count -= len(removed)
        if not fdset.fds:
            del self._sets[fdset_id]
            self._ids.free(fdset_id)
        return removed

    def clear(self) -> list[StoredFd]:
        """Take out everything: the caller owns it, and closes it."""
        removed = [stored for fdset in self for stored in fdset.fds.values()]
        self._sets.clear()
        self._ids = IdPool(self._sets)
        self._count = 0
        return removed
