"""Serves clients that ask for little, one after the other, in one task.

Each connection has a task of its own.  While the connection waits for its client, that task is
parked here, and the reader carries out what the client sends: one bounded piece for each client
that is readable, without an await, round robin.  The connection's task wakes up only for what a
piece leaves over.  One epoll in which the sockets stay registered costs less than one
``wait_readable`` for each request: that takes an epoll_ctl(2) and a step of a task.
"""

from __future__ import annotations

import select
from collections.abc import Callable
from time import monotonic
from typing import TypeVar, cast

import trio
from outcome import Error, Outcome, Value

from ...limits import LIGHT_SECONDS, PASS_SECONDS
from ..durability import Durability
from ..lifecycle import Lifecycle

T = TypeVar("T")


class Reader:
    """The clients that are waited for.

    Args:
        lifecycle: while the daemon is paused, nobody is served.
        lock: guards the store.
        durability: of what is changed.
    """

    def __init__(self, lifecycle: Lifecycle, lock: trio.Lock, durability: Durability) -> None:
        self._lifecycle = lifecycle
        self._lock = lock
        self._durability = durability
        self._epoll = select.epoll()  # level-triggered: what a piece leaves unread is told again
        self._registered: set[int] = set()
        self._readable: list[tuple[int, int]] = []  # found so, and not served yet; the last is next
        self._slow: set[int] = set()  # those whose last piece took long
        # The parked tasks by socket, each with what serves its client.
        self._parked: dict[int, tuple[trio.lowlevel.Task, Callable[[float], object]]] = {}

    async def serve(self, sock: int, piece: Callable[[float], T | None]) -> T | None:
        """Have a client served until a piece leaves something over, or two in a row take long: one
        alone may have taken long because the machine did something else.

        The calling task is parked meanwhile, and cancelling it is safe at any time.

        Args:
            sock: the client's socket; :meth:`forget` is due before it is closed.
            piece: called with the time (time.monotonic()) whenever there is something to read, or
                the client is gone; what it returns or raises, but for None, is this method's
                result.

        Returns:
            What a piece has left over; None where that is nothing.

        Raises:
            OSError: the kernel has no memory for one more socket in an epoll (epoll_ctl(2)).
        """
        if sock not in self._registered:
            self._epoll.register(sock, select.EPOLLIN)
            self._registered.add(sock)
        self._parked[sock] = trio.lowlevel.current_task(), piece

        def abort(_: object) -> trio.lowlevel.Abort:
            del self._parked[sock]
            return trio.lowlevel.Abort.SUCCEEDED

        return cast("T | None", await trio.lowlevel.wait_task_rescheduled(abort))

    def forget(self, sock: int) -> None:
        """Wait for the client no more.  A socket has to be open still: the kernel would go on
        telling of it as long as a duplicate is, under a number that means another by then.
        """
        if sock in self._registered:
            self._registered.discard(sock)
            self._slow.discard(sock)
            self._epoll.unregister(sock)

    async def run(self) -> None:
        """Serve the clients that are parked here."""
        while True:
            if self._readable:
                await trio.lowlevel.checkpoint()
            else:
                await trio.lowlevel.wait_readable(self._epoll.fileno())
            if self._lifecycle.paused:
                await self._lifecycle.wait_running()
            try:
                self._lock.acquire_nowait()
            except trio.WouldBlock:
                await self._lock.acquire()
            try:
                if not self._lifecycle.paused:
                    self._serve_readable()
            finally:
                self._lock.release()

    def _serve_readable(self) -> None:
        """Do one piece for each client that is readable, as long as there is time."""
        readable = self._readable
        now = monotonic()
        ends = now + PASS_SECONDS
        while now < ends:
            if not readable:
                if not self._durability.is_synced:  # the changes of all of them go together
                    self._durability.push()
                    now = monotonic()
                readable += self._epoll.poll(0)
                if not readable:
                    return
                readable.reverse()
            sock, began = readable.pop()[0], now
            self._serve(sock, began)
            now = monotonic()
            slow = now - began > LIGHT_SECONDS
            if slow or sock in self._slow:
                self._note_time(sock, slow)
        self._durability.push()

    def _serve(self, sock: int, now: float) -> None:
        """Do one piece; the client's task wakes up if that leaves something over."""
        parked = self._parked.get(sock)
        if parked is None:  # its task works still
            self.forget(sock)
            return
        _, piece = parked
        result: Outcome[object]
        try:
            left = piece(now)
        except Exception as exc:  # noqa: BLE001 - the task's own: it ends, and all others go on
            result = Error(exc)
        else:
            if left is None:
                return
            result = Value(left)
        self._wake(sock, result)

    def _note_time(self, sock: int, slow: bool) -> None:
        """The client's piece took long, or the one before did; both: its task wakes up."""
        if not slow:
            self._slow.discard(sock)
        elif sock in self._slow and sock in self._parked:
            self._wake(sock, Value(None))
        elif sock in self._registered:
            self._slow.add(sock)

    def _wake(self, sock: int, result: Outcome[object]) -> None:
        task, _ = self._parked.pop(sock)
        trio.lowlevel.reschedule(task, result)

    def close(self) -> None:
        """Wait for nobody any more."""
        self._epoll.close()
