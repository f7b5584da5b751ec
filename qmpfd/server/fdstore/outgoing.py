"""What goes to the fd store, collected as the messages that it becomes."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from itertools import islice

from ...kernel.fd import Fd

# The lines of a message, but for the names of the descriptors that it is about.  What hangs up
# stays: whether it may go is for its client to say.
_STORE = "FDSTORE=1\nFDPOLL=0"
REMOVE = "FDSTOREREMOVE=1"


class Outgoing:
    """What is to be sent, and what was sent and is not known to have arrived.

    What is added goes before what is removed, which the journal's reader relies on: so the changes
    of many clients are two messages.

    Args:
        most: names that a message may have.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._texts: deque[str] = deque()  # whole messages, which go first
        self._stores: dict[str, Fd | int] = {}  # what is to be kept, by name
        self._removals: dict[str, str] = {}  # by what name what is to be removed, and by what lines
        self._sent: dict[str, Fd | int] = {}  # what is to be kept, before the barrier

    def __bool__(self) -> bool:
        """Whether there is something to be sent."""
        return bool(self._stores or self._removals or self._texts)

    def tell(self, text: str) -> None:
        """Have a message of its own sent."""
        self._texts.append(text)

    def store(self, name: str, fd: Fd | int) -> None:
        """Have a descriptor kept under *name*."""
        if name in self._removals:  # another one of that name, before this one comes
            self.tell(f"{self._removals.pop(name)}\nFDNAME={name}")
        self._stores[name] = fd

    def remove(self, command: str, name: str) -> bool:
        """Have what is kept under *name* closed there; whether there is something to be sent: not
        where it has not gone yet, and may be closed here before it would.
        """
        if self._stores.pop(name, None) is not None:
            return False
        self._removals[name] = command
        return True

    def messages(self) -> Iterator[tuple[str, list[Fd | int], bool]]:
        """All messages that are to be sent: the lines of each, the descriptors that go with it, and
        whether it is the last.  When the next one is asked for, one was sent.
        """
        texts, stores, removals = self._texts, self._stores, self._removals
        while texts:
            yield texts[0], [], len(texts) == 1 and not (stores or removals)
            texts.popleft()
        while stores:
            names = list(islice(stores, self._most))
            fds = list(map(stores.__getitem__, names))
            is_last = not removals and len(names) == len(stores)
            yield f"{_STORE}\nFDNAME={':'.join(names)}", fds, is_last
            self._sent.update(zip(names, map(stores.pop, names), strict=True))
        while removals:
            first = next(iter(removals.values()))
            names = []
            for name, command in removals.items():
                if command != first or len(names) == self._most:
                    break
                names.append(name)
            yield f"{first}\nFDNAME={':'.join(names)}", [], len(names) == len(removals)
            for name in names:
                del removals[name]
                self._sent.pop(name, None)

    def all_arrived(self) -> None:
        """All that was sent is there."""
        self._sent.clear()

    def lost(self, name: str) -> bool:
        """There was no place for what was sent under *name*: it is sent again, unless it is to be
        removed; whether it is.
        """
        fd = self._sent.pop(name, None)
        if fd is None or name in self._removals:
            return False
        self._stores[name] = fd
        return True

    def clear(self) -> None:
        """Nothing is sent any more."""
        self._texts.clear()
        self._stores.clear()
        self._removals.clear()
        self._sent.clear()
