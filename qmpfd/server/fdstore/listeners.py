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
        self._former: list[str] = []  # names of those that are closed here

    def add(self, listener: UnixListener, name: str | None) -> None:
        """Have a socket kept.

        Args:
            listener: the socket.
            name: what it is kept as already, if it is.
        """
        number = listener.socket.fileno()
        self._kept.keep(number, number, name)
        self._by_number[number] = listener.saved
        listener.on_changed = partial(self._changed, listener, number)
        self._journals.note(ListenerAdded(self._kept.by_number[number], listener.saved))

    def records(self) -> Iterator[ListenerAdded]:
        """What a journal begins with."""
        for number, saved in self._by_number.items():
            yield ListenerAdded(self._kept.by_number[number], saved)

    def _changed(self, listener: UnixListener, number: int) -> None:
        """There is another socket behind the listener's *number*, and another file at its path; or
        it is closed, and what is stored next may get that number.
        """
        if number not in self._by_number or number not in self._kept.by_number:
            return
        del self._by_number[number]
        self._former.append(self._kept.by_number[number])
        self._kept.discard(number)
        if listener.socket.fileno() >= 0:
            self.add(listener, None)
            self.tell_files()
            self.remove_former()

    def tell_files(self, *, ours: bool = True) -> None:
        """Tell the parent which files to remove; none where they are not *ours* any more."""
        if self._has_files and not self._link.is_over:
            files = [
                f"{saved.file[0]}:{saved.file[1]}:{saved.path.hex()}"
                for saved in self._by_number.values()
                if ours and saved.file and saved.path
            ]
            self._link.tell(f"QMPFD_SOCKETS={' '.join(files)}")

    def remove_former(self) -> None:
        """Have those that are closed here closed there too."""
        for name in self._former:
            self._journals.note(ListenerRemoved(name))
        self._link.remove(*(set(self._former) - self._kept.by_name().keys()))
        self._former.clear()
        self._link.push()
