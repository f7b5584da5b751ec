"""The daemon's listening sockets, which are kept like what is stored, and their files."""

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
        link: the connection to it.
        kept: all descriptors that are kept.
        journals: tell of them.
        has_files: whether the other side is told of the sockets' files, which it removes where this
            process cannot do it any more.
    """

    def __init__(
        self, link: BarrierLink, kept: KeptFds, journals: JournalWriter, has_files: bool
    ) -> None:
        self._link = link
        self._kept = kept
        self._journals = journals
        self._has_files = has_files
        self._by_number: dict[int, SavedListener] = {}

    def add(self, listener: UnixListener, name: str | None) -> None:
        """Have a socket kept.

        Args:
            listener: the socket.
            name: what it is kept as already, if it is.
        """
        number = listener.socket.fileno()
        self._kept.keep(number, number, name)
        self._by_number[number] = listener.saved
        listener.on_replaced = partial(self._replaced, listener)

    def records(self) -> Iterator[ListenerAdded]:
        """What a journal begins with."""
        for number, saved in self._by_number.items():
            yield ListenerAdded(self._kept.by_number[number], saved)

    def _replaced(self, listener: UnixListener) -> None:
        """There is another socket behind the listener's number, and another file at its path."""
        number = listener.socket.fileno()
        if number not in self._by_number or number not in self._kept.by_number:
            return
        self._journals.note(ListenerRemoved(self._kept.by_number[number]))
        former = self._kept.discard(number)
        if former is not None:
            self._link.remove(former)
        self.add(listener, None)
        self._journals.note(ListenerAdded(self._kept.by_number[number], listener.saved))
        self.tell_files()
        self._link.push()

    def tell_files(self, *, ours: bool = True) -> None:
        """Tell the parent which files to remove; none where they are not *ours* any more."""
        if self._has_files and not self._link.is_over:
            files = [
                f"{saved.file[0]}:{saved.file[1]}:{saved.path.hex()}"
                for saved in self._by_number.values()
                if ours and saved.file and saved.path
            ]
            self._link.tell(f"QMPFD_SOCKETS={' '.join(files)}")

    def finish(self) -> None:
        """The daemon ends, and its sockets with it: they may be closed here already."""
        for number in self._by_number:
            if number in self._kept.by_number:
                name = self._kept.by_number[number]
                self._journals.note(ListenerRemoved(name))
                if not self._kept.is_shared(number):
                    self._link.remove(name)
        self._by_number.clear()
        self._link.push()
