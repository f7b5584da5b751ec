"""The successor's side of a takeover.

:func:`prepare` runs before the import of modules that open descriptors: it receives the description
of the store, and opens a placeholder at the number of each stored descriptor, and at those of
descriptors that may be added.  The successor gets ready while the predecessor goes on serving; then
:meth:`Takeover.receive_rest` makes the predecessor pause, and receives all descriptors.

The predecessor owns everything until it has sent DONE, see :mod:`.sender`.  If the takeover fails
before, the duplicates here are closed, and the predecessor goes on serving.
"""

from __future__ import annotations

import errno
import gc
import logging
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from ...client.blocking import BlockingClient, NoDaemon
from ...kernel.fd import Fd, close_all, open_files_limit, receive
from ...kernel.files import contents, open_null
from ...kernel.renumber import Movable, renumber
from ...limits import SCM_MAX_FD, TAKEOVER_FORMAT, TAKEOVER_TIMEOUT, Limits
from ..fdstore.handover import has_handed_over
from ..saved_state import CONFIRM, DONE, MORE, NEXT, REFUSED, SavedState, decode, unpack

if TYPE_CHECKING:
    from ..connection.snapshot import SavedRest

_log = logging.getLogger("qmpfd")


#: Messages with descriptors that are requested in advance: the predecessor sends one while this
#: process handles another.  Descriptors in flight are charged to the predecessor's user
#: (ETOOMANYREFS, unix(7)), hence no more.
_REQUESTS_AHEAD = 4

#: Numbers above the stored ones that are reserved for descriptors added before the predecessor
#: pauses; and numbers that must be left beyond those, or fewer are reserved.
_RESERVED, _LEFT = 256, 1024


