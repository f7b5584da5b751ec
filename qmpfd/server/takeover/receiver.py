"""The newcomer's side of a takeover: fetch everything from the daemon that serves a socket.

It runs before Trio does, so that each stored descriptor can have the number that it had in the
old daemon: nothing else is open yet that could be in the way.

The old daemon owns everything until it has said DONE, see :mod:`.handover`.  Whatever happens
before, the duplicates here are closed and it goes on as if nothing had been.
"""

from __future__ import annotations

import errno
import os
import resource
import socket
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from types import TracebackType

from ...client.blocking import BlockingClient, NoDaemon
from ...kernel.fd import Fd, close_all, receive
from ...limits import TAKEOVER_FORMAT, Limits
from ..fdstore.evidence import has_handed_over, is_dead
from ..renumber import Movable, renumber
from ..saved_state import CONFIRM, DONE, MORE, NEXT, REFUSED, SavedState, decode


class ReceivedState:
    """What was fetched, and the connection that it came over.

    Args:
        state: what the descriptors are.
        old: the old daemon.
    """

    def __init__(self, state: SavedState, old: _Predecessor) -> None:
        self.state = state
        #: The descriptors, in the order of *state*; owned here until they are taken out.
        self.fds: deque[Fd] = deque()
        #: The old daemon's journal, if it is one that is started again when it dies.
        self.journal: Fd | None = None
        #: All of it is ours.
        self.confirmed = False
        #: Called when there is no way back any more, or will not be in a moment.
        self.before_confirming: Callable[[], object] = lambda: None
        self._old = old

    def confirm(self, timeout: float) -> None:
        """Everything is in its place: take over.

        Args:
            timeout: seconds that the old daemon has to let go.

        Raises:
            NoDaemon: it has kept everything, and goes on.
        """
        self.before_confirming()
        self._old.let_go(timeout, self.journal)
        self.confirmed = True

    @property
    def evidence(self) -> Fd:
        """What tells whether the old daemon has let go; see :func:`has_handed_over`."""
        return self._old.process if self.journal is None else self.journal

    def close(self) -> None:
        """Give up what was not taken out."""
        close_all(self.fds)
        if self.journal is not None:
            self.journal.close()
        self._old.close()

    def __enter__(self) -> ReceivedState:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class _Predecessor:
    """The old daemon, while it hands over.

    Args:
        sock: the connection to it; owned from here on.
        pid: its process.

    Raises:
        OSError: there is no such process here.
    """

    def __init__(self, sock: socket.socket, pid: int) -> None:
        self.process = Fd(os.pidfd_open(pid))
        self._sock = socket.socket(fileno=sock.detach())

    def fileno(self) -> int:
        """Of the connection."""
        return self._sock.fileno()

    def move_to(self, number: int) -> None:
        """As :meth:`qmpfd.kernel.fd.Fd.move_to`."""
        with Fd(self._sock.detach()) as fd:
            fd.move_to(number)
            self._sock = socket.socket(fileno=fd.detach())

    def ask(self, request: bytes, timeout: float) -> tuple[bytes, list[Fd], str]:
        """Say something; what it answers, see :func:`qmpfd.kernel.fd.receive`.

        Raises:
            NoDaemon: it has given up the takeover.
            TimeoutError: it does not answer.
        """
        self._sock.settimeout(timeout)
        try:
            self._sock.sendall(request)
        except ConnectionError:
            pass  # it has closed the connection; what it said before that is still here
        answer = self._hear()
        if answer[0] == REFUSED:
            raise NoDaemon("the old daemon has given up the takeover: it goes on")
        return answer

    def _hear(self) -> tuple[bytes, list[Fd], str]:
        try:
            return receive(self._sock, 1)
        except ConnectionError:
            return b"", [], ""

    def let_go(self, timeout: float, journal: Fd | None) -> None:
        """Have it leave everything to us, and wait until it has.

        Args:
            timeout: seconds that it has for that.
            journal: where it says so too, if it is started again when it dies.

        Raises:
            NoDaemon: it goes on.
        """
        try:
            answer, _, _ = self.ask(CONFIRM, timeout)
        except TimeoutError:
            # From here on it cannot say so any more; or it has at the last moment.
            self._sock.shutdown(socket.SHUT_RDWR)
            answer, _, _ = self._hear()
            if answer != DONE:
                raise NoDaemon("the old daemon does not answer: it keeps everything") from None
        if answer == DONE:
            # It closes all that it has, and the connection last.  Whatever keeps it from that, it
            # serves nobody any more.
            try:
                self._hear()
            except TimeoutError:
                pass
        elif not is_dead(self.process, timeout):
            raise NoDaemon("the old daemon has not let go: it goes on")
        elif journal is not None and not has_handed_over(journal, 0):
            raise NoDaemon("the old daemon has died, and is started again with everything")

    def close(self) -> None:
        """Close the connection."""
        self._sock.close()
        self.process.close()


