"""Queue of changes for the fd store, and the messages made of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from itertools import islice

from ...kernel.fd import FileDescriptorLike
from .names import PROBE

# Lines of a message, without FDNAME=.  systemd watches what it stores, unless FDPOLL=0, and removes
# it when it hangs up: but only its client may remove a stored descriptor.  Probes never hang up.
_STORE_WATCHED = "FDSTORE=1"
_STORE = f"{_STORE_WATCHED}\nFDPOLL=0"
REMOVE = "FDSTOREREMOVE=1"


class Outgoing:
    """Changes to be sent, and changes sent but not acknowledged.

    Descriptors to store are sent before names to remove, whoever made which change first: the
    changes of many clients become two messages.  The reader of the journal relies on that order.

    Args:
        most: maximum number of names in a message.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._texts: deque[str] = deque()  # complete messages, sent first
        self._stores: dict[str, FileDescriptorLike] = {}  # descriptors to store, by name
        self._removals: dict[str, str] = {}  # names to remove, each with the lines of its message
        self._sent: dict[str, FileDescriptorLike] = {}  # sent but not acknowledged, by name

    def __bool__(self) -> bool:
        """Whether changes are pending."""
        return bool(self._stores or self._removals or self._texts)

    def queue(self, text: str) -> None:
        """Queue a complete message."""
        self._texts.append(text)

    @property
    def last(self) -> str | None:
        """Name of the last descriptor to store; None if there is none."""
        return next(reversed(self._stores), None)

    def store(self, name: str, fd: FileDescriptorLike) -> None:
        """Queue a descriptor to be stored under *name*."""
        if name in self._removals:  # the removal must be sent before the new one of that name
            self.queue(f"{self._removals.pop(name)}\nFDNAME={name}")
        self._stores[name] = fd

    def remove(self, command: str, name: str) -> bool:
        """Queue the removal of *name*; return False if its descriptor was not sent yet: then
        neither is sent, as the descriptor may be closed here before.
        """
        if self._stores.pop(name, None) is not None:
            return False
        self._removals[name] = command
        return True

    def messages(self) -> Iterator[tuple[str, list[FileDescriptorLike], bool]]:
        """Iterate over the messages to send: lines, descriptors, whether the message is the last.
        Asking for the next message confirms that the one before was sent.
        """
        texts, stores, removals = self._texts, self._stores, self._removals
        while texts:
            yield texts[0], [], len(texts) == 1 and not (stores or removals)
            texts.popleft()
        while stores:
            names = list(islice(stores, self._most))
            fds = list(map(stores.__getitem__, names))
            is_last = not removals and len(names) == len(stores)
            store = _STORE_WATCHED if names[0].startswith(PROBE) else _STORE
            yield f"{store}\nFDNAME={':'.join(names)}", fds, is_last
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
        """Note that the fd store has acknowledged every message sent."""
        self._sent.clear()

    def lost(self, name: str) -> bool:
        """Queue a descriptor again that the parent had no room for, unless its removal is queued;
        return whether it is queued again.
        """
        fd = self._sent.pop(name, None)
        if fd is None or name in self._removals:
            return False
        self._stores[name] = fd
        return True

    def clear(self) -> None:
        """Discard all pending and unacknowledged changes."""
        self._texts.clear()
        self._stores.clear()
        self._removals.clear()
        self._sent.clear()
