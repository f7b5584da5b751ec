"""What goes to the fd store, and how it is known to have arrived.

Changes are collected, and sent together by one task, with one barrier behind them: an
acknowledgement stands for all that was sent before it.  One barrier is under way at a time; all
clients whose changes come meanwhile share the next one (group commit).

systemd acknowledges by closing a pipe (sd_notify_barrier(3)); the parent of ``serve --supervise``
by a message, and takes several descriptors at a time, see :mod:`qmpfd.supervisor`.
"""

from __future__ import annotations

import errno
import logging
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from enum import Enum, auto

import trio

from ...kernel.fd import Fd, close_all, pipe
from ...kernel.systemd import Notifier
from ...limits import SCM_MAX_FD
from .outgoing import REMOVE, Outgoing

_log = logging.getLogger("qmpfd")

#: Seconds until the next try where the kernel has no room for a message, and does not tell when.
_RETRY = 0.01

#: sendmsg(2), unix(7): no room now, for the message or the descriptor with it.
_NO_ROOM = {errno.ETOOMANYREFS, errno.ENOBUFS, errno.ENOMEM, errno.EMFILE, errno.ENFILE}


class State(Enum):
    """What the link is doing."""

    IDLE = auto()  #: every change is acknowledged
    CHANGED = auto()  #: there are changes, and no barrier is under way
    BLOCKED = auto()  #: the same, and the kernel had no room for a message
    SENT = auto()  #: a barrier is under way
    OVER = auto()  #: nothing is kept any more

    # As of any object: that of Enum is a Python function.
    __hash__ = object.__hash__


class Event(Enum):
    """What changes the state."""

    CHANGE = auto()
    NO_ROOM = auto()
    BARRIER = auto()
    LOST = auto()
    ALL_SAFE = auto()
    SOME_SAFE = auto()
    END = auto()

    __hash__ = object.__hash__


#: An event that is not here changes nothing.
TRANSITIONS: dict[tuple[State, Event], State] = {
    (State.IDLE, Event.CHANGE): State.CHANGED,
    (State.CHANGED, Event.NO_ROOM): State.BLOCKED,
    (State.CHANGED, Event.BARRIER): State.SENT,
    (State.BLOCKED, Event.BARRIER): State.SENT,
    (State.SENT, Event.LOST): State.BLOCKED,
    (State.SENT, Event.ALL_SAFE): State.IDLE,
    (State.SENT, Event.SOME_SAFE): State.CHANGED,
    **{(state, Event.END): State.OVER for state in State},
}

# Finding a member of an enumeration takes as long as two calls.
_IDLE, _CHANGED, _SENT = State.IDLE, State.CHANGED, State.SENT
_BEFORE_BARRIER = (State.CHANGED, State.BLOCKED)


