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
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from enum import Enum, auto
from functools import partial

import trio

from ...kernel.fd import Fd, close_all, pipe
from ...kernel.systemd import Notifier
from ...limits import SCM_MAX_FD
from .names import Names
from .outgoing import REMOVE, Outgoing

_log = logging.getLogger("qmpfd")

#: Seconds until the next try where the kernel has no room for a message, and does not tell when.
_RETRY = 0.01

#: What the parent answers, with the number of the barrier, see :mod:`qmpfd.supervisor`.
_SYNC = "QMPFD_SYNC="

_PARENT_GONE = (
    "the parent process is gone (qmpfd serve --takeover --supervise starts a new one, and nothing "
    "is lost)"
)

#: sendmsg(2), unix(7): no room now, for the message or the descriptor with it.
_NO_ROOM = {errno.ETOOMANYREFS, errno.ENOBUFS, errno.ENOMEM, errno.EMFILE, errno.ENFILE}


class State(Enum):
    """What the link is doing."""

    SYNCED = auto()  #: every change is acknowledged
    CHANGED = auto()  #: there are changes, and no barrier is under way
    BLOCKED = auto()  #: the same, and the kernel had no room for a message
    SENT = auto()  #: a barrier is under way that stands for every change
    SENT_CHANGED = auto()  #: the same, and there are changes that it does not stand for
    OVER = auto()  #: nothing is kept any more

    # As of any object: that of Enum is a Python function.
    __hash__ = object.__hash__


#: What each event makes of the states; of one that is not here, nothing.
_ON_CHANGE = {State.SYNCED: State.CHANGED, State.SENT: State.SENT_CHANGED}
_ON_NO_ROOM = {State.CHANGED: State.BLOCKED}
_ON_BARRIER = {State.CHANGED: State.SENT, State.BLOCKED: State.SENT}
_ON_LOST = {State.SENT: State.BLOCKED, State.SENT_CHANGED: State.BLOCKED}
_ON_ANSWER = {State.SENT: State.SYNCED, State.SENT_CHANGED: State.CHANGED}
_ON_END = dict.fromkeys(State, State.OVER)

# Finding a member of an enumeration takes as long as two calls.
_SYNCED, _CHANGED, _SENT, _OVER = State.SYNCED, State.CHANGED, State.SENT, State.OVER


def _call(actions: Iterable[Callable[[], object]]) -> None:
    """Call each of *actions*, whatever one of them meets: others wait for theirs."""
    for action in actions:
        try:
            action()
        except Exception:  # noqa: BLE001 - logged; all others go on
            _log.exception("what waited for the fd store failed")


