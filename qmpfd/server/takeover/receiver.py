"""The newcomer's side of a takeover.

:func:`prepare` runs before anything is imported that opens descriptors: it learns what is stored,
and has something open under each number that a stored descriptor will have, and under those that
may be added to them.  While the old daemon goes on serving, the newcomer gets ready; then
:meth:`Takeover.receive_rest` has the old daemon pause, and fetches all descriptors.

The old daemon owns everything until it has said DONE, see :mod:`.sender`.  Whatever happens before,
the duplicates here are closed and it goes on as if nothing had been.
"""

from __future__ import annotations

import errno
import logging
import os
import resource
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from ...client.blocking import BlockingClient, NoDaemon
from ...kernel.fd import Fd, close_all, receive
from ...limits import SCM_MAX_FD, TAKEOVER_FORMAT, TAKEOVER_TIMEOUT, Limits
from ..fdstore.evidence import has_handed_over
from ..renumber import Movable, renumber
from ..saved_state import CONFIRM, DONE, MORE, NEXT, REFUSED, SavedState, decode, unpack

if TYPE_CHECKING:
    from ..connection.snapshot import SavedRest

_log = logging.getLogger("qmpfd")


#: Messages with descriptors that are asked for before the first of them has come, so that the old
#: daemon sends one while this process takes another in.  Not more: what is on its way counts for
#: the user of the old daemon (ETOOMANYREFS, unix(7)).
_ASKED_AHEAD = 4

#: Numbers above the stored ones that are kept free for what is stored before the old daemon pauses;
#: and how many more this process has to have then, or else it does without.
_AHEAD, _ROOM = 256, 1024


