"""Closes descriptors without blocking the event loop.

Descriptors whose close cannot block (:mod:`.close_risk`) are closed at once; all others by threads,
and whoever needs to know when that is done is told.
"""

from __future__ import annotations

import _thread
import os
import threading
from collections import deque
from collections.abc import Callable, Container, Hashable, Iterable
from dataclasses import dataclass, field
from time import monotonic

from .close_risk import CloseRisks, Risk
from .fd import Fd, FileDescriptorLike, close_all, fileno

#: Threads that may hang in a close at a time, of each lane.  More descriptors wait, open.
_MAX_THREADS = 32

#: Seconds that a descriptor stays open here at most because a duplicate is not closed yet.
_MAX_WAIT = 1.0

_NO_RISK = Risk.NONE  # found faster than a member of an enumeration


class Duplicate(Fd):
    """A duplicate of another descriptor here: :class:`ClosePool` closes that one after it.

    Args:
        original: the other one.

    Raises:
        OSError: this process is out of descriptors.
    """

    __slots__ = ("original",)

    def __init__(self, original: Fd) -> None:
        super().__init__(os.dup(original.fileno()))
        self.original = original


class Closing:
    """Descriptors that threads close for one caller."""

    __slots__ = ("_callbacks", "_left", "_lock")

    def __init__(self, count: int, lock: threading.Lock) -> None:
        self._left = count
        self._lock = lock
        self._callbacks: list[Callable[[], object]] = []

    @property
    def is_done(self) -> bool:
        """Whether all of them are closed."""
        return not self._left

    def when_done(self, callback: Callable[[], object]) -> None:
        """Have *callback* called once all of them are closed: by a thread, or here if they are."""
        with self._lock:
            if self._left:
                self._callbacks.append(callback)
                return
        callback()

    def _closed_one(self) -> list[Callable[[], object]]:
        """One more is closed, and the lock is held: what is to be called now."""
        self._left -= 1
        return [] if self._left else self._callbacks


@dataclass(slots=True, eq=False)
class _Lane:
    """Descriptors that count for one user, are of one device, and wait for a thread.

    Args:
        uid: the user; None for the daemon itself.
    """

    uid: int | None
    waiting: deque[tuple[Fd, list[threading.Event], Closing]] = field(default_factory=deque)
    threads: int = 0


