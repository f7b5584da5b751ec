"""Serves clients that ask for little, one after the other, in one task.

Each connection has a task of its own.  While the connection waits for its client, that task is
parked here, and the reader carries out what the client sends: one bounded piece for each client
that is readable, without an await, round robin.  The connection's task wakes up only for what a
piece leaves over.  One epoll in which the sockets stay registered costs less than one
``wait_readable`` for each request: that takes an epoll_ctl(2) and a step of a task.
"""

from __future__ import annotations

import select
from collections.abc import Callable, Iterator
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
        self._readable: Iterator[tuple[int, int]] = iter(())  # found so, and not served yet
        self._slow: set[int] = set()  # those whose last piece took long
        # By socket: the parked tasks, and what serves their clients.
        self._tasks: dict[int, trio.lowlevel.Task] = {}
        self._pieces: dict[int, Callable[[float], object]] = {}

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
        self._tasks[sock], self._pieces[sock] = trio.lowlevel.current_task(), piece

        def abort(_: object) -> trio.lowlevel.Abort:
            del self._tasks[sock], self._pieces[sock]
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
        more = False
        while True:
            if more:
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
                    more = self._serve_readable()
            finally:
                self._lock.release()

    def _serve_readable(self) -> bool:
        """Do one piece for each client that is readable, as long as there is time; whether that was
        over before it was the turn of each of them.
        """
        pieces, durability = self._pieces, self._durability
        now = monotonic()
        ends = now + PASS_SECONDS
        while True:
            for sock, _ in self._readable:
                piece = pieces.get(sock)
                if piece is None:  # its task works still
                    self.forget(sock)
                    continue
                try:
                    left = piece(now)
                except Exception as exc:  # noqa: BLE001 - its task's own: it ends, all others go on
                    self._wake(sock, Error(exc))
                else:
                    if left is not None:
                        self._wake(sock, Value(left))
                began, now = now, monotonic()
                if now - began > LIGHT_SECONDS or self._slow:
                    self._note_time(sock, now - began > LIGHT_SECONDS)
                if now > ends:
                    durability.push()
                    return True
            if not durability.is_synced:  # the changes of all of them go together
                durability.push()
                now = monotonic()
            readable = self._epoll.poll(0)
            if not readable:
                return False
            self._readable = iter(readable)

    def _note_time(self, sock: int, slow: bool) -> None:
        """The client's piece took long, or somebody's did before; two in a row of one client: its
        task wakes up.
        """
        if not slow:
            self._slow.discard(sock)
        elif sock in self._slow and sock in self._pieces:
            self._wake(sock, Value(None))
        elif sock in self._registered:
            self._slow.add(sock)

    def _wake(self, sock: int, result: Outcome[object]) -> None:
        del self._pieces[sock]
        trio.lowlevel.reschedule(self._tasks.pop(sock), result)

    def close(self) -> None:
        """Wait for nobody any more."""
        self._epoll.close()
