"""Reports stored sockets and pipes whose other end was closed.

An epoll of our own, because Trio's waits for data as well, which may lie there unread for as long
as its owner likes.  A hang-up does not count while data can still be read: whoever takes the
descriptor out later is to find it (systemd lost such data, its issue 12086).
"""

from __future__ import annotations

import array
import fcntl
import select
import termios
from contextlib import suppress
from typing import Generic, TypeVar

from ..errors import GenericError, InvalidParameterValue
from .fd import Fd
from .fdinfo import access_mode, kind, target

EntryT = TypeVar("EntryT")

#: No event is asked for: EPOLLHUP and EPOLLERR are always told (epoll_ctl(2)).  Once, or they would
#: be told again and again while data is left.
_ONCE = select.EPOLLONESHOT


class Hangups(Generic[EntryT]):
    """The watched descriptors, each with an entry of whoever watches it."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._watched: dict[int, EntryT] = {}
        self._draining: set[int] = set()
        #: Those that :meth:`take` still has to look at.
        self.due: list[int] = []

    def fileno(self) -> int:
        """Readable when :meth:`look` may see something; see epoll(7)."""
        return self._epoll.fileno()

    @property
    def draining(self) -> bool:
        """Whether there are descriptors whose other end is gone and that hold unread data: nothing
        tells when it has been read, so :meth:`look` has to be asked now and then.  So it is with
        a pending error that is no hang-up.
        """
        return bool(self._draining)

    def watch(self, fd: Fd, entry: EntryT) -> None:
        """Begin to watch *fd*; :meth:`take` gives *entry*.

        Raises:
            InvalidParameterValue: it is no socket or pipe.
            GenericError: the kernel does not let it be watched.
        """
        number = fd.fileno()
        # epoll_ctl asks whoever implements the file: a FUSE server may never answer.
        if kind(number, target(number)) not in ("pipe", "socket"):
            raise InvalidParameterValue("Parameter 'watch-hangup' expects sockets or pipes only")
        try:
            self._epoll.register(number, _ONCE)
        except OSError as exc:
            raise GenericError(f"The file descriptor cannot be watched: {exc.strerror}") from None
        self._watched[number] = entry

    def unwatch(self, fd: Fd) -> None:
        """Watch *fd* no more.  It has to be open still: the kernel would go on telling of it while
        the sender's own copy is, under a number that means another by then.
        """
        number = fd.fileno()
        del self._watched[number]
        self._draining.discard(number)
        with suppress(OSError):  # an epoll that has lost it tells of it no more either
            self._epoll.unregister(number)

    def look(self) -> None:
        """Poll for hang-ups; call :meth:`take` next, as long as anything is :attr:`due`."""
        self._draining.update(number for number, _ in self._epoll.poll(0))
        self.due = list(self._draining)

    def take(self, limit: int) -> list[EntryT]:
        """Those of the next *limit* that are due that have been read to the end."""
        over = []
        due, self.due = self.due[:limit], self.due[limit:]
        for number in due:
            if number not in self._draining:  # removed meanwhile
                continue
            events = _events(number)
            if not events:  # a FIFO that was opened anew, or an error that was told to somebody
                self._epoll.modify(number, _ONCE)
                self._draining.discard(number)
            elif _is_over(number, events):
                over.append(self._watched[number])
        return over

    def close(self) -> None:
        """Stop watching everything."""
        self._epoll.close()


def _events(number: int) -> int:
    """The events that poll(2) always reports: POLLHUP, POLLERR, both or none."""
    poll = select.poll()
    poll.register(number, 0)
    return next((events for _, events in poll.poll(0)), 0)


def _is_over(number: int, events: int) -> bool:
    """Whether the other end is gone, and all that it has sent was read."""
    # An error alone says so of the writing end of a pipe only: a UDP socket has one when a datagram
    # was refused.  What is left in that pipe, nobody can read any more.
    if access_mode(number) == "wronly":
        return True
    if not events & select.POLLHUP:
        return False
    count = array.array("i", [0])
    with suppress(OSError):  # FIONREAD: ioctl_tty(2), unix(7)
        fcntl.ioctl(number, termios.FIONREAD, count)
    return count[0] == 0
