"""The daemon's listening sockets in the fd store, and their socket files."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from ..listen.listener import UnixListener
from ..saved_state import SavedListener
from .barrier_link import BarrierLink
from .journal import ListenerAdded, ListenerRemoved
from .journal_writer import JournalWriter
from .kept import KeptFds


class KeptListeners:
    """The listening sockets in the fd store.

    Args:
        link: connection to the fd store.
        kept: the descriptors in the fd store.
        journals: the journals, in which the sockets are recorded.
        has_files: whether the fd store is the parent, which removes the socket files if this
            process cannot.
    """

    def __init__(
        self, link: BarrierLink, kept: KeptFds, journals: JournalWriter, has_files: bool
    ) -> None:
        self._link = link
        self._kept = kept
        self._journals = journals
        self._has_files = has_files
        self._by_number: dict[int, SavedListener] = {}
        self._former: list[str] = []  # names of sockets that are closed in this process

    def add(self, listener: UnixListener, name: str | None) -> None:
        """Store a listening socket in the fd store.

        Args:
            listener: the socket.
            name: its name if the fd store has it already, or None.
        """
        number = listener.socket.fileno()
        self._kept.keep(number, number, name)
        self._by_number[number] = listener.saved
        listener.on_changed = partial(self._changed, listener, number)
        self._journals.note(ListenerAdded(self._kept.by_number[number], listener.saved))

    def records(self) -> Iterator[ListenerAdded]:
        """Make the records of the sockets for a snapshot."""
        for number, saved in self._by_number.items():
            yield ListenerAdded(self._kept.by_number[number], saved)

    def _changed(self, listener: UnixListener, number: int) -> None:
        """Forget the socket at *number*, which was closed: a stored descriptor may get its number;
        or was replaced by another, with another file: then store that one.
        """
        if number not in self._by_number or number not in self._kept.by_number:
            return
        del self._by_number[number]
        self._former.append(self._kept.by_number[number])
        self._kept.discard(number)
        if listener.socket.fileno() >= 0:
            self.add(listener, None)
            self.send_files()
            self.remove_former()

    def send_files(self, *, ours: bool = True) -> None:
        """Send the parent the socket files to remove at its end; none if they are not *ours*."""
        if self._has_files:
            files = [
                f"{saved.file[0]}:{saved.file[1]}:{saved.path.hex()}"
                for saved in self._by_number.values()
                if ours and saved.file and saved.path
            ]
            self._link.queue(f"QMPFD_SOCKETS={' '.join(files)}")

    def remove_former(self) -> None:
        """Remove sockets that are closed in this process from the fd store."""
        for name in self._former:
            self._journals.note(ListenerRemoved(name))
        self._link.remove(*(set(self._former) - self._kept.by_name().keys()))
        self._former.clear()
        self._link.push()
