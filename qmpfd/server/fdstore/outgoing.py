"""What goes to the fd store, collected as the messages that it becomes."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from ...kernel.fd import Fd
from ...kernel.systemd import Notifier

# The lines of a message, but for the names of the descriptors that it is about.  What hangs up
# stays: whether it may go is for its client to say.
_STORE = "FDSTORE=1\nFDPOLL=0"
REMOVE = "FDSTOREREMOVE=1"


class Batch(NamedTuple):
    """What goes as one message.

    Args:
        command: its lines, but for the names.
        fds: the names that it is about, each with its descriptor if it is to be kept.
    """

    command: str
    fds: dict[str, Fd | int | None]

    def send(self, notifier: Notifier, sync_line: str) -> None:
        """Send it; errors are those of :meth:`Notifier.send`."""
        about = f"\nFDNAME={':'.join(self.fds)}" if self.fds else ""
        fds = [fd for fd in self.fds.values() if fd is not None]
        notifier.send(f"{self.command}{about}{sync_line}", fds)


class Outgoing:
    """What is to be sent, and what was sent and is not known to have arrived.

    Args:
        most: names that a message may have.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._batches: deque[Batch] = deque()
        self._unsent: dict[str, Batch] = {}  # where what is to be kept is, by name
        self._sent: dict[str, Fd | int | None] = {}  # what is to be kept, before the barrier

    def __len__(self) -> int:
        """How many messages are to be sent."""
        return len(self._batches)

    @property
    def first(self) -> Batch:
        """What is to be sent next."""
        return self._batches[0]

    def store(self, name: str, fd: Fd | int) -> None:
        """Have a descriptor kept under *name*."""
        batches = self._batches
        at = len(batches) - 1
        if at >= 0 and self._most > 1:
            last = batches[at]
            if last.command is REMOVE and name not in last.fds:
                # What is added goes before what is removed, which the journal's reader relies on,
                # and the changes of many clients are two messages.
                at -= 1
        self._unsent[name] = self._put(at, _STORE, name, fd)

    def remove(self, command: str, name: str) -> bool:
        """Have what is kept under *name* closed there; whether there is something to be sent."""
        if self.withdraw(name):
            return False
        self._put(len(self._batches) - 1, command, name, None)
        return True

    def withdraw(self, name: str) -> bool:
        """Do not send what has not gone yet, and may be closed here before it would; whether that
        was so.
        """
        batch = self._unsent.pop(name, None)
        if batch is None:
            return False
        del batch.fds[name]
        if not batch.fds:
            self._batches.remove(batch)
        return True

    def _put(self, at: int, command: str, name: str, fd: Fd | int | None) -> Batch:
        """Have one more descriptor sent, or removed there: with the message *at* that place if that
        is possible, or behind it.
        """
        batch = self._batches[at] if at >= 0 else None
        if batch is None or batch.command != command or len(batch.fds) == self._most:
            batch = Batch(command, {})
            self._batches.insert(at + 1, batch)
        batch.fds[name] = fd
        return batch

    def tell(self, text: str, fds: dict[str, Fd | int | None] | None = None) -> None:
        """Have a message of its own sent."""
        self._batches.append(Batch(text, fds or {}))

    def first_was_sent(self) -> None:
        """Go on to the next message."""
        batch = self._batches.popleft()
        if batch.command == _STORE:
            self._sent |= batch.fds
            for name in batch.fds:
                del self._unsent[name]
        elif self._sent:
            for name in batch.fds:
                self._sent.pop(name, None)

    def all_arrived(self) -> None:
        """All that was sent is there."""
        self._sent.clear()

    def lost(self, name: str) -> bool:
        """There was no place for what was sent under *name*: it is sent again, unless it is to be
        removed; whether it is.
        """
        fd = self._sent.pop(name, None)
        if fd is None or any(name in batch.fds for batch in self._batches):
            return False
        self.store(name, fd)
        return True

    def clear(self) -> None:
        """Nothing is sent any more."""
        self._batches.clear()
        self._unsent.clear()
        self._sent.clear()
