"""Starts workers: executes their program with the stored and inherited descriptors."""

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

#: LISTEN_FDNAMES name of an inherited descriptor whose number is among those passed.
_IN_PLACE = "qmpfd-inherited"

NamedFds = list["tuple[str, int]"]


class Program:
    """The worker's program, and the spare worker.

    Args:
        log: the parent's log.
        command: the program, and its arguments.
        sockets: the service manager's sockets, with their names, which each worker gets.
        inherited: other descriptors that each worker gets, under the same numbers.
        heartbeat: watchdog timeout of a worker, in seconds.
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
        # Places of the descriptor table that are not for stored descriptors: those open now, 32
        # for sockets and received descriptors, 32 for descriptors being closed.
        _, limit = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
        own = len(_open_fds()) + 64
        #: Maximum number of stored descriptors.
        self.store_size = max(limit - own, 0)
        #: Maximum number of stored descriptors and closes under way at which messages are received.
        self.most_open = limit - own + 32

    def take_spare(self, pid: int, sock: socket.socket) -> None:
        """Use this spare worker as the next worker, and end a former spare worker.

        Args:
            pid: its process.
            sock: the parent's end of the socket to it; owned from here on.
        """
        self.end_spare()
        self._spare = Spare(pid, sock)
        self._spare.send(b"WAIT")

    def end_spare(self) -> None:
        """End the spare worker, if one waits."""
        if self._spare is not None:
            self._spare.end()
            self._spare = None

    def start(self, stored: dict[bytes, int], *, may_hang: bool) -> Worker:
        """Start a worker: the spare worker, if it is usable, or a new process.

        Args:
            stored: the stored descriptors, by name.
            may_hang: whether the end of the worker that has started the spare worker may hang.

        Raises:
            OSError: the parent is out of descriptors or processes.
        """
        spare = self._spare
        if spare is not None and spare.is_usable(may_hang):
            self._spare = None
            spare.start(self._sockets, list(stored))
            return spare
        self.end_spare()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with theirs:
                # Blocked until the child has default handlers: the parent's would swallow a signal.
                signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)
                try:
                    pid = os.fork()
                    if pid == 0:
                        self._become(theirs.fileno(), stored)
                finally:
                    signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
        except BaseException:
            ours.close()
            raise
        return Worker(pid, ours)

    def _become(self, sock: int, stored: dict[bytes, int]) -> NoReturn:
        """Execute the worker's program in the child, or exit with status 126."""
        try:
            self._execute(sock, stored)
        except OSError as exc:
            self._log.log("error", f"{self._command[0]} cannot be run: {exc.strerror or exc}")
        finally:
            os._exit(126)

    def _execute(self, sock: int, stored: dict[bytes, int]) -> None:
        signal.set_wakeup_fd(-1)
        for each in FORWARDED:
            signal.signal(each, signal.SIG_DFL)
        signal.signal(signal.SIGQUIT, signal.SIG_IGN)  # like all other signals that are ignored
        signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
        # A process group of its own: the terminal sends Ctrl-C to the parent only, which forwards.
        try:
            os.setpgid(0, 0)
        except OSError:  # a container's seccomp filter; the worker counts a signal to both once
            pass
        given = [*self._sockets, *((name.decode("ascii"), fd) for name, fd in stored.items())]
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
        # By ascending numbers: each descriptor moves down, if at all, to a number no longer needed.
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
    """Return the sockets passed by the service manager (sd_listen_fds(3)), with their names."""
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
    """Return the numbers of other inherited descriptors, without the standard streams."""
    return {number for number in _open_fds() if number >= FIRST and _is_inheritable(number)}


def _is_inheritable(number: int) -> bool:
    try:
        return os.get_inheritable(number)
    except OSError:  # the descriptor that listdir had open
        return False


def _open_fds() -> list[int]:
    """Return the numbers of open descriptors."""
    try:
        return [int(name) for name in os.listdir("/proc/self/fd")]
    except OSError:  # /proc is not mounted
        return [number for number in range(1024) if _is_open(number)]


def _is_open(number: int) -> bool:
    try:
        fcntl.fcntl(number, fcntl.F_GETFD)
    except OSError:
        return False
    return True
