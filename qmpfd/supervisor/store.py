"""The parent's fd store, and the threads that close descriptors which may block."""

from __future__ import annotations

import _thread
import os
import socket

#: Prefix of the name of the worker's journal: without it, the other descriptors cannot be restored.
_JOURNAL = b"qmpfd-journal-"

#: Name of the lifeline during a takeover (qmpfd.server.fdstore.handover); and the predecessor's
#: message on it that the takeover has failed.
_LIFELINE, _REFUSED = b"qmpfd-lifeline", b"x"

#: Bytes valid in a name: printable ASCII without the colon, which separates names.
_GOOD_BYTES = bytes({*range(0x20, 0x7F)} - {ord(":")})

#: Maximum number of threads of a lane; more descriptors wait for one of them.
_MAX_THREADS = 32


def close(number: int) -> None:
    """Close a descriptor, and ignore errors: Linux closes it in any case (close(2))."""
    try:
        os.close(number)
    except OSError:
        pass


class Lane:
    """Descriptors of one user and one device, whose closes may hang together."""

    def __init__(self) -> None:
        self.waiting: list[tuple[bytes, int]] = []
        self.threads = 0


class SlowCloser:
    """Closes, in threads, descriptors whose close may hang.

    Args:
        wake: a descriptor to which a byte is written after each close.
    """

    def __init__(self, wake: int) -> None:
        self._wake = wake
        self._lock = _thread.allocate_lock()
        self._lanes: dict[bytes, Lane] = {}
        self._closed: list[bytes] = []
        self._last = -1
        #: Number of descriptors that are not closed yet.
        self.pending = 0

    def close(self, name: bytes, number: int, lane_name: bytes) -> None:
        """Close a descriptor in a thread of its lane; :meth:`take_closed` then has *name*."""
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
        except RuntimeError:  # no thread can be started: the next thread of the lane closes it
            with self._lock:
                lane.threads -= 1

    def close_last(self, number: int) -> None:
        """Close a descriptor once all others are closed."""
        with self._lock:
            self._last = number
            self._close_last()

    def _close_last(self) -> None:
        if not self.pending and self._last >= 0:
            close(self._last)
            self._last = -1

    def take_closed(self) -> list[bytes]:
        """Return the names of the descriptors closed since the last call."""
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
            except OSError:  # the pipe is full: the parent wakes up anyway
                pass


class Store:
    """The stored descriptors, by name.

    Args:
        closer: closes descriptors whose close may hang.
    """

    def __init__(self, closer: SlowCloser) -> None:
        self._closer = closer
        #: The files of the worker's listening sockets, each as ``DEV:INODE:HEXPATH``.
        self.files: list[bytes] = []
        #: The descriptors by their names.
        self.fds: dict[bytes, int] = {}
        #: Whether a journal was ever stored.
        self.had_journal = False

    @property
    def has_journal(self) -> bool:
        """Whether a journal is stored, which describes the other descriptors."""
        return any(name.startswith(_JOURNAL) for name in self.fds)

    def add(self, name: bytes, number: int) -> None:
        """Store a descriptor in place of a former one; close it if *name* is invalid."""
        if is_good_name(name):
            self.remove(name, None)
            self.fds[name] = number
            self.had_journal = self.had_journal or name.startswith(_JOURNAL)
        else:
            close(number)

    def remove(self, name: bytes, lane: bytes | None) -> None:
        """Close the descriptor of that name, if stored: at once, or in a thread of *lane*."""
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
        """The lifeline of a takeover that is not confirmed; -1 if there is none."""
        return self.fds.get(_LIFELINE, -1)

    def settle_takeover(self) -> None:
        """Read the outcome of a takeover in which the worker died from the lifeline.  If the
        predecessor goes on, close its descriptors and then the lifeline: it waits for that EOF.
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
        """Close all descriptors, the lifeline last."""
        for name in sorted(self.fds, key=_LIFELINE.__eq__):
            self.remove(name, b"")

    def remove_files(self) -> None:
        """Remove the files of the worker's listening sockets, unless another file has replaced
        them.
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
    """Return whether *name* is valid (sd_pid_notify_with_fds(3), FDNAME=)."""
    return 0 < len(name) <= 255 and not name.translate(None, _GOOD_BYTES)
