"""What goes to the fd store, and how it is known to have arrived.

Nothing is acknowledged there but a barrier, which stands for all that was sent before it: one is
under way at a time, and whatever comes meanwhile shares the next.  Messages are sent off without
waiting; whoever has something to say waits in :meth:`BarrierLink.sync`.

What they are about is not known here.
"""

from __future__ import annotations

import errno
import logging
import os
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager

import trio

from ...kernel.fd import Fd, close_all
from ...kernel.systemd import Notifier

_log = logging.getLogger("qmpfd")

#: Seconds until the next try where the kernel has no room for a message, and does not tell when.
_RETRY = 0.01

#: sendmsg(2), unix(7): no room now, for the message or the descriptor with it.
_NO_ROOM = {errno.ETOOMANYREFS, errno.ENOBUFS, errno.ENOMEM}


class BarrierLink:
    """The connection to the fd store.

    Args:
        notifier: the connection to it; the caller's, until the daemon has ended.
        write: writes down what was changed, before anything is sent that stands for it; not called
            any more once this has ended.  If it raises an OSError, this ends.
        ended: called whenever this has ended.
    """

    def __init__(
        self, notifier: Notifier, write: Callable[[], None], ended: Callable[[], None]
    ) -> None:
        self._notifier = notifier
        self._write = write
        self._ended = ended
        self._changes = 0  # so far
        self._synced = 0  # of these, how many are known to be there
        self._outgoing: deque[tuple[str, Fd | int | None]] = deque()
        self._actions: deque[tuple[int, Callable[[], object]]] = (
            deque()
        )  # once that change is there
        self._pipe: tuple[Fd, Fd] | None = None  # for the next barrier
        self._barrier: tuple[int, Fd, Fd] | None = None  # stands for so many changes
        self._watched = False  # somebody waits for it
        self._blocked: float | None = None  # no room: seconds until the next try, 0 for a signal
        self._waiting = trio.lowlevel.ParkingLot()
        self._idle: trio.Event | None = None
        self._scope = trio.CancelScope()
        #: Nothing is kept any more.
        self.is_over = False

    # -- what is to be there -------------------------------------------------------------------

    def store(self, name: str, fd: Fd | int) -> None:
        """Have a descriptor kept under *name*."""
        # What hangs up stays: whether it may go is for its client to say.
        self._outgoing.append((f"FDSTORE=1\nFDNAME={name}\nFDPOLL=0", fd))
        self._changes += 1

    def remove(self, name: str, hint: str = "") -> None:
        """Have what is kept under *name* closed there; *hint* goes with the message."""
        self._outgoing.append((f"FDSTOREREMOVE=1\nFDNAME={name}{hint}", None))
        self._changes += 1

    def tell(self, text: str) -> None:
        """Send a message that is about no change."""
        self._outgoing.append((text, None))

    def changed(self) -> None:
        """There is something to be written."""
        self._changes += 1

    def on_synced(self, action: Callable[[], object]) -> None:
        """Call *action* when all that was changed so far is safe, or this has ended."""
        self._actions.append((self._changes, action))

    # -- waiting until it is safe --------------------------------------------------------------

    @property
    def is_synced(self) -> bool:
        """Whether all that was changed is safe."""
        return self._synced == self._changes

    async def sync(self) -> None:
        """Wait until all that was changed so far is safe; without a checkpoint if it is."""
        wanted = self._changes
        if self._synced >= wanted:
            return
        self.push(wake=False)
        while self._synced < wanted:
            if self._barrier is not None and not self._watched:
                await self._await_barrier()
            else:
                self._wake()
                await self._waiting.park()

    def push(self, *, wake: bool = True) -> None:
        """Do all that can be done without waiting, and see to the rest, unless the caller does."""
        try:
            if not self.is_over:
                self._write()
            self._send()
        except OSError as exc:
            self.end(f"the descriptors are no longer kept safe: {exc.strerror or exc}")
        if wake:
            self._wake()

    def _wake(self) -> None:
        """Have the link's own task look whether there is something for it to wait for."""
        if self._idle is not None:
            self._idle.set()

    async def _await_barrier(self) -> None:
        """Wait for the barrier that is under way.  One of those who need it does, so that no task
        has to be woken for it; if that is cancelled, the link's own goes on.
        """
        assert self._barrier is not None
        changes, reader, _ = self._barrier
        self._watched = True
        try:
            await trio.lowlevel.wait_readable(reader)
        except trio.ClosedResourceError:  # all is over
            return
        except trio.Cancelled:
            self._wake()
            raise
        finally:
            self._watched = False
        self._end_barrier()
        self._advance(changes)
        if not self.is_synced:
            self.push()

    def _send(self) -> None:
        self._blocked = None
        outgoing = self._outgoing
        while outgoing:
            text, fd = outgoing[0]
            # One that was closed already is to be removed anyway, by a message further on.
            gone = isinstance(fd, Fd) and fd.closed
            if not gone and not self._sent(text, () if fd is None else (fd,)):
                return
            outgoing.popleft()
        if self._barrier is None and not self.is_synced:
            try:
                reader, writer = self._pipe or _pipe()
            except OSError:  # out of descriptors
                self._blocked = _RETRY
                return
            self._pipe = reader, writer
            if self._sent("BARRIER=1", (writer,)):
                writer.close()
                # For its place in the table: the next pipe may find none.
                self._barrier = self._changes, reader, reader.dup()
                self._pipe = None

    def _sent(self, text: str, passed: Sequence[Fd | int]) -> bool:
        try:
            self._notifier.send(text, passed)
        except BlockingIOError:
            self._blocked = 0
        except OSError as exc:
            if exc.errno not in _NO_ROOM:
                raise
            self._blocked = _RETRY
        else:
            return True
        return False

    def _end_barrier(self) -> None:
        if self._barrier is not None:
            if self._watched:
                trio.lowlevel.notify_closing(self._barrier[1])
            close_all(self._barrier[1:])
            self._barrier = None
            try:
                self._pipe = _pipe()
            except OSError:  # out of descriptors: it is tried again when it is needed
                self._pipe = None

    def _advance(self, changes: int) -> None:
        """So many changes are safe."""
        self._synced = changes
        while self._actions and self._actions[0][0] <= changes:
            self._actions.popleft()[1]()
        self._waiting.unpark_all()

    # -- its life ------------------------------------------------------------------------------

    def open(self) -> None:
        """Take what the first barrier needs.

        Raises:
            OSError: there is no descriptor for it.
        """
        self._pipe = _pipe()

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[None, None]:
        """Talk to the fd store while the block runs."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._run)
                yield
                nursery.cancel_scope.cancel()
        finally:
            self.end(None)

    async def _run(self) -> None:
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    if self._notifier.is_parent:
                        nursery.start_soon(self._watch)
                    await self._talk()
        finally:
            self._end_barrier()
            self._close_pipe()

    async def _talk(self) -> None:
        while True:
            self.push()
            if self._blocked is not None:
                await trio.sleep(self._blocked)
                await trio.lowlevel.wait_writable(self._notifier)
            elif self._barrier is not None and not self._watched:
                await self._await_barrier()
            else:
                self._idle = trio.Event()
                await self._idle.wait()
                self._idle = None

    async def _watch(self) -> None:
        """Wait for the end of the parent.  What it says besides comes before a barrier's end."""
        while self._notifier.receive():
            await trio.lowlevel.wait_readable(self._notifier)
        self.end("the descriptors are no longer kept safe: the supervising process is gone")

    def end(self, reason: str | None) -> None:
        """Nothing is kept from here on; *reason* says why, where that is a misfortune."""
        if not self.is_over:
            self.is_over = True
            if reason is not None:
                _log.error("%s; no more can be added", reason)
        self._outgoing.clear()
        self._advance(self._changes)
        self._close_pipe()
        self._scope.cancel()
        self._ended()

    def _close_pipe(self) -> None:
        if self._pipe is not None:
            close_all(self._pipe)
            self._pipe = None


def _pipe() -> tuple[Fd, Fd]:
    reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    return Fd(reader), Fd(writer)
