"""The descriptors that the parent keeps, and how they are closed."""

from __future__ import annotations

import _thread
import os
import socket

#: What the worker's journal is called: without it, the other descriptors mean nothing.
_JOURNAL = b"qmpfd-journal-"

#: The lifeline of a takeover (qmpfd.server.fdstore.evidence), until that is done; and what the old
#: daemon says on it when it goes on with all it had.
_LIFELINE, _REFUSED = b"qmpfd-lifeline", b"x"

#: What a name may consist of: printable ASCII but the colon, which stands between names.
_GOOD_BYTES = bytes({*range(0x20, 0x7F)} - {ord(":")})

#: Closes of a lane that may hang at a time; more wait for one of them.
_MAX_THREADS = 32


def close(number: int) -> None:
    """Close a descriptor; whatever close reports, it is closed (close(2))."""
    try:
        os.close(number)
    except OSError:
        pass


class Lane:
    """Descriptors of one user and one device, which may hang together."""

    def __init__(self) -> None:
        self.waiting: list[tuple[bytes, int]] = []
        self.threads = 0


class SlowCloser:
    """Closes in threads what may hang in its close.

    Args:
        wake: a descriptor that a byte is written to after each close.
    """

    def __init__(self, wake: int) -> None:
        self._wake = wake
        self._lock = _thread.allocate_lock()
        self._lanes: dict[bytes, Lane] = {}
        self._closed: list[bytes] = []
        self._last = -1
        #: Descriptors that are not closed yet.
        self.pending = 0

    def close(self, name: bytes, number: int, lane_name: bytes) -> None:
        """Close a descriptor, some time: whatever hangs in another lane."""
        with self._lock:
            self.pending += 1
            lane = self._lanes.get(lane_name)
            if lane is None:
                lane = self._lanes[lane_name] = Lane()
            lane.waiting.append((name, number))
            if lane.threads == _MAX_THREADS:
                return
            lane.threads += 1
        try:
            _thread.start_new_thread(self._work, (lane_name, lane))
        except RuntimeError:  # no more threads: the next one of the lane does it
            with self._lock:
                lane.threads -= 1

    def close_last(self, number: int) -> None:
        """Close a descriptor as soon as none of the others is open."""
        with self._lock:
            self._last = number
            self._close_last()

    def _close_last(self) -> None:
        if not self.pending and self._last >= 0:
            close(self._last)
            self._last = -1

    def take_closed(self) -> list[bytes]:
        """The names of what has been closed since the last call."""
        with self._lock:
            closed, self._closed = self._closed, []
        return closed

    def _work(self, lane_name: bytes, lane: Lane) -> None:
        while True:
            with self._lock:
                if not lane.waiting:
                    lane.threads -= 1
                    if not lane.threads:
                        self._lanes.pop(lane_name, None)
                    return
                name, number = lane.waiting.pop()
            close(number)
            with self._lock:
                self.pending -= 1
                self._closed.append(name)
                self._close_last()
            try:
                os.write(self._wake, b"\0")
            except OSError:  # full: the parent wakes up anyway
                pass


class Store:
    """The descriptors that are kept, by name.

    Args:
        closer: closes those that may hang.
    """

    def __init__(self, closer: SlowCloser) -> None:
        self._closer = closer
        #: The files of the worker's listening sockets, each as ``DEV:INODE:HEXPATH``.
        self.files: list[bytes] = []
        #: The descriptors by their names.
        self.fds: dict[bytes, int] = {}
        #: Whether there was ever a journal among them.
        self.had_journal = False

    @property
    def has_journal(self) -> bool:
        """Whether a journal says what all the others are."""
        return any(name.startswith(_JOURNAL) for name in self.fds)

    def add(self, name: bytes, number: int) -> None:
        """Keep a descriptor in place of the one of that name; close it where there can be no such
        name.
        """
        if is_good_name(name):
            self.remove(name, None)
            self.fds[name] = number
            self.had_journal = self.had_journal or name.startswith(_JOURNAL)
        else:
            close(number)

    def remove(self, name: bytes, lane: bytes | None) -> None:
        """Close the descriptor of that name, if there is one: at once, or in threads of *lane*."""
        number = self.fds.pop(name, -1)
        if number >= 0:
            if name == _LIFELINE:
                self._closer.close_last(number)
            elif lane is None:
                close(number)
            else:
                self._closer.close(name, number, lane)

    @property
    def lifeline(self) -> int:
        """The lifeline of a takeover that is not known to be done; -1 if there is none."""
        return self.fds.get(_LIFELINE, -1)

    def settle_takeover(self) -> None:
        """The worker died in a takeover, and the lifeline says how that has ended: if the old one
        goes on, close all that is the old daemon's, and then the lifeline, for which it waits.
        """
        sock = socket.socket(fileno=self.lifeline)
        try:
            is_refused = sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == _REFUSED
        except OSError:
            is_refused = False
        finally:
            sock.detach()
        if is_refused:
            self.clear()

    def clear(self) -> None:
        """Close all of them, the lifeline last."""
        for name in sorted(self.fds, key=_LIFELINE.__eq__):
            self.remove(name, b"")

    def remove_files(self) -> None:
        """Remove the files of the worker's listening sockets, unless there is another one at the
        path by now.
        """
        for text in self.files:
            try:
                device, inode, hex_path = text.split(b":")
                path = bytes.fromhex(hex_path.decode("ascii"))
                found = os.lstat(path)
                if (found.st_dev, found.st_ino) == (int(device), int(inode)):
                    os.unlink(path)
            except (OSError, ValueError):
                pass


def is_good_name(name: bytes) -> bool:
    """Whether a descriptor may have that name (sd_pid_notify_with_fds(3), FDNAME)."""
    return 0 < len(name) <= 255 and not name.translate(None, _GOOD_BYTES)
