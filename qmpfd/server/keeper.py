"""Keeps a second copy of what is stored where a crash does not reach it.

That is with whoever started the daemon: systemd's file-descriptor store, or the parent of ``serve
--supervise``, which speaks the same protocol (sd_pid_notify_with_fds(3)).  Each descriptor goes
there under a name of its own; what it is stands in the journal, which is there as well.

The rule is that nobody is told of what a crash would take back.  A change is made, written to the
journal and sent off without waiting; then whoever has something to say waits in :meth:`settle`
until the other side has it.  Nothing is acknowledged there but a barrier, which stands for all that
was sent before it: one is under way at a time, and whatever comes meanwhile shares the next.

A removed descriptor is closed here after it was closed there.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from collections import deque
from collections.abc import AsyncGenerator, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import NamedTuple

import trio

from ..closing import Closer, Risk
from ..descriptions import Descriptions
from ..errors import GenericError
from ..fd import Fd, close_all
from ..fdsets import FdSet, FdSets, StoredFd
from ..limits import JOURNAL_FORMAT, KEEPER_SPARE, MIN_JOURNAL_BYTES
from ..systemd import Notifier
from .journal import (
    RECORD_BYTES,
    REMOVAL_BYTES,
    Added,
    Begun,
    Confirmed,
    Ended,
    Journal,
    Left,
    Listens,
    Record,
    Removed,
    frame,
)
from .listener import UnixListener
from .names import PREVIOUS, Names, journal_name

_log = logging.getLogger("qmpfd")

#: Seconds until the next try where the kernel has no room for a message, and does not tell when.
_RETRY = 0.01

#: sendmsg(2), unix(7): no room now, for the message or the descriptor with it.
_NO_ROOM = {errno.ETOOMANYREFS, errno.ENOBUFS, errno.ENOMEM}


@dataclass(slots=True, eq=False)
class _Kept:
    """A descriptor at the keeper.

    Args:
        name: what it is called there.
        numbers: the stored descriptors here that rest on it: all of one open file description.
    """

    name: str
    numbers: dict[int, None]


@dataclass(slots=True)
class Holdings:
    """What the keeper has from before.

    Args:
        names: the names of stored descriptors and listening sockets, by their number here.
        others: names of what is of no use any more.
        generation: of the last journal.
        valid: that journal counts, until there is another.
    """

    names: Mapping[int, str] = field(default_factory=dict)
    others: Sequence[str] = ()
    generation: int = 0
    valid: bool = False


class Keeping(NamedTuple):
    """Who keeps a second copy.

    Args:
        notifier: the connection to it; the caller's, until the daemon has ended.
        size: how many descriptors it keeps.
        descriptions: where it keeps one descriptor of each open file description only, what tells
            which are of the same; None where it keeps all.
    """

    notifier: Notifier
    size: int
    descriptions: Descriptions | None


class Keeper:
    """Whoever keeps the second copy, as seen from here.

    Args:
        keeping: how it is reached, and what it does.
        closer: closes what was removed.
    """

    def __init__(self, keeping: Keeping, closer: Closer) -> None:
        self._notifier = keeping.notifier
        self._closer = closer
        self._capacity = min(keeping.size - KEEPER_SPARE, Names.MOST)
        self._descriptions = keeping.descriptions
        self._names = Names()
        self._kept: dict[int, _Kept] = {}
        self._listeners: dict[int, str | None] = {}  # the paths, by number
        self._store = FdSets()
        self._previous: str | None = None

        self._journals: list[Journal] = []  # the last one counts; before it, one that it replaces
        self._generation = 0
        self._journal_limit = MIN_JOURNAL_BYTES
        self._turned_at: int | None = None  # the change with which the last journal is there
        self._records: list[Record] = []  # not written yet

        self._changes = 0  # so far
        self._settled = 0  # of these, how many are known to be there
        self._outgoing: deque[tuple[str, Fd | int | None]] = deque()
        self._freed: deque[tuple[int, str]] = deque()  # names, free once that change is settled
        self._condemned: deque[tuple[int, list[Fd]]] = deque()  # to be closed, likewise
        self._pipe: tuple[Fd, Fd] | None = None  # for the next barrier
        self._barrier: tuple[int, Fd, Fd] | None = None  # stands for so many changes
        self._watched = False  # somebody waits for it
        self._blocked: float | None = None  # no room: seconds until the next try, 0 for a signal
        self._waiting = trio.lowlevel.ParkingLot()
        self._idle: trio.Event | None = None
        self._scope = trio.CancelScope()
        #: Nothing is kept any more.
        self.is_over = False

    # -- what the commands see -----------------------------------------------------------------

    def check_room(self, count: int, opaque: str | None) -> None:
        """Refuse to add *count* more descriptors, each with that opaque text, if they cannot be
        kept.

        Raises:
            GenericError: saying why.
        """
        if self.is_over:
            raise GenericError(
                "The file descriptor cannot be kept safe: whoever supervised this daemon is gone "
                "(qmpfd serve --takeover --supervise starts one in its place)"
            )
        if len(self._names) + count > self._capacity:
            raise GenericError(
                f"Too many file descriptors: the limit of those kept safe is {self._capacity}"
            )
        # Of each that is there, the removal can be written too.
        size = count * (4 * len(opaque or "") + RECORD_BYTES) + len(self._kept) * REMOVAL_BYTES
        try:
            for journal in self._journals:
                journal.reserve(size)
        except OSError as exc:
            raise GenericError(f"The file descriptor cannot be kept safe: {exc.strerror}") from None

    def added(self, fdset: FdSet, stored: StoredFd) -> None:
        """A descriptor was stored: keep it too, unless it ends with its connection anyway."""
        if self.is_over or stored.terms.owner is not None:
            return
        self._changes += 1
        self._keep(stored.fd.fileno(), stored.fd)
        self._records.append(self._record(fdset.id, stored))

    def removed(self, stored: StoredFd) -> None:
        """A descriptor was taken out of the store; it is still open."""
        number = stored.fd.fileno()
        kept = self._kept.pop(number, None)
        if kept is None or self.is_over:
            return
        self._changes += 1
        self._records.append(Removed(number))
        del kept.numbers[number]
        others = next(iter(kept.numbers), None)
        if self._descriptions is not None:
            self._descriptions.replace(number, others)
        if others is None:
            self._outgoing.append((_remove(kept.name) + self._hint(number), None))
            self._freed.append((self._changes, kept.name))

    def _keep(self, number: int, fd: Fd | int, name: str | None = None) -> None:
        """Have a descriptor kept: under *name*, where it is already, or a new one."""
        descriptions = self._descriptions
        if descriptions is not None:
            same = descriptions.find(number)
            if same is not None:
                kept = self._kept[number] = self._kept[same]
                kept.numbers[number] = None
                return
            descriptions.add(number)
        if name is None:
            name = self._names.take()
            self._outgoing.append((_store(name), fd))
        self._kept[number] = _Kept(name, {number: None})

    def _hint(self, number: int) -> str:
        """Tell the parent if the close may block.  A service manager closes in a thread anyway."""
        if self._notifier.is_parent:
            with suppress(OSError):
                return "\nQMPFD_CLOSE=slow" if self._closer.risk(number) is Risk.HIGH else ""
        return ""

    def _record(self, fdset_id: int, stored: StoredFd) -> Added:
        number, terms = stored.fd.fileno(), stored.terms
        offset = time.monotonic() - trio.current_time()
        expires = terms.expires_at
        return Added(
            self._kept[number].name,
            fdset_id,
            number,
            stored.opaque,
            stored.added_by,
            stored.added_at + offset,
            None if expires is None else expires + offset,
            terms.watch_hangup,
        )

    # -- waiting until it is safe --------------------------------------------------------------

    @property
    def is_settled(self) -> bool:
        """Whether all that was changed is safe."""
        return self._settled == self._changes

    async def settle(self) -> None:
        """Wait until all that was changed so far is safe; without a checkpoint if it is."""
        wanted = self._changes
        if self._settled >= wanted:
            return
        self._push(wake=False)
        while self._settled < wanted:
            if self._barrier is not None and not self._watched:
                await self._await_barrier()
            else:
                self._wake()
                await self._waiting.park()

    def close_settled(self, fds: list[Fd]) -> None:
        """Close what was removed, once it is gone from the keeper; owned from here on."""
        if self.is_settled:
            self._closer.close(fds)
        else:
            self._condemned.append((self._changes, fds))
            self._push()

    def _push(self, *, wake: bool = True) -> None:
        """Do all that can be done without waiting, and see to the rest, unless the caller does."""
        if not self.is_over:
            self._write()
        try:
            self._send()
        except OSError as exc:
            self._end(f"the descriptors are no longer kept safe: {exc.strerror or exc}")
        if wake:
            self._wake()

    def _wake(self) -> None:
        """Have the keeper's own task look whether there is something for it to wait for."""
        if self._idle is not None:
            self._idle.set()

    async def _await_barrier(self) -> None:
        """Wait for the barrier that is under way.  One of those who need it does, so that no task
        has to be woken for it; if that is cancelled, the keeper's own goes on.
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
        if not self.is_settled:
            self._push()

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
        if self._barrier is None and not self.is_settled:
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

    def _write(self) -> None:
        """Write the journal: what was changed in one critical section is one frame."""
        if not self._records:
            return
        data = frame(self._records)
        self._records.clear()
        try:
            for journal in self._journals:
                journal.append(data)
        except OSError as exc:  # more than was reserved, and no memory
            self._end(f"the descriptors are no longer kept safe: {exc.strerror}")
            return
        if self._turned_at is None and self._journals[-1].size > self._journal_limit:
            try:
                self._begin_journal()
            except OSError:  # out of descriptors, or memory: another time
                self._journal_limit += MIN_JOURNAL_BYTES

    # -- the journal ---------------------------------------------------------------------------

    def _snapshot(self, generation: int) -> Iterator[Record]:
        yield Begun(JOURNAL_FORMAT, generation, self._previous)
        for number, path in self._listeners.items():
            yield Listens(self._kept[number].name, path)
        for fdset in self._store:
            for number, stored in fdset.fds.items():
                if number in self._kept:
                    yield self._record(fdset.id, stored)

    def _begin_journal(self) -> None:
        """Begin another journal.  Until it is there, both are written, so either is right."""
        journal = Journal(self._snapshot(self._generation + 1))
        self._generation += 1
        self._journals.append(journal)
        self._journal_limit = max(MIN_JOURNAL_BYTES, 4 * journal.size)
        self._changes += 1
        self._turned_at = self._changes
        self._outgoing.append((_store(journal_name(self._generation)), journal.fd))

    def _end_journals(self) -> None:
        """The last journal is there: the one before is not needed any more."""
        self._turned_at = None
        generation = self._generation - len(self._journals) + 1
        for journal in self._journals[:-1]:
            self._changes += 1
            self._outgoing.append((_remove(journal_name(generation)), None))
            generation += 1
            journal.close()
        del self._journals[:-1]

    @property
    def store(self) -> str | None:
        """Which service's it is, where it is a service manager's store (systemd.exec(5))."""
        return None if self._notifier.is_parent else os.environ.get("INVOCATION_ID")

    @property
    def journal(self) -> Fd | None:
        """The journal, for a successor: it tells whether the takeover was done."""
        return None if self.is_over else self._journals[-1].fd

    # -- its life ------------------------------------------------------------------------------

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[None, None]:
        """Talk to the keeper while the block runs."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._run)
                yield
                nursery.cancel_scope.cancel()
        finally:
            self._end(None)

    async def start(
        self,
        store: FdSets,
        listeners: Iterable[UnixListener],
        holdings: Holdings,
        previous: Fd | None,
    ) -> None:
        """Have all of it kept, before anybody is served.

        Args:
            store: where the changes come from, from here on.
            listeners: the sockets that are to be kept.
            holdings: what is there from before.
            previous: what tells whether the daemon that all this is of has let go; None if it is
                ours.

        Raises:
            GenericError: it is more than can be kept.
            OSError: there is no descriptor, or no memory, for the journal.
        """
        self._store = store
        self._generation = holdings.generation
        for name in {*holdings.names.values(), *holdings.others}:
            self._names.claim(name)
        if not holdings.valid:  # before anything new could have the same names
            self._let_go(holdings.others)
        if previous is not None:
            self._capacity -= 1
        for fdset in store:
            for number, stored in fdset.fds.items():
                if stored.terms.owner is None:
                    self._keep(number, stored.fd, holdings.names.get(number))
        for listener in listeners:
            number = listener.socket.fileno()
            if number in holdings.names or len(self._names) < self._capacity:  # it can be made anew
                self._keep(number, number, holdings.names.get(number))
                self._listeners[number] = None if listener.path is None else str(listener.path)
        if len(self._names) > self._capacity:
            raise GenericError(
                f"{len(self._names)} descriptors are more than the {self._capacity} that can be "
                "kept safe"
            )
        if previous is not None:
            self._previous = PREVIOUS
            self._outgoing.append((_store(PREVIOUS), previous))
        # The journal comes last: without it, the others count for nothing.
        self._begin_journal()
        self._pipe = _pipe()
        await self.settle()
        if holdings.valid:
            self._let_go(holdings.others)
        used = {kept.name for kept in self._kept.values()}
        self._let_go(set(holdings.names.values()) - used)
        await self.settle()

    def _let_go(self, names: Iterable[str]) -> None:
        for name in names:
            self._changes += 1
            self._outgoing.append((_remove(name), None))
            self._freed.append((self._changes, name))

    def confirm(self) -> None:
        """A takeover is done: all this is ours."""
        self._previous = None
        self._capacity += 1
        self._note(Confirmed(), PREVIOUS)

    def prepare_to_leave(self, leaves: bool) -> None:
        """A successor is about to have it all, or will not: for whoever asks if we die now."""
        self._note(Left(leaves))

    def leave(self) -> None:
        """What is kept is to be let go, also if we die this moment; note no more changes."""
        self._note(Left(True))
        self._forget()
        self._kept.clear()

    def finish(self) -> None:
        """The daemon ends.  What is stored stays with a service manager, which may start another
        daemon; the listening sockets do not.
        """
        for number in self._listeners:
            if not self.is_over:
                kept = self._kept[number]
                del kept.numbers[number]
                self._note(Ended(kept.name), None if kept.numbers else kept.name)
        self._listeners.clear()

    def _note(self, record: Record, removed: str | None = None) -> None:
        if not self.is_over:
            self._changes += 1
            self._records.append(record)
            if removed is not None:
                self._outgoing.append((_remove(removed), None))
            self._push()

    def _forget(self) -> None:
        """Have all of it closed there, the journal first: without it the rest means nothing."""
        if not self.is_over:
            self._changes += 1
            generation = self._generation - len(self._journals) + 1
            for number in range(generation, self._generation + 1):
                self._outgoing.append((_remove(journal_name(number)), None))
            for kept in set(self._kept.values()):
                hint = self._hint(next(iter(kept.numbers)))
                self._outgoing.append((_remove(kept.name) + hint, None))
            self._push()

    def detach(self) -> None:
        """Note no more changes."""
        self._end(None)

    def _end(self, reason: str | None) -> None:
        """Nothing is kept from here on; *reason* says why, where that is a misfortune."""
        if not self.is_over:
            self.is_over = True
            if reason is not None:
                _log.error("%s; no more can be added", reason)
        self._records.clear()
        self._outgoing.clear()
        self._kept.clear()
        self._advance(self._changes)
        for journal in self._journals:
            journal.close()
        if self._pipe is not None:
            close_all(self._pipe)
            self._pipe = None
        self._scope.cancel()

    async def _run(self) -> None:
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    if self._notifier.is_parent:
                        nursery.start_soon(self._watch)
                    await self._talk()
        finally:
            self._end_barrier()
            if self._pipe is not None:
                close_all(self._pipe)
                self._pipe = None

    async def _talk(self) -> None:
        while True:
            self._push()
            if self._blocked is not None:
                await trio.sleep(self._blocked)
                await trio.lowlevel.wait_writable(self._notifier)
            elif self._barrier is not None and not self._watched:
                await self._await_barrier()
            else:
                self._idle = trio.Event()
                await self._idle.wait()
                self._idle = None

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
        self._settled = changes
        while self._freed and self._freed[0][0] <= changes:
            self._names.free(self._freed.popleft()[1])
        while self._condemned and self._condemned[0][0] <= changes:
            self._closer.close(self._condemned.popleft()[1])
        if self._turned_at is not None and self._turned_at <= changes and not self.is_over:
            self._end_journals()
        self._waiting.unpark_all()

    async def _watch(self) -> None:
        """The parent never says anything: it can be heard only when it is gone."""
        await trio.lowlevel.wait_readable(self._notifier)
        self._end("the descriptors are no longer kept safe: the supervising process is gone")


def _store(name: str) -> str:
    # What hangs up stays: whether it may go is for its client to say.
    return f"FDSTORE=1\nFDNAME={name}\nFDPOLL=0"


def _remove(name: str) -> str:
    return f"FDSTOREREMOVE=1\nFDNAME={name}"


def _pipe() -> tuple[Fd, Fd]:
    reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    return Fd(reader), Fd(writer)