class Takeover:
    """A takeover under way, on the successor's side.

    Args:
        state: the predecessor's state, which may still change.
        predecessor: connection to the predecessor.
        progress: called with the number of descriptors received, and of all.
    """

    def __init__(
        self, state: SavedState, predecessor: _Predecessor, progress: Callable[[int, int], None]
    ) -> None:
        self.state = state
        #: Placeholders, and later the stored descriptors, by number; owned by the store once they
        #: are stored.
        self.stored: dict[int, Fd] = {}
        #: The predecessor's journal, if its state survives a crash; or None.
        self.journal: Fd | None = None
        #: Whether this daemon owns everything.
        self.confirmed = False
        #: Called just before CONFIRM is sent, after which the takeover cannot be cancelled.
        self.before_confirming: Callable[[], object] = lambda: None
        self._predecessor = predecessor
        self._progress = progress
        self._fillers: dict[int, Fd] = {}  # placeholders at other reserved numbers
        #: Other descriptors of the paused predecessor, in the order of :class:`SavedRest`; owned
        #: here until they are taken out.
        self.others: deque[Fd] = deque()

    def reserve(self, movable: Iterable[Movable]) -> None:
        """Open a placeholder at each number that is needed, or may be.

        Args:
            movable: open descriptors of this process that may be moved out of the way.

        Raises:
            OSError: RLIMIT_NOFILE does not allow so many descriptors.
        """
        numbers = self.state.stored_numbers
        self._fill(numbers, movable)
        end = max(numbers, default=0) + _RESERVED
        most = open_files_limit()
        with open_null() as null:
            while end + _LEFT < most:
                filler = null.dup()
                self._fillers[filler.fileno()] = filler
                if filler.fileno() >= end:
                    break

    def _fill(self, numbers: Sequence[int], movable: Iterable[Movable] = ()) -> None:
        """Open a placeholder for a stored descriptor at each of *numbers*."""
        if not numbers:
            return
        with open_null() as null:
            for number in numbers:
                filler = self._fillers.pop(number, None)
                self.stored[number] = null.dup() if filler is None else filler
            places = {number: self.stored[number] for number in numbers}
            renumber(places, [*movable, *self._movable, null])

    def receive_rest(self, drop: Callable[[list[int]], None]) -> SavedRest:
        """Make the predecessor pause, and receive the rest of its state and all descriptors.

        Args:
            drop: called with the numbers of descriptors removed since; removes their placeholders.

        Raises:
            NoDaemon: the predecessor gives up, or does not answer.
            ValueError: its state is invalid, or this process has no room for it.
        """
        # A full garbage collection takes 20 ms: do it before the pause, and exempt what it keeps.
        gc.collect()
        gc.freeze()
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
        from ..connection.snapshot import SavedRest  # noqa: PLC0415 - Trio is imported by now

        message, passed, _ = self._predecessor.request(NEXT)
        try:
            if message != MORE or len(passed) != 1:
                raise NoDaemon("the old daemon exited before it had sent everything")
            return unpack(contents(passed[0]), SavedRest)
        finally:
            close_all(passed)

    @property
    def _movable(self) -> list[Movable]:
        """The takeover's own descriptors that may be moved out of the way."""
        return [*self._fillers.values(), self._predecessor, self.lifeline]

    def _receive_fds(self, total: int) -> None:
        """Receive all descriptors; the stored ones replace their placeholders.

        Descriptors come by ascending number, and the kernel gives each the lowest free number:
        with all other numbers occupied, each gets its own.
        """
        places = [self.stored[number] for number in sorted(self.stored)]
        targets = [place.fileno() for place in places]
        close_all(places)
        fds = self.others
        requested = 0
        while len(fds) < total:
            # Request no more than there are: after the last, the predecessor expects CONFIRM.
            more = min(_REQUESTS_AHEAD, -(-(total - len(fds)) // SCM_MAX_FD)) - requested
            self._predecessor.send(NEXT * more)
            message, chunk, dropped = self._predecessor.receive()
            requested += more - 1
            fds += chunk
            if dropped:
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            if message != MORE or not chunk or len(fds) > total:
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
        """Send CONFIRM, and wait until the predecessor has handed everything over.

        Raises:
            NoDaemon: the predecessor keeps everything, and goes on.
        """
        self.before_confirming()
        self._predecessor.await_handover(self.journal)
        self.confirmed = True
        self.close()

    @property
    def lifeline(self) -> Fd:
        """This end of the lifeline, on which the predecessor reports the outcome; see
        :mod:`..fdstore.handover`.
        """
        return self._predecessor.lifeline

    def close(self) -> None:
        """Close what was not taken out, and last the connection: the predecessor waits for EOF."""
        close_all(self.stored.values() if not self.confirmed else ())
        close_all(self._fillers.values())
        close_all(self.others)
        if self.journal is not None:
            self.journal.close()
        self._predecessor.close()


class _Predecessor:
    """Connection to the predecessor, which has :data:`TAKEOVER_TIMEOUT` for each answer.

    Args:
        sock: the connection; owned from here on.
        lifeline: this end of the lifeline; likewise.
    """

    def __init__(self, sock: socket.socket, lifeline: Fd) -> None:
        self.lifeline = lifeline
        self._sock = sock

    def fileno(self) -> int:
        """Number of the connection's descriptor."""
        return self._sock.fileno()

    def move_to(self, number: int) -> None:
        """As :meth:`qmpfd.kernel.fd.Fd.move_to`."""
        with Fd(self._sock.detach()) as fd:
            fd.move_to(number)
            self._sock = socket.socket(fileno=fd.detach())

    def send(self, requests: bytes) -> None:
        """Send requests.

        Raises:
            TimeoutError: the predecessor does not read.
        """
        self._sock.settimeout(TAKEOVER_TIMEOUT)
        try:
            self._sock.sendall(requests)
        except ConnectionError:
            pass  # the predecessor has closed the connection; its last message can still be read

    def receive(self) -> tuple[bytes, list[Fd], str]:
        """Receive the next message, see :func:`qmpfd.kernel.fd.receive`; empty at EOF.

        Raises:
            NoDaemon: the predecessor has cancelled the takeover.
            TimeoutError: the predecessor does not answer.
        """
        try:
            answer = receive(self._sock, 1)
        except ConnectionError:
            return b"", [], ""
        if answer[0] == REFUSED:
            raise NoDaemon("the old daemon cancelled the takeover and goes on")
        return answer

    def request(self, request: bytes) -> tuple[bytes, list[Fd], str]:
        """Send a request, and receive the next message; see :meth:`send` and :meth:`receive`."""
        self.send(request)
        return self.receive()

    def await_handover(self, journal: Fd | None) -> None:
        """Send CONFIRM, and wait until the predecessor has closed everything.

        Args:
            journal: its journal, in which it records the handover too; or None.

        Raises:
            NoDaemon: the predecessor goes on.
        """
        try:
            answer, _, _ = self.request(CONFIRM)
        except TimeoutError:
            # After shutdown(2) it cannot send DONE any more; unless it has just sent it.
            self._sock.shutdown(socket.SHUT_RDWR)
            answer, _, _ = self.receive()
            if answer != DONE:
                raise NoDaemon(
                    "the old daemon does not answer: it keeps its fd sets and connections"
                ) from None
        if answer == DONE:
            # Wait for EOF: the predecessor closes everything else before the connection.  If that
            # takes too long, go on: it serves no client any more.
            try:
                self.receive()
            except TimeoutError:
                pass
        elif not has_handed_over(self.lifeline, journal, TAKEOVER_TIMEOUT):
            raise NoDaemon(
                "the old daemon did not confirm the takeover: it goes on, or its parent starts it "
                "again with all it had"
            )

    def close(self) -> None:
        """Close the connection and the lifeline."""
        self._sock.close()
        self.lifeline.close()


def prepare(
    path: str | os.PathLike[str],
    progress: Callable[[int, int], None],
    movable: Iterable[Movable] = (),
) -> Takeover:
    """Begin a takeover of the daemon that serves *path*, which goes on serving.

    Args:
        path: its socket.
        progress: called with the number of descriptors received, and of all.
        movable: open descriptors of this process that may be moved out of the way.

    Raises:
        NoDaemon: no daemon serves there.
        QMPError: the daemon refuses: the policy forbids it, or the daemon is a newer version.
        ValueError: its state is invalid, or this process has no room for it.
        MemoryError: this process is out of memory.
    """
    with BlockingClient(path, TAKEOVER_TIMEOUT) as client:
        _, passed = client.request("takeover", {"format": TAKEOVER_FORMAT})
        if len(passed) != 2:
            close_all(passed)
            raise ValueError("the daemon sends no state")
        memory, lifeline = passed
        predecessor = _Predecessor(client.detach(), lifeline)
    with ExitStack() as stack:
        stack.callback(predecessor.close)
        stack.callback(memory.close)
        try:
            state = decode(contents(memory))
            memory.close()
            most = open_files_limit()
            if len(state.stored_numbers) > Limits(max_fds=most).within(most).max_fds:
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            takeover = Takeover(state, predecessor, progress)
            stack.callback(takeover.close)
            takeover.reserve(movable)
        except OSError as exc:
            raise unusable(exc) from None
        stack.pop_all()
    return takeover


def unusable(error: OSError) -> ValueError:
    """Make the error that says why the predecessor's state cannot be taken over."""
    if error.errno in (errno.EMFILE, errno.EINVAL, errno.EBADF):  # fcntl(2), dup(2)
        most = open_files_limit()
        return ValueError(f"the limit of {most} open files is too low (ulimit -n)")
    return ValueError(error.strerror or str(error))