class Takeover:
    """A takeover that is under way, as the newcomer sees it.

    Args:
        state: what is stored, and may change.
        old: the old daemon.
        progress: told how many descriptors have come, of how many.
    """

    def __init__(
        self, state: SavedState, old: _Predecessor, progress: Callable[[int, int], None]
    ) -> None:
        self.state = state
        #: What is open in place of each stored descriptor, by its number there; owned by whoever
        #: stores it, in the end.
        self.stored: dict[int, Fd] = {}
        #: The old daemon's journal, if it is one that is started again when it dies.
        self.journal: Fd | None = None
        #: All of it is ours.
        self.confirmed = False
        #: Called when everything is ready for the old daemon to be paused.
        self.before_pausing: Callable[[], object] = lambda: None
        #: Called when there is no way back any more, or will not be in a moment.
        self.before_confirming: Callable[[], object] = lambda: None
        self._old = old
        self._progress = progress
        self._fillers: dict[int, Fd] = {}  # what keeps other numbers free
        #: What else has come once the old daemon was paused, in the order of :class:`SavedRest`;
        #: owned here until it is taken out.
        self.others: deque[Fd] = deque()

    def reserve(self, movable: Iterable[Movable]) -> None:
        """Have something open under each number that is needed, and may be.

        Args:
            movable: descriptors that are open here and may get other numbers.

        Raises:
            OSError: this process may not have so many.
        """
        numbers = self.state.stored_numbers
        self._fill(numbers, movable)
        end = max(numbers, default=0) + _AHEAD
        most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        with Fd(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)) as null:
            while end + _ROOM < most:
                filler = null.dup()
                self._fillers[filler.fileno()] = filler
                if filler.fileno() >= end:
                    break

    def _fill(self, numbers: Sequence[int], movable: Iterable[Movable] = ()) -> None:
        """Have something open under each of *numbers*, in place of what will be stored there."""
        if not numbers:
            return
        with Fd(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)) as null:
            for number in numbers:
                filler = self._fillers.pop(number, None)
                self.stored[number] = null.dup() if filler is None else filler
            places = {number: self.stored[number] for number in numbers}
            renumber(places, [*movable, *self._movable, null])

    def receive_rest(self, drop: Callable[[list[int]], None]) -> SavedRest:
        """Have the old daemon pause, and fetch what is left: all descriptors, above all.

        Args:
            drop: called with the numbers of what is stored no more, to give it up.

        Raises:
            NoDaemon: it gives up, or does not answer.
            ValueError: what it sends cannot be used here.
        """
        self.before_pausing()
        began = time.monotonic()
        try:
            rest = self._receive_state()
            drop(rest.removed)
            for number in rest.removed:
                del self.stored[number]
            self._fill([fd.number for fd in rest.added])
            self._receive_fds(len(self.stored) + rest.others)
        except TimeoutError:
            raise NoDaemon("the old daemon does not answer") from None
        except NoDaemon:
            raise
        except OSError as exc:
            raise unusable(exc) from None
        if rest.journal:
            self.journal = self.others.pop()
        _log.info(
            "received %d descriptors and %d connections in %.2f s",
            len(self.stored),
            len(rest.sessions),
            time.monotonic() - began,
        )
        return rest

    def _receive_state(self) -> SavedRest:
        from ..connection.snapshot import SavedRest  # noqa: PLC0415 - Trio is there by now

        said, passed, _ = self._old.ask(NEXT)
        try:
            if said != MORE or len(passed) != 1:
                raise NoDaemon("the old daemon exited before it had sent everything")
            return unpack(read_all(passed[0]), SavedRest)
        finally:
            close_all(passed)

    @property
    def _movable(self) -> list[Movable]:
        """What may get other numbers."""
        return [*self._fillers.values(), self._old, self.lifeline]

    def _receive_fds(self, total: int) -> None:
        """Receive all descriptors, those that are stored in their places.

        They come by ascending numbers, and the kernel gives each the lowest number that is free: so
        with all others taken, each comes where it belongs.
        """
        places = [self.stored[number] for number in sorted(self.stored)]
        targets = [place.fileno() for place in places]
        close_all(places)
        fds = self.others
        asked = 0
        while len(fds) < total:
            # No more than have to come: the old daemon expects CONFIRM after the last.
            more = min(_ASKED_AHEAD, -(-(total - len(fds)) // SCM_MAX_FD)) - asked
            self._old.say(NEXT * more)
            said, chunk, dropped = self._old.hear()
            asked += more - 1
            fds += chunk
            if dropped:
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            if said != MORE or not chunk or len(fds) > total:
                raise NoDaemon("the old daemon exited before it had sent everything")
            self._progress(len(fds), total)
        stored = {target: fds.popleft() for target in targets}
        try:
            renumber(stored, [*fds, *self._movable])
            for place, (target, fd) in zip(places, stored.items(), strict=True):
                if fd.number != target:
                    raise ValueError(f"descriptor {target} is in use in this process already")
                place.adopt(fd)
        finally:
            close_all(stored.values())
        close_all(self._fillers.values())
        self._fillers.clear()

    def confirm(self) -> None:
        """Everything is in its place: take over.

        Raises:
            NoDaemon: it has kept everything, and goes on.
        """
        self.before_confirming()
        self._old.let_go(self.journal)
        self.confirmed = True
        self.close()

    @property
    def lifeline(self) -> Fd:
        """What the old daemon says on how the takeover ends; see :mod:`..fdstore.evidence`."""
        return self._old.lifeline

    def close(self) -> None:
        """Give up what was not taken out: the connection last, by which the old daemon knows."""
        close_all(self.stored.values() if not self.confirmed else ())
        close_all(self._fillers.values())
        close_all(self.others)
        if self.journal is not None:
            self.journal.close()
        self._old.close()


class _Predecessor:
    """The old daemon, while it hands over.  It has :data:`TAKEOVER_TIMEOUT` for each answer.

    Args:
        sock: the connection to it; owned from here on.
        lifeline: what it says on how the takeover ends; likewise.
    """

    def __init__(self, sock: socket.socket, lifeline: Fd) -> None:
        self.lifeline = lifeline
        self._sock = sock

    def fileno(self) -> int:
        """Of the connection."""
        return self._sock.fileno()

    def move_to(self, number: int) -> None:
        """As :meth:`qmpfd.kernel.fd.Fd.move_to`."""
        with Fd(self._sock.detach()) as fd:
            fd.move_to(number)
            self._sock = socket.socket(fileno=fd.detach())

    def say(self, requests: bytes) -> None:
        """Say something.

        Raises:
            TimeoutError: it does not read.
        """
        self._sock.settimeout(TAKEOVER_TIMEOUT)
        try:
            self._sock.sendall(requests)
        except ConnectionError:
            pass  # it has closed the connection; what it said before that is still here

    def hear(self) -> tuple[bytes, list[Fd], str]:
        """What it says next, see :func:`qmpfd.kernel.fd.receive`; empty once it is gone.

        Raises:
            NoDaemon: it has given up the takeover.
            TimeoutError: it does not answer.
        """
        try:
            answer = receive(self._sock, 1)
        except ConnectionError:
            return b"", [], ""
        if answer[0] == REFUSED:
            raise NoDaemon("the old daemon cancelled the takeover and goes on")
        return answer

    def ask(self, request: bytes) -> tuple[bytes, list[Fd], str]:
        """:meth:`say` and :meth:`hear`."""
        self.say(request)
        return self.hear()

    def let_go(self, journal: Fd | None) -> None:
        """Have it leave everything to us, and wait until it has.

        Args:
            journal: where it says so too, if it is started again when it dies.

        Raises:
            NoDaemon: it goes on.
        """
        try:
            answer, _, _ = self.ask(CONFIRM)
        except TimeoutError:
            # From here on it cannot say so any more; or it has at the last moment.
            self._sock.shutdown(socket.SHUT_RDWR)
            answer, _, _ = self.hear()
            if answer != DONE:
                raise NoDaemon(
                    "the old daemon does not answer: it keeps its fd sets and connections"
                ) from None
        if answer == DONE:
            # It closes all that it has, and the connection last.  Whatever keeps it from that, it
            # serves nobody any more.
            try:
                self.hear()
            except TimeoutError:
                pass
        elif not has_handed_over(self.lifeline, journal, TAKEOVER_TIMEOUT):
            raise NoDaemon(
                "the old daemon did not confirm the takeover: it goes on, or its parent starts it "
                "again with all it had"
            )

    def close(self) -> None:
        """Close the connection, and the lifeline."""
        self._sock.close()
        self.lifeline.close()


def prepare(
    path: str | os.PathLike[str],
    progress: Callable[[int, int], None],
    movable: Iterable[Movable] = (),
) -> Takeover:
    """Begin to take over from the daemon that serves *path*, which goes on serving.

    Args:
        path: its socket.
        progress: told how many descriptors have come, of how many, once they come.
        movable: descriptors that are open here and may get other numbers.

    Raises:
        NoDaemon: nobody serves there.
        QMPError: it refuses: this user may not, or it is a newer version.
        ValueError: what it sends cannot be used here.
        MemoryError: this process is out of memory.
    """
    with BlockingClient(path, TAKEOVER_TIMEOUT) as client:
        _, passed = client.request("takeover", {"format": TAKEOVER_FORMAT})
        if len(passed) != 2:
            close_all(passed)
            raise ValueError("the daemon sends no state")
        memory, lifeline = passed
        old = _Predecessor(client.detach(), lifeline)
    with ExitStack() as stack:
        stack.callback(old.close)
        stack.callback(memory.close)
        try:
            state = decode(read_all(memory))
            memory.close()
            most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
            if len(state.stored_numbers) > Limits(max_fds=most).within(most).max_fds:
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            takeover = Takeover(state, old, progress)
            stack.callback(takeover.close)
            takeover.reserve(movable)
        except OSError as exc:
            raise unusable(exc) from None
        stack.pop_all()
    return takeover


def read_all(memory: Fd) -> bytes:
    """All that is in the file behind *memory*."""
    size = os.lseek(memory.fileno(), 0, os.SEEK_END)
    return os.pread(memory.fileno(), size, 0)


def unusable(error: OSError) -> ValueError:
    """Why what the old daemon has cannot be had here."""
    if error.errno in (errno.EMFILE, errno.EINVAL, errno.EBADF):  # fcntl(2), dup(2)
        most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        return ValueError(f"the limit of {most} open files is too low (ulimit -n)")
    return ValueError(error.strerror or str(error))
