"""Which descriptors are kept under which names."""

from __future__ import annotations

from ...kernel.fd import Fd
from ...kernel.file_descriptions import Descriptions
from .barrier_link import BarrierLink
from .names import PIPES
from .recover import Recovered


class KeptFds:
    """The descriptors in the fd store, by their numbers here, and the names that are in use there.

    Args:
        link: the connection to it.
        descriptions: where the fd store keeps one descriptor of each open file description only,
            what tells which are of the same; None where it keeps all.
    """

    def __init__(self, link: BarrierLink, descriptions: Descriptions | None) -> None:
        self._link = link
        self._descriptions = descriptions
        #: What is kept, by the numbers here.
        self.by_number: dict[int, str] = {}
        # The numbers that rest on a name: all of one open file description.
        self._resting: dict[str, dict[int, None]] = {}
        self._former: set[str] = set()  # names of what is there from before

    @property
    def names(self) -> int:
        """How many names are in use, those included that are being removed."""
        return len(self._link.names.used)

    def by_name(self) -> dict[str, int]:
        """One number of each name that something rests on."""
        return {name: number for number, name in self.by_number.items()}

    def claim(self, recovered: Recovered) -> None:
        """The names of what is there from before are in use; what is stale and stands in the way of
        what is new is removed.
        """
        self._former = {*recovered.names.values(), *recovered.stale_names}
        for name in self._former:
            self._link.names.claim(name)
        # What does not count goes before anything new could have the same names; and pipes, as the
        # journal needs their places.
        is_valid = recovered.has_state
        first = {name for name in self._former if name.startswith(PIPES) or not is_valid}
        self._link.remove(*first)
        self._former -= first

    def remove_former(self) -> None:
        """All is there that is to be kept: remove what is left from before."""
        self._link.remove(*(self._former - self.by_name().keys()))
        self._former.clear()

    def keep(self, number: int, fd: Fd | int, name: str | None = None) -> str:
        """Have a descriptor kept; what it is kept as.

        Args:
            number: of the descriptor.
            fd: the descriptor.
            name: what it is kept as already, if it is.
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
        """A descriptor is kept no longer: the name to remove; None where others rest on it."""
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
        """Nothing is kept any more."""
        self.by_number.clear()
        self._resting.clear()
