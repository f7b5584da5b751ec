"""Maps descriptor numbers of this process to names in the fd store."""

from __future__ import annotations

from ...kernel.fd import Fd
from ...kernel.file_descriptions import Descriptions
from .barrier_link import BarrierLink
from .names import EVIDENCE, is_numbered
from .recover import Recovered


class KeptFds:
    """The descriptors in the fd store, by their numbers in this process.

    Args:
        link: connection to the fd store.
        descriptions: finds descriptors of the same open file description (kcmp(2)), of which
            systemd's fd store keeps one only; None with a parent, which keeps all.
    """

    def __init__(self, link: BarrierLink, descriptions: Descriptions | None) -> None:
        self._link = link
        self._descriptions = descriptions
        #: Names in the fd store, by descriptor number.
        self.by_number: dict[int, str] = {}
        # The numbers that share a name: descriptors of one open file description.
        self._resting: dict[str, dict[int, None]] = {}
        self._former: set[str] = set()  # names in the fd store from before this start

    @property
    def names(self) -> int:
        """Number of names in use, including those that are being removed."""
        return len(self._link.names.used)

    @property
    def unnumbered(self) -> int:
        """Number of the predecessor's entries that are neither stored descriptors nor sockets."""
        return sum(not is_numbered(name) for name in self._former)

    def by_name(self) -> dict[str, int]:
        """Return one descriptor number for each name."""
        return {name: number for number, name in self.by_number.items()}

    def claim(self, recovered: Recovered) -> None:
        """Mark the names in the fd store from before this start as in use; remove stale entries
        that stand in the way of new ones.
        """
        self._former = {*recovered.names.values(), *recovered.stale_names}
        for name in self._former:
            self._link.names.claim(name)
        # Entries without a valid journal are removed first: new ones may get the same names.  And
        # sentinels and probes of another process: the new journal needs their places.
        is_valid = recovered.has_state
        first = {name for name in self._former if name.startswith(EVIDENCE) or not is_valid}
        self._link.remove(*first)
        self._former -= first

    def remove_former(self) -> None:
        """Remove unused entries from before this start, once the fd store has all others."""
        self._link.remove(*(self._former - self.by_name().keys()))
        self._former.clear()

    def keep(self, number: int, fd: Fd | int, name: str | None = None) -> str:
        """Store a descriptor in the fd store; return its name there.

        Args:
            number: the descriptor's number.
            fd: the descriptor.
            name: its name if the fd store has it already, or None.
        """
        descriptions = self._descriptions
        if descriptions is not None:
            same = descriptions.find(number)
            if same is not None:
                shared = self.by_number[number] = self.by_number[same]
                self._resting[shared][number] = None
                return shared
            descriptions.add(number)
        if name is None:
            name = self._link.names.take()
            self._link.store(name, fd)
        self.by_number[number] = name
        if descriptions is not None:
            self._resting[name] = {number: None}
        return name

    def discard(self, number: int) -> str | None:
        """Forget a descriptor; return the name to remove, or None if others share the name."""
        name = self.by_number.pop(number)
        if self._descriptions is not None:
            resting = self._resting[name]
            del resting[number]
            other = next(iter(resting), None)
            self._descriptions.replace(number, other)
            if other is not None:
                return None
            del self._resting[name]
        return name

    def clear(self) -> None:
        """Forget all descriptors."""
        self.by_number.clear()
        self._resting.clear()
