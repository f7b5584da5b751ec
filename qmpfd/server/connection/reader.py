"""Serves clients with small requests, round robin, in one task.

Each connection has a task of its own.  While it waits for input, that task is parked here, and the
reader executes the client's requests: one bounded piece of work for each readable client, without
an await.  The connection's task wakes up only if a piece leaves work over.  One epoll in which the
sockets stay registered costs less than one ``wait_readable`` for each request, which takes an
epoll_ctl(2) and a task step.
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
    """The parked connections.

    Args:
        lifecycle: the daemon's state: while it is paused, no client is served.
        lock: the lock that guards the store.
        durability: the second copy of the store.
    """

    def __init__(self, lifecycle: Lifecycle, lock: trio.Lock, durability: Durability) -> None:
        self._lifecycle = lifecycle
        self._lock = lock
        self._durability = durability
        self._epoll = select.epoll()  # level-triggered: a piece may leave input unread
        self._registered: set[int] = set()
        self._readable: Iterator[tuple[int, int]] = iter(())  # not served yet in this round
        self._slow: set[int] = set()  # sockets whose last piece took long
        # By socket: the parked task, and the function that does a piece.
        self._tasks: dict[int, trio.lowlevel.Task] = {}
        self._pieces: dict[int, Callable[[float], object]] = {}

    async def serve(self, sock: int, piece: Callable[[float], T | None]) -> T | None:
        """Park the calling task, and serve its client until a piece leaves work over, or two in a
        row take long: one alone may be slow because the machine was busy.  Cancelling is safe at
        any time.

        Args:
            sock: the client's socket; call :meth:`forget` before it is closed.
            piece: does one piece of work; called with the time (time.monotonic()) whenever the
                socket is readable, which it also is at its end.

        Returns:
            The first result of *piece* that is not None; None after two slow pieces.

        Raises:
            Exception: what *piece* has raised.
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
        """Take the client's socket out of the epoll, before it is closed: as long as a duplicate
        is open, the kernel would report a number that means another socket by then (epoll(7)).
        """
        if sock in self._registered:
            self._registered.discard(sock)
            self._slow.discard(sock)
            self._epoll.unregister(sock)

    async def run(self) -> None:
        """Serve the parked clients, for ever."""
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
        """Do one piece for each readable client, for PASS_SECONDS at most; return whether clients
        are left for the next pass.
        """
        pieces, durability = self._pieces, self._durability
        now = monotonic()
        ends = now + PASS_SECONDS
        while True:
            for sock, _ in self._readable:
                piece = pieces.get(sock)
                if piece is None:  # the connection's task is at work
                    self.forget(sock)
                    continue
                try:
                    left = piece(now)
                except Exception as exc:  # noqa: BLE001 - raised in the connection's own task
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
            if not durability.is_synced:  # one barrier for the changes of all clients
                durability.push()
                now = monotonic()
            readable = self._epoll.poll(0)
            if not readable:
                return False
            self._readable = iter(readable)

    def _note_time(self, sock: int, slow: bool) -> None:
        """Note whether a client's piece was *slow*; wake its task after the second in a row."""
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
        """Close the epoll; no client is served after this."""
        self._epoll.close()
