"""What a worker runs, and how it is started with the descriptors that are kept."""

from __future__ import annotations

import fcntl
import os
import resource
import signal
import socket

from .log import Log
from .signals import FORWARDED
from .worker import Spare, Worker

TYPE_CHECKING = False
if TYPE_CHECKING:  # typing takes a mebibyte
    from typing import NoReturn

#: The first inherited descriptor (SD_LISTEN_FDS_START).
FIRST = 3

#: What an inherited descriptor is called that has a number among those that are passed.
_IN_PLACE = "qmpfd-inherited"

NamedFds = list["tuple[str, int]"]


class Program:
    """What a worker runs.

    Args:
        log: told if the program cannot be run.
        command: the program, and its arguments.
        sockets: those of the service manager, with their names, for each worker.
        inherited: descriptors that each worker gets at the numbers that they have.
        heartbeat: seconds within which it is to say that its loop turns.
    """

    def __init__(
        self,
        log: Log,
        command: list[str],
        sockets: NamedFds,
        inherited: set[int],
        heartbeat: float,
    ) -> None:
        self._log = log
        self._command = command
        self._sockets = sockets
        self.inherited = inherited
        self._spare: Spare | None = None
        self._heartbeat = heartbeat
        # Of our table, this is the worker's: the rest is for what is open now, sockets, and
        # descriptors that are on their way or being closed.
        _, limit = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
        self._own = len(_open_fds()) + 64
        #: How many descriptors can be kept.
        self.store_size = max(limit - self._own, 0)
        #: How many may be open, those included that are being closed, for one more to have room.
        self.most_open = limit - self._own + 32

    def take_spare(self, pid: int, sock: socket.socket) -> None:
        """Have this spare worker take the place of the next worker, and no other one.

        Args:
            pid: its process.
            sock: our end of the socket to it; owned from here on.
        """
        self.end_spare()
        self._spare = Spare(pid, sock)
        self._spare.send(b"WAIT")

    def end_spare(self) -> None:
        """End the spare worker, if there is one."""
        if self._spare is not None:
            self._spare.end()
            self._spare = None

    def start(self, kept: dict[bytes, int], *, may_hang: bool) -> Worker:
        """Start a worker: the spare one, if it can be.

        Args:
            kept: the descriptors that it is given, by their names.
            may_hang: a worker that has started a spare one may hang in its end.

        Raises:
            OSError: it is not possible now.
        """
        spare = self._spare
        if spare is not None and spare.is_usable(may_hang):
            self._spare = None
            spare.start(self._sockets, list(kept))
            return spare
        self.end_spare()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with theirs:
                # What is forwarded before the worker's program runs is to end it, not to be lost.
                signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)
                try:
                    pid = os.fork()
                    if pid == 0:
                        self._become(theirs.fileno(), kept)
                finally:
                    signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
        except BaseException:
            ours.close()
            raise
        return Worker(pid, ours)

    def _become(self, sock: int, kept: dict[bytes, int]) -> NoReturn:
        """Be the worker's program, whatever happens."""
        try:
            self._execute(sock, kept)
        except OSError as exc:
            self._log.log("error", f"{self._command[0]} cannot be run: {exc.strerror or exc}")
        finally:
            os._exit(126)

    def _execute(self, sock: int, kept: dict[bytes, int]) -> None:
        signal.set_wakeup_fd(-1)
        for each in FORWARDED:
            signal.signal(each, signal.SIG_DFL)
        signal.signal(signal.SIGQUIT, signal.SIG_IGN)  # as all else that we ignore
        signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
        # A group of its own: a terminal's Ctrl-C is for us, and we forward it.
        try:
            os.setpgid(0, 0)
        except OSError:  # a container's seccomp filter; signals to both are counted once anyway
            pass
        given = [*self._sockets, *((name.decode("ascii"), fd) for name, fd in kept.items())]
        given.sort(key=lambda each: each[1])
        names, places = [], []
        target = FIRST
        for name, _ in given:
            while target in self.inherited:
                names.append(_IN_PLACE)
                target += 1
            names.append(name)
            places.append(target)
            target += 1
        if sock < target:
            sock = fcntl.fcntl(sock, fcntl.F_DUPFD, target)
        # By rising numbers: each moves down, if at all, to one that is done with.
        for place, (_, number) in zip(places, given, strict=True):
            if number == place:
                os.set_inheritable(number, True)
            else:
                os.dup2(number, place)
        os.set_inheritable(sock, True)
        environment = dict(os.environ)
        for variable in ("NOTIFY_SOCKET", "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
            environment.pop(variable, None)
        pid = str(os.getpid())
        environment["QMPFD_NOTIFY_FD"] = str(sock)
        environment["FDSTORE"] = str(self.store_size)
        environment["WATCHDOG_PID"] = pid
        environment["WATCHDOG_USEC"] = str(int(self._heartbeat * 1e6))
        if given:
            environment["LISTEN_PID"] = pid
            environment["LISTEN_FDS"] = str(len(names))
            environment["LISTEN_FDNAMES"] = ":".join(names)
        os.execve(self._command[0], self._command, environment)


def inherited_sockets() -> NamedFds:
    """What the service manager has passed to us."""
    count = os.environ.get("LISTEN_FDS", "")
    if os.environ.get("LISTEN_PID") != str(os.getpid()) or not count.isdecimal():
        return []
    names = os.environ.get("LISTEN_FDNAMES", "").split(":")
    passed = set(_open_fds())
    found = []
    for index in range(min(int(count[:9]), len(passed))):
        if FIRST + index in passed:
            os.set_inheritable(FIRST + index, False)
            found.append((names[index] if index < len(names) else "unknown", FIRST + index))
    return found


def inherited_fds() -> set[int]:
    """The other descriptors that whoever started us has passed, beyond the standard streams."""
    return {number for number in _open_fds() if number >= FIRST and _is_inheritable(number)}


def _is_inheritable(number: int) -> bool:
    try:
        return os.get_inheritable(number)
    except OSError:  # the one that the folder was listed with
        return False


def _open_fds() -> list[int]:
    """The descriptors that are open."""
    try:
        return [int(name) for name in os.listdir("/proc/self/fd")]
    except OSError:  # there is no /proc
        return [number for number in range(1024) if _is_open(number)]


def _is_open(number: int) -> bool:
    try:
        fcntl.fcntl(number, fcntl.F_GETFD)
    except OSError:
        return False
    return True
