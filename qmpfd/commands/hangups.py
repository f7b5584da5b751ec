"""Stored sockets and pipes whose other end is watched.

An epoll of our own, because Trio's waits for data as well, which may lie there unread for as long
as its owner likes.  A hang-up does not count while data can still be read: whoever takes the
descriptor out later is to find it (systemd lost such data, its issue 12086).
"""

from __future__ import annotations

import array
import fcntl
import select
import termios

from ..errors import GenericError, InvalidParameterValue
from ..fdsets import StoredFd
from ..kernel.fd import Fd
from ..kernel.fdinfo import access_mode, kind, target


class Hangups:
    """The watched descriptors."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._watched: dict[int, StoredFd | None] = {}
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

    def register(self, fd: Fd) -> None:
        """Begin to watch *fd*; :meth:`watch` or :meth:`cancel` comes next.

        Raises:
            InvalidParameterValue: it is no socket or pipe.
            GenericError: the kernel does not let it be watched.
        """
        number = fd.fileno()
        # epoll_ctl asks whoever implements the file: a FUSE server may never answer.
        if kind(number, target(number)) not in ("pipe", "socket"):
            raise InvalidParameterValue("Parameter 'watch-hangup' expects sockets or pipes only")
        try:
            # No event is asked for: EPOLLHUP and EPOLLERR are always told (epoll_ctl(2)).
            self._epoll.register(number, 0)
        except OSError as exc:
            raise GenericError(f"The file descriptor cannot be watched: {exc.strerror}") from None
        self._watched[number] = None

    def cancel(self, fd: Fd) -> None:
        """Do not watch *fd* after all."""
        self._forget(fd.fileno())

    def watch(self, stored: StoredFd) -> None:
        """The descriptor was stored."""
        self._watched[stored.fd.fileno()] = stored

    def unwatch(self, stored: StoredFd) -> None:
        """The descriptor was taken out of the store.  It is still open: the kernel would go on
        telling of it while the sender's own copy is, under a number that means another by then.
        """
        self._forget(stored.fd.fileno())

    def _forget(self, number: int) -> None:
        del self._watched[number]
        if number in self._draining:
            self._draining.discard(number)
        else:
            self._epoll.unregister(number)

    def look(self) -> None:
        """See whose other end is gone; :meth:`take` comes next, while anything is :attr:`due`."""
        for number, _ in self._epoll.poll(0):
            # Level-triggered, it would be told of again and again while data is left.
            self._epoll.unregister(number)
            self._draining.add(number)
        self.due = list(self._draining)

    def take(self, most: int) -> list[StoredFd]:
        """Those of the next *most* that are due that have been read to the end."""
        over = []
        due, self.due = self.due[:most], self.due[most:]
        for number in due:
            if number not in self._draining:  # removed meanwhile
                continue
            stored = self._watched[number]
            events = _events(number)
            if not events:  # a FIFO that was opened anew, or an error that was told to somebody
                self._draining.discard(number)
                self._epoll.register(number, 0)
            elif stored is not None and _hung_up(number, events) and not _unread(number):
                over.append(stored)
        return over

    def close(self) -> None:
        """Watch nothing any more."""
        self._epoll.close()


def _events(number: int) -> int:
    """What poll(2) says of the descriptor unasked: POLLHUP, POLLERR, both or nothing."""
    poll = select.poll()
    poll.register(number, 0)
    return next((events for _, events in poll.poll(0)), 0)


def _hung_up(number: int, events: int) -> bool:
    """Whether *events* say that the other end is gone.  An error alone does so for the writing
    end of a pipe only: a UDP socket has one when a datagram was refused.
    """
    return bool(events & select.POLLHUP) or access_mode(number) == "wronly"


def _unread(number: int) -> bool:
    """Whether data waits to be read from the descriptor (FIONREAD, ioctl_tty(2), unix(7))."""
    if access_mode(number) == "wronly":  # what is left in this pipe, nobody can read any more
        return False
    count = array.array("i", [0])
    try:
        fcntl.ioctl(number, termios.FIONREAD, count)
    except OSError:
        return False
    return count[0] > 0
