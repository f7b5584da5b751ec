"""Reports stored sockets and pipes whose peer has closed its end.

An epoll of its own is used: Trio's also reports data, which may stay unread for any time.  A
hang-up is reported only after all data has been read, so that the data stays available to a client
that opens the descriptor later (systemd lost such data, its issue 12086).
"""

from __future__ import annotations

import select
from contextlib import suppress
from typing import Generic, TypeVar

from ..errors import GenericError, InvalidParameterValue
from .fd import BorrowedSocket, Fd, poll, unread_bytes
from .fdinfo import access_mode, kind, target

EntryT = TypeVar("EntryT")

#: No event is requested: EPOLLHUP and EPOLLERR are always reported (epoll_ctl(2)); once only,
#: because both conditions last while data is unread.
_ONCE = select.EPOLLONESHOT


class Hangups(Generic[EntryT]):
    """Watched descriptors, each with an entry that its user has given."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._watched: dict[int, EntryT] = {}
        self._draining: set[int] = set()
        #: The descriptors that :meth:`examine` still has to examine.
        self.due: list[int] = []

    def fileno(self) -> int:
        """Return the number of the epoll, which is readable when :meth:`poll` is due; epoll(7)."""
        return self._epoll.fileno()

    @property
    def draining(self) -> bool:
        """Whether descriptors have hung up with unread data, or have a pending error.

        The kernel does not report when the data has been read, or the error fetched, so the caller
        has to poll with :meth:`poll`.
        """
        return bool(self._draining)

    def watch(self, fd: Fd, entry: EntryT) -> None:
        """Watch *fd*; :meth:`examine` will return *entry*.

        Raises:
            InvalidParameterValue: *fd* is no socket or pipe.
            GenericError: epoll_ctl(2) has failed.
        """
        number = fd.fileno()
        # epoll_ctl(2) calls the file's poll operation: a FUSE server may never answer.
        if kind(number, target(number)) not in ("pipe", "socket"):
            raise InvalidParameterValue("Parameter 'watch-hangup' expects sockets or pipes only")
        try:
            self._epoll.register(number, _ONCE)
        except OSError as exc:
            raise GenericError(f"The file descriptor cannot be watched: {exc.strerror}") from None
        self._watched[number] = entry

    def unwatch(self, fd: Fd) -> None:
        """Stop watching *fd*, which must still be open: epoll would report a closed one while the
        sender's duplicate is open, under a number that has been reused.
        """
        number = fd.fileno()
        del self._watched[number]
        self._draining.discard(number)
        with suppress(OSError):  # already out of the epoll
            self._epoll.unregister(number)

    def poll(self) -> None:
        """Poll for hang-ups; call :meth:`examine` next, until nothing is :attr:`due`."""
        self._draining.update(number for number, _ in self._epoll.poll(0))
        self.due = list(self._draining)

    def examine(self, limit: int) -> list[EntryT]:
        """Examine the next *limit* due descriptors; return entries of those read to the end."""
        over = []
        due, self.due = self.due[:limit], self.due[limit:]
        for number in due:
            if number not in self._draining:  # unwatched since poll()
                continue
            events = poll(number)
            if not events:  # a FIFO has a writer again, or a process has fetched the error
                self._epoll.modify(number, _ONCE)
                self._draining.discard(number)
            elif _is_over(number, events):
                over.append(self._watched[number])
        return over

    def close(self) -> None:
        """Close the epoll."""
        self._epoll.close()


def require_peer(fd: Fd) -> None:
    """Refuse a socket that is not connected: poll(2) reports POLLHUP of one that never was, too.

    Raises:
        InvalidParameterValue: *fd* is such a socket, and has no unread data.
    """
    number = fd.fileno()
    if kind(number, target(number)) != "socket" or not _is_over(number, poll(number)):
        return
    try:
        with BorrowedSocket(number) as sock:
            sock.getpeername()
    except OSError:  # ENOTCONN
        raise InvalidParameterValue(
            "Parameter 'watch-hangup' expects connected sockets only"
        ) from None


def _is_over(number: int, events: int) -> bool:
    """Whether the peer has closed its end and all its data was read."""
    # POLLERR means a hang-up only at the write end of a pipe, which has no reader any more: a UDP
    # socket has it after a refused datagram.
    if access_mode(number) == "wronly":
        return True
    if not events & select.POLLHUP:
        return False
    with suppress(OSError):
        return not unread_bytes(number)
    return True