class BarrierLink:
    """The connection to the fd store.

    Args:
        notifier: the connection to it; the caller's, until the daemon has ended.
        write: writes down what was changed before that is sent, and is told whether a barrier is
            behind it; not called once this has ended.  If it raises an OSError, this ends.
        ended: called whenever this has ended; with the reason, where that is a misfortune.
    """

    def __init__(
        self, notifier: Notifier, write: Callable[[bool], None], ended: Callable[[str], None]
    ) -> None:
        self._notifier = notifier
        self._write = write
        self._ended = ended
        self._state = State.SYNCED
        self._outgoing = Outgoing(SCM_MAX_FD if notifier.is_parent else 1)
        # What is called, and which names are free, once the barrier under way is answered; and what
        # waits for the one after it.
        self._sent_actions: list[Callable[[], object]] = []
        self._actions: list[Callable[[], object]] = []
        self._removed: list[str] = []
        self._answer = ""  # of the parent, to the last barrier
        self._closes: dict[str, threading.Event] = {}  # under way in the parent, by name
        self._pipe: tuple[Fd, Fd] | None = None  # for the next barrier
        self._reader: tuple[Fd, Fd] | None = None  # of the barrier under way
        self._work = trio.Event()  # set when the link's task has something to do
        self._scope = trio.CancelScope()
        notifier.on_message = self._hear
        #: The names that are in use there.
        self.names = Names()
        #: Barriers so far.
        self.barriers = 0

    # -- what is to be there -------------------------------------------------------------------

    @property
    def is_over(self) -> bool:
        """Whether nothing is kept any more."""
        return self._state is _OVER

    def store(self, name: str, fd: Fd | int) -> None:
        """Have a descriptor kept under *name*."""
        self._outgoing.store(name, fd)
        self.changed()

    def remove(self, *names: str, command: str = REMOVE) -> None:
        """Have what is kept under *names* closed there; these are free after that."""
        for name in names:
            if not self._outgoing.remove(command, name):
                self._closed_there(name)
        self._removed += names
        self.changed()

    def remove_slowly(self, name: str, lane: str) -> threading.Event:
        """The same for a descriptor whose close may block there; what is set when it is closed, and
        was not closed by a service manager, which does not say so.

        Args:
            name: what the descriptor is called.
            lane: what may hang together with it, see :meth:`ClosePool.lane`.
        """
        closed = self._closes[name] = threading.Event()
        self.remove(name, command=f"{REMOVE}\nQMPFD_CLOSE={lane}")
        return closed

    def discard(self, name: str) -> None:
        """As :meth:`remove`, but nobody waits for it: no barrier stands for it alone."""
        self._outgoing.tell(f"{REMOVE}\nFDNAME={name}")

    def tell(self, text: str) -> None:
        """Have the other side told something that is not about a descriptor."""
        self._outgoing.tell(text)
        self.changed()

    def changed(self) -> None:
        """There is something to be written."""
        self._state = _ON_CHANGE.get(self._state, self._state)

    def _move(self, transitions: dict[State, State]) -> None:
        self._state = transitions.get(self._state, self._state)

    # -- waiting until it is safe --------------------------------------------------------------

    @property
    def is_synced(self) -> bool:
        """Whether all that was changed is safe, or will never be."""
        return self._state is _SYNCED or self._state is _OVER

    def on_synced(self, action: Callable[[], object], *, first: bool = False) -> None:
        """Call *action* when all that was changed so far is safe, or this has ended; before all
        others if it is *first*: only while no barrier is under way.
        """
        if self.is_synced:
            action()
        elif self._state is _SENT:
            self._sent_actions.append(action)
        else:
            self._actions.insert(0 if first else len(self._actions), action)

    async def sync(self) -> None:
        """Wait until all that was changed so far is safe; without a checkpoint if it is."""
        if self.is_synced:
            return
        synced = trio.Event()
        self.on_synced(synced.set)
        self.start()
        if not synced.is_set():
            await synced.wait()

    def start(self) -> None:
        """See to it that all that was changed so far gets safe."""
        if self._state is _CHANGED:  # the answer to a barrier under way begins the next one
            self.push()

    def push(self) -> None:
        """Send what is to be sent, and see to the rest.  Only the parent's answer to a barrier is
        waited for, once and until the kernel's next tick at most.
        """
        barrier = self._state in _ON_BARRIER
        try:
            if self._state is not _OVER:
                self._write(barrier)
            self._send(barrier)
        except OSError as exc:
            gone = self._notifier.is_parent and isinstance(exc, ConnectionError)
            self.end(_PARENT_GONE if gone else exc.strerror or str(exc))
        if barrier and self._state is _SENT and self._notifier.is_parent:
            # It answers in less time than one pass of the event loop takes.
            self._receive(wait=True)
        if self._state is State.BLOCKED or self._reader is not None:
            self._work.set()

    def _send(self, barrier: bool) -> None:
        """Send what there is, and a *barrier* behind it if none is under way.

        Raises:
            OSError: nobody receives it.
        """
        notifier = self._notifier
        try:
            for text, fds, is_last in self._outgoing.messages():
                if barrier and is_last and notifier.is_parent:
                    notifier.send(f"{text}\n{_SYNC}{self.barriers + 1}", fds)
                    self._barrier_sent()
                    barrier = False
                else:
                    notifier.send(text, fds)
            if barrier:
                self._send_barrier()
        except BlockingIOError:
            self._move(_ON_NO_ROOM)
        except OSError as exc:
            if exc.errno not in _NO_ROOM:
                raise
            self._move(_ON_NO_ROOM)

    def _send_barrier(self) -> None:
        if self._notifier.is_parent:
            self._notifier.send(f"{_SYNC}{self.barriers + 1}")
        else:
            reader, writer = self._pipe = self._pipe or pipe()
            self._notifier.send("BARRIER=1", (writer,))
            writer.close()
            # The second one for its place in the table: the next pipe may find none.
            self._reader = reader, reader.dup()
            self._pipe = None
        self._barrier_sent()

    def _barrier_sent(self) -> None:
        self.barriers += 1
        self._answer = f"SYNCED={self.barriers}"
        self._state = _ON_BARRIER[self._state]
        self._sent_actions += self._actions
        self._actions.clear()
        if self._removed:
            self._sent_actions.append(partial(self.names.free, self._removed))
            self._removed = []

    def _acknowledged(self) -> None:
        """All that was sent before the barrier is there."""
        self._outgoing.all_arrived()
        self._state = _ON_ANSWER[self._state]
        actions, self._sent_actions = self._sent_actions, []
        _call(actions)
        if self._outgoing:
            self.push()
        else:
            self.start()

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
            self.end()

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

    def _receive(self, *, wait: bool = False) -> None:
        try:
            self._notifier.receive(wait=wait)
        except EOFError:
            self.end(_PARENT_GONE)

    def _hear(self, message: str) -> None:
        if message == self._answer and self._state in _ON_ANSWER:
            self._acknowledged()
            return
        key, _, value = message.partition("=")
        if key == "CLOSED":
            self._closed_there(value)
        elif key == "LOST" and self._outgoing.lost(value):
            # The parent had no place for it: nobody is told that it is safe, until it is.
            self._move(_ON_LOST)
            self._work.set()

    def _closed_there(self, name: str) -> None:
        if closed := self._closes.pop(name, None):
            closed.set()

    def end(self, reason: str = "") -> None:
        """Nothing is kept from here on; *reason* says why, where that is a misfortune."""
        self._move(_ON_END)
        self._ended(reason)
        self._outgoing.clear()
        for closed in self._closes.values():
            closed.set()
        self._closes.clear()
        actions = [*self._sent_actions, *self._actions]
        self._sent_actions, self._actions = [], []
        _call(actions)
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