def fetch(
    path: str | os.PathLike[str],
    timeout: float,
    progress: Callable[[int, int], None],
    movable: Iterable[Movable] = (),
) -> ReceivedState:
    """Fetch everything from the daemon that serves *path*.

    Args:
        path: its socket.
        timeout: seconds that any step of it may take.
        progress: told how many descriptors have come, of how many.
        movable: descriptors that are open here and may get other numbers.

    Raises:
        NoDaemon: nobody serves there, or it does not let go.
        QMPError: it refuses: this user may not, or it is a newer version.
        ValueError: what it sends cannot be used here.
    """
    with BlockingClient(path, timeout) as client:
        _, passed = client.request("takeover", {"format": TAKEOVER_FORMAT})
        sock = client.detach()
    try:
        with sock:
            if len(passed) != 1:
                raise ValueError("it sends no state")
            size = os.lseek(passed[0].fileno(), 0, os.SEEK_END)
            state = decode(os.pread(passed[0].fileno(), size, 0))
            close_all(passed)
            most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
            if len(state.stored_numbers) > Limits(max_fds=most).within(most).max_fds:
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            old = _Predecessor(sock, state.pid)
    except OSError as exc:
        raise _unusable(exc) from None
    finally:
        close_all(passed)
    with ExitStack() as stack:
        inheritance = stack.enter_context(ReceivedState(state, old))
        try:
            _receive_all(old, state, inheritance.fds, timeout, progress)
        except TimeoutError:
            raise NoDaemon("the old daemon does not answer") from None
        except OSError as exc:
            raise _unusable(exc) from None
        if state.journal:
            inheritance.journal = inheritance.fds.pop()
        stored = len(state.stored_numbers)
        fds = list(inheritance.fds)
        renumber(
            fds,
            [*state.stored_numbers, *[None] * (len(fds) - stored)],
            [*movable, old, old.process, *([inheritance.journal] if inheritance.journal else [])],
        )
        stack.pop_all()
    return inheritance


def _unusable(error: OSError) -> ValueError:
    """Why what the old daemon has cannot be had here."""
    if error.errno in (errno.EMFILE, errno.EINVAL, errno.EBADF):  # fcntl(2), dup(2)
        most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        return ValueError(f"this process may have {most} open files only (ulimit -n)")
    if error.errno == errno.ESRCH:
        return ValueError("its process cannot be seen from here")
    return ValueError(error.strerror or str(error))


def _receive_all(
    old: _Predecessor,
    state: SavedState,
    fds: deque[Fd],
    timeout: float,
    progress: Callable[[int, int], None],
) -> None:
    """Receive the descriptors, in the order of *state*, at whatever numbers."""
    total, come = state.fd_count, 0
    while come < total:
        said, chunk, dropped = old.ask(NEXT, timeout)
        come += len(chunk)
        fds += chunk
        if dropped:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        if said != MORE or not chunk or come > total:
            raise NoDaemon("the old daemon has ended before everything was here")
        progress(come, total)
