"""Closes descriptors without blocking the event loop.

Descriptors whose close cannot block (:mod:`.close_risk`) are closed at once, all others by threads;
callbacks report the completion.
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

#: Maximum number of threads of a lane.  If all of them block in close(2), other descriptors of the
#: lane stay open.
_MAX_THREADS = 32

#: Seconds that the close of a descriptor waits at most for the close of its duplicates.
_MAX_WAIT = 1.0

# A local name: an Enum member takes 0.16 us before Python 3.12, and a command 20 us.
_NO_RISK = Risk.NONE


class Duplicate(Fd):
    """A duplicate of another descriptor, which :class:`ClosePool` closes after the duplicate.

    Args:
        original: the other descriptor.

    Raises:
        OSError: this process is out of descriptors.
    """

    __slots__ = ("original",)

    def __init__(self, original: Fd) -> None:
        self.number = -1  # dup(2) may fail
        super().__init__(os.dup(original.fileno()))
        self.original = original


@dataclass(slots=True, eq=False)
class Closing:
    """Progress of closes by threads: of one :meth:`ClosePool.close`, or of all.

    Args:
        left: number of descriptors that are not closed yet.
    """

    left: int
    _lock: threading.Lock
    _callbacks: list[Callable[[], object]] = field(default_factory=list)

    @property
    def is_done(self) -> bool:
        """Whether all of the descriptors are closed."""
        return not self.left

    def when_done(self, callback: Callable[[], object]) -> None:
        """Call *callback* once all are closed: in a thread, or at once if they are closed."""
        with self._lock:
            if self.left:
                self._callbacks.append(callback)
                return
        callback()

    def _closed_one(self) -> list[Callable[[], object]]:
        """Count one close; return the callbacks to call now.  The caller holds the lock."""
        self.left -= 1
        if self.left:
            return []
        callbacks, self._callbacks = self._callbacks, []
        return callbacks


@dataclass(slots=True, eq=False)
class _Lane:
    """Queue of the descriptors of one user and one device, and the number of its threads.

    Args:
        uid: the user; None for the daemon itself.
    """

    uid: int | None
    waiting: deque[tuple[Fd, list[threading.Event], Closing]] = field(default_factory=deque)
    threads: int = 0


class ClosePool:
    """Closes descriptors: at once if the close cannot block, else in threads.

    Each pair of a user and a device or file system has its own threads (a lane), so that a blocked
    close delays no others.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lanes: dict[Hashable, _Lane] = {}
        #: Number of closes that run or are queued for a thread, by user.
        self.pending_by_uid: dict[int | None, int] = {}
        #: Progress of all closes that run or are queued for a thread.
        self.all_closes = Closing(0, self._lock)
        self._after: dict[Fd, list[threading.Event]] = {}  # set when its duplicates are closed
        self._deferred: set[Fd] = set()  # queued for a thread, or being closed by one
        self._quick: set[Fd] = set()  # known not to block, until the next close()
        self._risks = CloseRisks()
        #: Whether closing a descriptor may block, see :meth:`.CloseRisks.find`.
        self.risk = self._risks.find
        #: Whether closing a duplicate never blocks, see :meth:`.CloseRisks.is_quick_duplicate`.
        self.is_quick_duplicate = self._risks.is_quick_duplicate

    def shut_down(self) -> None:
        """Free the resources at the daemon's end; closes that run go on, no more may be made."""
        self._risks.close()

    @property
    def pending(self) -> int:
        """Number of closes that run or are queued for a thread."""
        return self.all_closes.left

    def close(self, fds: Iterable[Fd], uid: int | None = None) -> Closing | None:
        """Close each of *fds*, without blocking.

        Args:
            fds: the descriptors; owned from here on.
            uid: the user whom the descriptors without a ``uid`` of their own count for until they
                are closed; None for the daemon itself.

        Returns:
            The progress of the closes by threads; None if all are closed already.
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
        """Whether *fd* is open and no close of it is pending."""
        return fd.number >= 0 and fd not in self._deferred

    def _close_duplicate(self, fd: Duplicate, uid: int | None) -> None:
        """Close a duplicate whose original is open."""
        if self.is_quick_duplicate(fd.number):
            fd.close()
            return
        closed = threading.Event()
        self.close_after(fd.original, closed)
        self._close_in_threads([(Risk.HIGH, fd)], uid).when_done(closed.set)

    def may_block(self, fd: FileDescriptorLike) -> bool:
        """Whether closing a descriptor or its duplicate is likely to block.

        If it cannot block, that is remembered for the next :meth:`close` of the descriptor.
        """
        try:
            risk = self.risk(fileno(fd))
        except OSError:
            return True
        if risk is _NO_RISK and isinstance(fd, Fd):
            self._quick.add(fd)
        return risk is Risk.HIGH

    def lane(self, fd: FileDescriptorLike, uid: int | None = None) -> str:
        """Return the name of a descriptor's lane: its user and device.

        For another process, which closes a duplicate: closes of one lane may block together.
        """
        found = self._risks.status(fileno(fd))
        return f"{uid}:{found and found[4:]}"

    def close_after(self, fd: Fd, closed: threading.Event) -> None:
        """Delay a later close of *fd* until its duplicate in another process is closed.

        Args:
            fd: a descriptor whose close may block, so that a thread closes it.
            closed: the event that is set when the duplicate is closed.
        """
        before = self._after.get(fd, ())
        self._after[fd] = [closed, *(event for event in before if not event.is_set())]

    def close_duplicates(self, fds: Iterable[Fd], quick: Container[Fd] = ()) -> None:
        """Close descriptors whose files another process has open too.

        Args:
            fds: the descriptors; owned from here on.
            quick: those for which :meth:`is_quick_duplicate` is known to be true.
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
            self.all_closes.left += len(fds)
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
            # Retry the lanes for which no thread could be started before.
            to_start |= {key: lane for key, lane in self._lanes.items() if not lane.threads}
        for key, lane in to_start.items():
            self._start_thread(key, lane)
        return closing

    def _start_thread(self, key: Hashable, lane: _Lane) -> None:
        """Start one more thread for *lane*, unless it has the maximum or its queue is empty."""
        with self._lock:
            if lane.threads == _MAX_THREADS or not lane.waiting:
                return
            lane.threads += 1
        try:
            # Not threading.Thread: its start() waits until the thread runs, which can take
            # milliseconds, and at exit the process would wait for a close that blocks.
            _thread.start_new_thread(self._work, (key, lane))
        except RuntimeError:  # no more threads: a running one, or the next one, closes the rest
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
            if more:  # this close may block: another thread closes the rest of the queue
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
                callbacks = closing._closed_one() + self.all_closes._closed_one()
            for callback in callbacks:
                callback()
