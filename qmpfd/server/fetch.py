"""The newcomer's side of a takeover: fetch everything from the daemon that serves a socket.

It runs before Trio does, so that each stored descriptor can have the number that it had in the
old daemon: nothing else is open yet that could be in the way.

The old daemon owns everything until :meth:`Inheritance.confirm`.  Whatever happens before, the
duplicates here are closed and it goes on as if nothing had been.
"""

from __future__ import annotations

import fcntl
import os
import select
import socket
import time
from collections.abc import Callable
from pathlib import Path

from ..fd import Fd, close_all, receive
from ..fdinfo import is_in_memory
from ..limits import SCM_MAX_FD, TAKEOVER_FORMAT
from ..syncclient import NoDaemon, SyncClient
from ..systemd import Notifier
from .journal import read, replay
from .place import make_way
from .state import CONFIRM, DONE, NEXT, SavedState, decode

#: Seconds between two looks into a journal.
_POLL = 0.02


class Inheritance:
    """What was fetched, and the connection that it came over.

    Args:
        state: what the descriptors are.
        fds: the descriptors, in the order of *state*; owned here until they are taken out.
        sock: the connection to the old daemon.
        old: the old daemon, as a pidfd.
    """

    def __init__(self, state: SavedState, fds: list[Fd], sock: socket.socket, old: Fd) -> None:
        self.state = state
        #: The old daemon's journal, which tells whether it has let go.
        self.journal = fds.pop() if state.journal else None
        self.fds = fds
        self._sock = sock
        self._old = old

    @property
    def witness(self) -> Fd:
        """What tells whether the old daemon has let go; see :func:`has_let_go`."""
        return self._old if self.journal is None else self.journal

    def confirm(self, timeout: float) -> None:
        """Take over: from here on, all of it is ours.

        Args:
            timeout: seconds.

        Raises:
            NoDaemon: the old daemon has kept it.
        """
        self._sock.setblocking(True)
        self._sock.settimeout(timeout)
        try:
            self._sock.sendall(CONFIRM)
            answer = self._sock.recv(1)
        except OSError:
            answer = b""
        if answer == DONE:
            return
        if answer:
            raise NoDaemon("the old daemon has given up the takeover: it goes on")
        # No answer: if it is dead, nobody else has all this, but for whoever starts it again.
        if not is_dead(self._old, timeout) or not has_let_go(self.witness, 0):
            raise NoDaemon("the old daemon has not let go: it goes on")

    def close(self) -> None:
        """Give up what was not taken out."""
        close_all(self.fds)
        if self.journal is not None:
            self.journal.close()
        self._sock.close()
        self._old.close()


def fetch(
    path: str | os.PathLike[str],
    timeout: float,
    progress: Callable[[int, int], None],
    parent: Notifier | None = None,
) -> Inheritance:
    """Fetch everything from the daemon that serves *path*.

    Args:
        path: its socket.
        timeout: seconds that any step of it may take.
        progress: told how many descriptors have come, of how many.
        parent: whose socket makes way for a descriptor that needs its number.

    Raises:
        NoDaemon: nobody serves there, or it does not let go.
        QMPError: it refuses: this user may not, or the state's format is unknown.
        ValueError: what it sends cannot be used here.
    """
    with SyncClient(path, timeout) as client:
        _, passed = client.request("takeover", {"format": TAKEOVER_FORMAT})
        sock = client.detach()
    fds: list[Fd] = []
    try:
        sock.settimeout(timeout)
        with passed[0] as memory:
            size = os.lseek(memory.fileno(), 0, os.SEEK_END)
            state = decode(os.pread(memory.fileno(), size, 0))
        make_way(parent, set(state.stored_numbers))
        old = Fd(os.pidfd_open(state.pid))
        try:
            _receive_all(sock, state, fds, progress)
        except BaseException:
            old.close()
            raise
    except BaseException:
        close_all([*fds, *passed])
        sock.close()
        raise
    return Inheritance(state, fds, sock, old)


def is_dead(process: Fd, timeout: float) -> bool:
    """Whether a process has ended.

    Args:
        process: a pidfd.
        timeout: seconds that it is waited for.
    """
    poll = select.poll()
    poll.register(process.fileno(), select.POLLIN)
    return bool(poll.poll(timeout * 1000))


def has_let_go(witness: Fd, timeout: float) -> bool:
    """Whether a daemon has let go of what was fetched from it.

    Args:
        witness: its journal, where it says so; or the daemon, as a pidfd, which has let go when
            it has ended.
        timeout: seconds that it is waited for.
    """
    if not is_in_memory(witness.fileno()):
        return is_dead(witness, timeout)
    deadline = time.monotonic() + timeout
    while not replay(read(witness)).left:
        if time.monotonic() >= deadline:
            return False
        time.sleep(_POLL)
    return True


def _receive_all(
    sock: socket.socket, state: SavedState, fds: list[Fd], progress: Callable[[int, int], None]
) -> None:
    wanted = state.stored_numbers
    total = state.fd_count
    taken: dict[int, int] = {}  # which of fds has a number, for those that are in the way
    while len(fds) < total:
        sock.sendall(NEXT)
        data, come, dropped = receive(sock, 1)
        first = len(fds)
        fds += come
        if not data or dropped or not come or len(come) > SCM_MAX_FD:
            raise NoDaemon(
                "this process is out of file descriptors"
                if dropped
                else "the old daemon has given up the takeover: it goes on"
            )
        for index in range(first, len(fds)):
            taken[fds[index].fileno()] = index
        for index in range(first, min(len(fds), len(wanted))):
            _place(fds, index, wanted[index], max(wanted), taken)
        progress(len(fds), total)


def _place(fds: list[Fd], index: int, number: int, highest: int, taken: dict[int, int]) -> None:
    """Give a descriptor the number that it had; whatever has that now moves out of the way."""
    fd = fds[index]
    if fd.fileno() == number:
        return
    if number in taken:
        other = taken.pop(number)
        moved = Fd(fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, highest + 1))
        fds[other].close()
        fds[other] = moved
        taken[moved.fileno()] = other
    elif Path(f"/proc/self/fd/{number}").exists():
        raise ValueError(f"descriptor {number} is in use in this process already")
    del taken[fd.fileno()]
    os.dup2(fd.fileno(), number, inheritable=False)
    fds[index] = Fd(number)
    taken[number] = index
    fd.close()