class BarrierLink:
    """The connection to the fd store.

    Args:
        notifier: the connection to it; the caller's, until the daemon has ended.
        write: writes down what was changed before that is sent, and is told whether a barrier is
            behind it; not called once this has ended.  If it raises an OSError, this ends.
        ended: called whenever this has ended.
    """

    def __init__(
        self, notifier: Notifier, write: Callable[[bool], None], ended: Callable[[], None]
    ) -> None:
        self._notifier = notifier
        self._write = write
        self._ended = ended
        self._state = State.IDLE
        self._changes = 0  # so far
        self._synced = 0  # of these, how many are known to be there
        self._barrier = 0  # of these, how many the barrier under way stands for
        self._outgoing = Outgoing(SCM_MAX_FD if notifier.is_parent else 1)
        self._actions: deque[tuple[int, Callable[[], object]]] = deque()  # after so many changes
        self._closes: dict[str, threading.Event] = {}  # under way in the parent, by name
        self._pipe: tuple[Fd, Fd] | None = None  # for the next barrier
        self._reader: tuple[Fd, Fd] | None = None  # of the barrier under way
        self._waiting = trio.lowlevel.ParkingLot()
        self._work = trio.Event()  # set when the link's task has something to do
        self._scope = trio.CancelScope()
        notifier.on_message = self._hear
        #: Barriers so far.
        self.barriers = 0

    # -- what is to be there -------------------------------------------------------------------

    @property
    def is_over(self) -> bool:
        """Whether nothing is kept any more."""
        return self._state is State.OVER

    def store(self, name: str, fd: Fd | int) -> None:
        """Have a descriptor kept under *name*."""
        self._outgoing.store(name, fd)
        self.changed()

    def remove(self, name: str) -> None:
        """Have what is kept under *name* closed there."""
        self._remove(REMOVE, name)

    def remove_all(self, names: Sequence[str]) -> None:
        """As :meth:`remove` of each, as few messages: all clients wait for that in a takeover."""
        sent = [name for name in names if not self._outgoing.withdraw(name)]
        most = SCM_MAX_FD if self._notifier.is_parent else 1
        for at in range(0, len(sent), most):
            self.tell(f"{REMOVE}\nFDNAME={':'.join(sent[at : at + most])}")

    def discard(self, name: str) -> None:
        """As :meth:`remove`, but nobody waits for it: no barrier stands for it alone."""
        self._outgoing.tell(REMOVE, {name: None})

    def remove_slowly(self, name: str, lane: str) -> threading.Event:
        """The same for a descriptor whose close may block there; what is set when it is closed, and
        was not closed by a service manager, which does not say so.

        Args:
            name: what the descriptor is called.
            lane: what may hang together with it, see :meth:`ClosePool.lane`.
        """
        closed = self._closes[name] = threading.Event()
        self._remove(f"{REMOVE}\nQMPFD_CLOSE={lane}", name)
        return closed

    def _remove(self, command: str, name: str) -> None:
        if not self._outgoing.remove(command, name):
            self._closed_there(name)
        self.changed()

    def tell(self, text: str) -> None:
        """Have the other side told something that is not about a descriptor."""
        self._outgoing.tell(text)
        self.changed()

    def changed(self) -> None:
        """There is something to be written."""
        self._changes += 1
        if self._state is _IDLE:
            self._handle(Event.CHANGE)

    def on_synced(self, action: Callable[[], object], *, first: bool = False) -> None:
        """Call *action* when all that was changed so far is safe, or this has ended; before all
        others if it is *first*: only while no barrier is under way.
        """
        (self._actions.appendleft if first else self._actions.append)((self._changes, action))

    def _handle(self, event: Event) -> None:
        self._state = TRANSITIONS.get((self._state, event), self._state)

    # -- waiting until it is safe --------------------------------------------------------------

    @property
    def is_synced(self) -> bool:
        """Whether all that was changed is safe."""
        return self._synced == self._changes

    async def sync(self) -> None:
        """Wait until all that was changed so far is safe; without a checkpoint if it is."""
        wanted = self._changes
        if self._synced < wanted:
            self.start()
        while self._synced < wanted:
            await self._waiting.park()

    def start(self) -> None:
        """See to it that all that was changed so far gets safe."""
        if self._state is _CHANGED:  # the answer to a barrier under way begins the next one
            self.push()

    def push(self) -> None:
        """Send what is to be sent, without waiting, and see to the rest."""
        barrier = self._state in _BEFORE_BARRIER
        try:
            if not self.is_over:
                self._write(barrier)
            self._send(barrier)
        except OSError as exc:
            self.end(f"the descriptors are no longer kept safe: {exc.strerror or exc}")
        if self._state is _SENT and self._notifier.is_parent:
            self._receive()  # on the same CPU, it has answered by now most likely
        if self._state is State.BLOCKED or self._reader is not None:
            self._work.set()

    def _send(self, barrier: bool) -> None:
        """Send what there is, and a *barrier* behind it if none is under way.

        Raises:
            OSError: nobody receives it.
        """
        try:
            while self._outgoing:
                last = barrier and self._notifier.is_parent and len(self._outgoing) == 1
                self._outgoing.first.send(self._notifier, self._sync_line if last else "")
                self._outgoing.first_was_sent()
                if last:
                    self._barrier_sent()
                    return
            if barrier:
                self._send_barrier()
        except BlockingIOError:
            self._handle(Event.NO_ROOM)
        except OSError as exc:
            if exc.errno not in _NO_ROOM:
                raise
            self._handle(Event.NO_ROOM)

    @property
    def _sync_line(self) -> str:
        """What the parent answers, see :mod:`qmpfd.supervisor`."""
        return f"\nQMPFD_SYNC={self.barriers + 1}"

    def _send_barrier(self) -> None:
        if self._notifier.is_parent:
            self._notifier.send(self._sync_line.lstrip())
        else:
            reader, writer = self._pipe = self._pipe or pipe()
            self._notifier.send("BARRIER=1", (writer,))
            writer.close()
            # The second one for its place in the table: the next pipe may find none.
            self._reader = reader, reader.dup()
            self._pipe = None
        self._barrier_sent()

    def _barrier_sent(self) -> None:
        self._barrier = self._changes
        self.barriers += 1
        self._handle(Event.BARRIER)

    def _acknowledged(self) -> None:
        """All that was sent before the barrier is there."""
        self._outgoing.all_arrived()
        all_safe = self._barrier == self._changes
        self._handle(Event.ALL_SAFE if all_safe else Event.SOME_SAFE)
        self._advance(self._barrier)
        if self._outgoing:
            self.push()
        else:
            self.start()

    def _advance(self, changes: int) -> None:
        """So many changes are safe."""
        self._synced = changes
        actions = self._actions
        while actions and actions[0][0] <= changes:
            actions.popleft()[1]()
        if self._waiting:
            self._waiting.unpark_all()

    # -- its life ------------------------------------------------------------------------------

    def open(self) -> None:
        """Take what the first barrier needs.

        Raises:
            OSError: there is no descriptor for it.
        """
        if not self._notifier.is_parent:
            self._pipe = pipe()

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
                        nursery.start_soon(self._listen)
                    await self._talk()
        finally:
            self._close_pipes()

    async def _talk(self) -> None:
        """Send, whenever there is something to send."""
        while True:  # noqa: ASYNC913 - each way round waits
            if self._state is State.BLOCKED:
                await trio.sleep(_RETRY)
                await trio.lowlevel.wait_writable(self._notifier)
            elif self._reader is not None:
                with suppress(trio.ClosedResourceError):  # all is over
                    await trio.lowlevel.wait_readable(self._reader[0])
                    close_all(self._reader)
                    self._reader = None
                    self._acknowledged()
            else:
                await self._work.wait()
            self.push()
            self._work = trio.Event()

    async def _listen(self) -> None:
        """Hear what the parent says, and when it has ended."""
        while not self.is_over:
            await trio.lowlevel.wait_readable(self._notifier)
            self._receive()

    def _receive(self) -> None:
        try:
            self._notifier.receive()
        except EOFError:
            self.end(
                "the descriptors are no longer kept safe: the parent process is gone "
                "(qmpfd serve --takeover --supervise starts a new one, and nothing is lost)"
            )

    def _hear(self, message: str) -> None:
        key, _, value = message.partition("=")
        if key == "SYNCED":
            if value == str(self.barriers) and self._state is _SENT:
                self._acknowledged()
        elif key == "CLOSED":
            self._closed_there(value)
        elif key == "LOST" and self._outgoing.lost(value):
            # The parent had no place for it: nobody is told that it is safe, until it is.
            self._handle(Event.LOST)
            self._work.set()

    def _closed_there(self, name: str) -> None:
        if closed := self._closes.pop(name, None):
            closed.set()

    def end(self, reason: str | None) -> None:
        """Nothing is kept from here on; *reason* says why, where that is a misfortune."""
        if not self.is_over and reason is not None:
            _log.error("%s; more are refused", reason)
        self._handle(Event.END)
        self._ended()
        self._outgoing.clear()
        for closed in self._closes.values():
            closed.set()
        self._closes.clear()
        self._advance(self._changes)
        self._close_pipes()
        self._scope.cancel()

    def _close_pipes(self) -> None:
        if self._reader is not None:
            trio.lowlevel.notify_closing(self._reader[0])
            close_all(self._reader)
            self._reader = None
        if self._pipe is not None:
            close_all(self._pipe)
            self._pipe = None