class ClosePool:
    """Closes descriptors: at once those that cannot block, the others in threads.

    Each user has threads of its own, and of these each device or file system: a close that hangs
    holds up no other.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lanes: dict[Hashable, _Lane] = {}
        #: How many closes are under way, or wait for a thread, by the user whom they count for.
        self.pending_by_uid: dict[int | None, int] = {}
        self._when_idle: list[Callable[[], object]] = []
        self._after: dict[Fd, list[threading.Event]] = {}  # what each is closed after
        self._deferred: set[Fd] = set()  # threads are to close them
        self._quick: set[Fd] = set()  # known not to block; their close comes next
        self._risks = CloseRisks()
        #: Whether closing a descriptor may block, see :meth:`.CloseRisks.find`.
        self.risk = self._risks.find
        #: Whether closing a duplicate waits for nobody.
        self.is_quick_duplicate = self._risks.is_quick_duplicate

    def shut_down(self) -> None:
        """The daemon ends: closes under way go on, and no more are asked for."""
        self._risks.close()

    @property
    def pending(self) -> int:
        """The number of closes that run, or wait for a thread."""
        return sum(list(self.pending_by_uid.values()))

    def when_idle(self, callback: Callable[[], object]) -> None:
        """Have *callback* called once no close is under way: by a thread, or here if none is."""
        with self._lock:
            if self.pending_by_uid:
                self._when_idle.append(callback)
                return
        callback()

    def close(self, fds: Iterable[Fd], uid: int | None = None) -> Closing | None:
        """Close each of *fds*; returns at once.

        Args:
            fds: the descriptors; owned from here on.
            uid: the user whom those count for, until they are closed, that count for no other;
                None for the daemon itself.

        Returns:
            What tells when all are closed; None where they are already.
        """
        deferred: list[tuple[Risk, Fd]] = []
        for fd in fds:
            number = fd.number
            if number < 0:
                continue
            if fd in self._quick:
                self._quick.discard(fd)
                if fd not in self._after:
                    fd.close()
                    continue
            if isinstance(fd, Duplicate) and self._is_open(fd.original):
                self._close_duplicate(fd, uid)
                continue
            try:
                risk = self.risk(number)
            except OSError:  # out of descriptors, or a name that is too long
                risk = Risk.HIGH
            if risk is _NO_RISK and fd not in self._after:
                fd.close()
            else:
                deferred.append((risk, fd))
        return self._close_in_threads(deferred, uid) if deferred else None

    def _is_open(self, fd: Fd) -> bool:
        """Whether nobody has asked for the close of *fd* yet."""
        return fd.number >= 0 and fd not in self._deferred

    def _close_duplicate(self, fd: Duplicate, uid: int | None) -> None:
        """Close what is not the last of its file here."""
        if self.is_quick_duplicate(fd.number):
            fd.close()
            return
        closed = threading.Event()
        self.close_after(fd.original, closed)
        self._close_in_threads([(Risk.HIGH, fd)], uid).when_done(closed.set)

    def may_block(self, fd: FileDescriptorLike) -> bool:
        """Whether the close of a descriptor may take long, of this one or of a duplicate.  Where it
        cannot, the next :meth:`close` does not find out once more.
        """
        try:
            risk = self.risk(fileno(fd))
        except OSError:
            return True
        if risk is _NO_RISK and isinstance(fd, Fd):
            self._quick.add(fd)
        return risk is Risk.HIGH

    def lane(self, fd: FileDescriptorLike, uid: int | None = None) -> str:
        """What may hang together with a descriptor: those of the same device that count for the
        same user; for another process that closes a duplicate of it.
        """
        found = self._risks.status(fileno(fd))
        return f"{uid}:{found and found[4:]}"

    def close_after(self, fd: Fd, closed: threading.Event) -> None:
        """Close *fd*, once that is asked for, after its duplicate elsewhere.

        Args:
            fd: a descriptor whose close may block, so that a thread closes it.
            closed: is set when the duplicate is closed.
        """
        before = self._after.get(fd, ())
        self._after[fd] = [closed, *(event for event in before if not event.is_set())]

    def close_duplicates(self, fds: Iterable[Fd], quick: Container[Fd] = ()) -> None:
        """Close descriptors of files that another process has open as well.

        Args:
            fds: the descriptors; owned from here on.
            quick: those of which :meth:`is_quick_duplicate` is known to be true.
        """
        at_once: list[Fd] = []
        others: list[Fd] = []
        for fd in fds:
            is_quick = fd in quick or self.is_quick_duplicate(fd.fileno())
            (at_once if is_quick else others).append(fd)
        close_all(at_once)
        self.close(others)

    def _close_in_threads(self, fds: list[tuple[Risk, Fd]], uid: int | None) -> Closing:
        closing = Closing(len(fds), self._lock)
        status = self._risks.status
        to_start: dict[Hashable, _Lane] = {}
        with self._lock:
            for risk, fd in fds:
                payer = uid if fd.uid is None else fd.uid
                self.pending_by_uid[payer] = self.pending_by_uid.get(payer, 0) + 1
                found = status(fd.number)
                key: Hashable = (payer, risk, found and found[4:])
                lane = self._lanes.get(key)
                if lane is None:
                    lane = self._lanes[key] = _Lane(payer)
                lane.waiting.append((fd, self._after.pop(fd, []), closing))
                self._deferred.add(fd)
                to_start[key] = lane
            # And those for which no thread could be started before.
            to_start |= {key: lane for key, lane in self._lanes.items() if not lane.threads}
        for key, lane in to_start.items():
            self._start_thread(key, lane)
        return closing

    def _start_thread(self, key: Hashable, lane: _Lane) -> None:
        """Have one more thread for *lane*, if there may be one and there is something to close."""
        with self._lock:
            if lane.threads == _MAX_THREADS or not lane.waiting:
                return
            lane.threads += 1
        try:
            # Not threading.Thread: its start waits until the thread runs, which can take
            # milliseconds.  The process may end while a close hangs.
            _thread.start_new_thread(self._work, (key, lane))
        except RuntimeError:  # no more threads: those there are, or the next one, will do it
            with self._lock:
                lane.threads -= 1

    def _work(self, key: Hashable, lane: _Lane) -> None:
        while True:
            with self._lock:
                if not lane.waiting:
                    lane.threads -= 1
                    if not lane.threads:
                        self._lanes.pop(key, None)
                    return
                fd, after, closing = lane.waiting.popleft()
                more = bool(lane.waiting)
            if more:  # this one may hang: not the rest behind it
                self._start_thread(key, lane)
            until = monotonic() + _MAX_WAIT
            for closed in after:
                closed.wait(until - monotonic())
            fd.close()
            with self._lock:
                self._deferred.discard(fd)
                self.pending_by_uid[lane.uid] -= 1
                if not self.pending_by_uid[lane.uid]:
                    del self.pending_by_uid[lane.uid]
                callbacks = closing._closed_one()
                if not self.pending_by_uid:
                    callbacks += self._when_idle
                    self._when_idle.clear()
            for callback in callbacks:
                callback()
