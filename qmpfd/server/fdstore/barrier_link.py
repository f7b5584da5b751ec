"""Connection to the fd store: sends changes in batches, each followed by a barrier.

The acknowledgement of a barrier covers all messages sent before it.  One barrier is under way at a
time; changes made meanwhile, of all clients, are sent together before the next one (group commit).
Nothing is sent while a barrier is under way: of a batch, the removals are last, and so no place
becomes free between a descriptor and the probe behind it, see :mod:`.sentinel`.

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

from ...kernel.fd import Fd, FileDescriptorLike, close_all, pipe
from ...kernel.systemd import Notifier
from ...limits import SCM_MAX_FD
from .names import Names
from .outgoing import REMOVE, Outgoing

_log = logging.getLogger("qmpfd")

#: Seconds until a message is retried for which the kernel had no room: no event reports room.
_RETRY = 0.01

#: Barrier for the parent, with its number, see :mod:`qmpfd.supervisor`.
_SYNC = "QMPFD_SYNC="

_PARENT_GONE = (
    "the parent process is gone (qmpfd serve --takeover --supervise starts a new one, and nothing "
    "is lost)"
)

#: Errors of sendmsg(2): no room now for the message, or for the descriptor with it (unix(7)).
_NO_ROOM = {errno.ETOOMANYREFS, errno.ENOBUFS, errno.ENOMEM, errno.EMFILE, errno.ENFILE}


class State(Enum):
    """State of the connection to the fd store."""

    SYNCED = auto()  #: every change is acknowledged
    CHANGED = auto()  #: changes are pending, no barrier is under way
    BLOCKED = auto()  #: as CHANGED, and the kernel had no room for a message
    SENT = auto()  #: the barrier under way covers every change
    SENT_CHANGED = auto()  #: the barrier under way does not cover the latest changes
    OVER = auto()  #: the connection has ended: nothing is sent any more

    # Hash by identity: Enum.__hash__ is a Python function, and slow as a dict key.
    __hash__ = object.__hash__


#: The transitions of each event; in a state that is not listed, the event changes nothing.
_ON_CHANGE = {State.SYNCED: State.CHANGED, State.SENT: State.SENT_CHANGED}
_ON_NO_ROOM = {State.CHANGED: State.BLOCKED}
_ON_BARRIER = {State.CHANGED: State.SENT, State.BLOCKED: State.SENT}
_ON_LOST = {State.SENT: State.BLOCKED, State.SENT_CHANGED: State.BLOCKED}
_ON_ANSWER = {State.SENT: State.SYNCED, State.SENT_CHANGED: State.CHANGED}
_ON_END = dict.fromkeys(State, State.OVER)

# local names: looking up an Enum member is slow before Python 3.12
_SYNCED, _CHANGED, _SENT, _OVER = State.SYNCED, State.CHANGED, State.SENT, State.OVER


def _call(actions: Iterable[Callable[[], object]]) -> None:
    """Call each of *actions*; an exception in one is logged, and the others are called."""
    for action in actions:
        try:
            action()
        except Exception:  # noqa: BLE001 - other clients' replies depend on the other actions
            _log.exception("what waited for the fd store failed")


class BarrierLink:
    """Connection to the fd store.

    Args:
        notifier: socket to the fd store; the caller keeps it open until the daemon has ended.
        write: writes the journal before the changes are sent; called with whether a barrier
            follows.  If it raises OSError, the connection ends.
        ended: called when the connection has ended; with the reason, or "" at a regular end.
    """

    def __init__(
        self, notifier: Notifier, write: Callable[[bool], None], ended: Callable[[str], None]
    ) -> None:
        self._notifier = notifier
        self._write = write
        self._ended = ended
        self._state = State.SYNCED
        self._outgoing = Outgoing(SCM_MAX_FD if notifier.is_parent else 1)
        # Actions that wait for the barrier under way, and for the one after it; and names that
        # become free with the latter.
        self._sent_actions: list[Callable[[], object]] = []
        self._actions: list[Callable[[], object]] = []
        self._removed: list[str] = []
        self._closes: dict[str, threading.Event] = {}  # close(2) calls in the parent, by name
        self._pipe: tuple[Fd, Fd] | None = None  # for the next barrier
        self._reader: tuple[Fd, Fd] | None = None  # read ends of the barrier under way
        self._work = trio.Event()  # set when the link's task has something to do
        self._scope = trio.CancelScope()
        notifier.on_message = self._handle_message
        #: The names in use in the fd store.
        self.names = Names()
        #: Number of barriers sent.
        self.barriers = 0

    # -- changes -------------------------------------------------------------------------------

    @property
    def is_over(self) -> bool:
        """Whether the connection has ended."""
        return self._state is _OVER

    @property
    def last_queued(self) -> str | None:
        """Name of the last descriptor that is queued to be stored; None if there is none."""
        return self._outgoing.last

    def store(self, name: str, fd: FileDescriptorLike) -> None:
        """Queue a descriptor to be stored under *name*."""
        self._outgoing.store(name, fd)
        self.changed()

    def remove(self, *names: str, command: str = REMOVE) -> None:
        """Queue the removal of *names*, which are free once a barrier has covered it."""
        for name in names:
            if not self._outgoing.remove(command, name):
                self._note_closed(name)
        self._removed += names
        self.changed()

    def remove_slowly(self, name: str, lane: str) -> threading.Event:
        """Queue the removal of a descriptor whose close(2) may block in the parent.  Return an
        event that is set when the parent has closed it.

        Args:
            name: the descriptor's name.
            lane: lane of descriptors whose closes may hang together, see :meth:`ClosePool.lane`.
        """
        closed = self._closes[name] = threading.Event()
        self.remove(name, command=f"{REMOVE}\nQMPFD_CLOSE={lane}")
        return closed

    def discard(self, name: str) -> None:
        """Queue the removal of *name* without a barrier: it is sent with the next change."""
        self._outgoing.queue(f"{REMOVE}\nFDNAME={name}")

    def queue(self, text: str) -> None:
        """Queue a message that concerns no descriptor."""
        self._outgoing.queue(text)
        self.changed()

    def changed(self) -> None:
        """Note a change: journal or queue have something to write or send."""
        self._state = _ON_CHANGE.get(self._state, self._state)

    def _move(self, transitions: dict[State, State]) -> None:
        self._state = transitions.get(self._state, self._state)

    # -- waiting for acknowledgement -----------------------------------------------------------

    @property
    def is_synced(self) -> bool:
        """Whether every change is acknowledged, or the connection has ended."""
        return self._state is _SYNCED or self._state is _OVER

    def on_synced(self, action: Callable[[], object], *, first: bool = False) -> None:
        """Call *action* when every change made so far is acknowledged, or the connection has
        ended; with *first*, which requires that no barrier is under way, before all others.
        """
        if self.is_synced:
            action()
        elif self._state is _SENT:
            self._sent_actions.append(action)
        else:
            self._actions.insert(0 if first else len(self._actions), action)

    async def sync(self) -> None:
        """Wait until every change made so far is acknowledged; without a checkpoint if it is."""
        if self.is_synced:
            return
        synced = trio.Event()
        self.on_synced(synced.set)
        self.start()
        if not synced.is_set():
            await synced.wait()

    def start(self) -> None:
        """Send the changes made so far, unless a barrier is under way: its acknowledgement then
        sends them.
        """
        if self._state is _CHANGED:
            self.push()

    def push(self) -> None:
        """Write the journal; unless a barrier is under way, send the queue and a barrier.  What
        does not fit is sent later by the link's task.  The parent's acknowledgement is awaited
        here, without a checkpoint, until the kernel's next tick at most.
        """
        if self._state is _OVER:
            return
        barrier = self._state in _ON_BARRIER
        try:
            self._write(barrier)
            if self._state not in _ON_ANSWER:
                self._send(barrier)
        except OSError as exc:
            gone = self._notifier.is_parent and isinstance(exc, ConnectionError)
            self.end(_PARENT_GONE if gone else exc.strerror or str(exc))
        if barrier and self._state is _SENT and self._notifier.is_parent:
            # The parent acknowledges in less time than a pass of the event loop takes.
            self._receive(wait=True)
        if self._state is State.BLOCKED or self._reader is not None:
            self._work.set()

    def _send(self, barrier: bool) -> None:
        """Send the queued messages, and then a *barrier*.

        Raises:
            OSError: the receiver has closed its socket.
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
            # The duplicate reserves a place in the descriptor table for the next pipe.
            self._reader = reader, reader.dup()
            self._pipe = None
        self._barrier_sent()

    def _barrier_sent(self) -> None:
        self.barriers += 1
        self._state = _ON_BARRIER[self._state]
        self._sent_actions += self._actions
        self._actions.clear()
        if self._removed:
            self._sent_actions.append(partial(self.names.free, self._removed))
            self._removed = []

    def _acknowledged(self) -> None:
        """Handle the acknowledgement of the barrier under way."""
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
        """Create the pipe of the first barrier.

        Raises:
            OSError: this process is out of descriptors.
        """
        if not self._notifier.is_parent:
            self._pipe = pipe()

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[None, None]:
        """Run the link's task while the block runs."""
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
        """Send what :meth:`push` could not, and wait for systemd's acknowledgements."""
        while True:  # noqa: ASYNC913 - each way round waits
            if self._state is State.BLOCKED:
                await trio.sleep(_RETRY)
                await trio.lowlevel.wait_writable(self._notifier)
            elif self._reader is not None:
                with suppress(trio.ClosedResourceError):  # _close_pipes() was called
                    await trio.lowlevel.wait_readable(self._reader[0])
                    close_all(self._reader)
                    self._reader = None
                    self._acknowledged()
            else:
                await self._work.wait()
            self.push()
            self._work = trio.Event()

    async def _listen(self) -> None:
        """Receive the parent's messages, until it has ended."""
        while not self.is_over:
            await trio.lowlevel.wait_readable(self._notifier)
            self._receive()

    def _receive(self, *, wait: bool = False) -> None:
        try:
            self._notifier.receive(wait=wait)
        except EOFError:
            self.end(_PARENT_GONE)

    def _handle_message(self, message: str) -> None:
        if message == f"SYNCED={self.barriers}" and self._state in _ON_ANSWER:
            self._acknowledged()
            return
        key, _, value = message.partition("=")
        if key == "CLOSED":
            self._note_closed(value)
        elif key == "LOST" and self._outgoing.lost(value):
            # The parent had no room for the descriptor: replies wait until a second send stored it.
            self._move(_ON_LOST)
            self._work.set()

    def _note_closed(self, name: str) -> None:
        if closed := self._closes.pop(name, None):
            closed.set()

    def end(self, reason: str = "") -> None:
        """End the connection and call all waiting actions; *reason* is "" at a regular end, when
        the changes that wait for the barrier under way are still sent.
        """
        if not (reason or self.is_over):
            with suppress(OSError):  # the receiver has closed its socket
                self._send(False)
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
