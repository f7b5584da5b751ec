"""Starts workers, and keeps a spare one: executes their program, if none has forked the next."""

from __future__ import annotations

import os
import resource
import select
import signal
import socket
import time

from .log import Log
from .manager import NEVER
from .restarts import Restarts
from .signals import FORWARDED
from .store import close
from .worker import Worker

TYPE_CHECKING = False
if TYPE_CHECKING:  # typing takes a mebibyte
    from collections.abc import Iterable
    from typing import NoReturn

#: The first inherited descriptor (SD_LISTEN_FDS_START).
FIRST = 3

#: Maximum wait for execve(2) in milliseconds: a close in the new process may hang, of a file of a
#: FUSE mount that does not answer.
_EXEC_TIMEOUT = 200

#: Variables for the first worker that serves (sd_listen_fds(3)); and for the parent only.
_LISTEN = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PIDFDID")
_FOR_PARENT = ("NOTIFY_SOCKET", "WATCHDOG_PID")


class Program:
    """The worker's program, and the spare worker.

    Args:
        log: the parent's log.
        command: the program, and its arguments.
        passed: numbers of inherited descriptors for the first worker that serves.
        heartbeat: watchdog timeout of a worker, in seconds.
        poll: polls the socket to the spare worker, which hangs up at its end.
    """

    def __init__(
        self,
        log: Log,
        command: list[str],
        passed: set[int],
        heartbeat: float,
        poll: select.poll,
    ) -> None:
        self._log = log
        self._command = command
        self._passed = passed
        self._heartbeat = heartbeat
        self._poll = poll
        self._spare: Worker | None = None
        self._restarts = Restarts()  # of the spare worker
        # Places of the descriptor table that are not for stored descriptors: those open now, 32
        # for sockets and received descriptors, 32 for descriptors being closed.
        _, limit = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
        own = len(_open_fds()) + 64
        #: Maximum number of stored descriptors.
        self.store_size = max(limit - own, 0)
        #: Maximum number of stored descriptors and closes under way at which messages are received.
        self.most_open = limit - own + 32

    # -- the spare worker ----------------------------------------------------------------------

    def take_spare(self, spare: Worker) -> None:
        """Use this spare worker as the next worker, and end a former spare worker."""
        self.end_spare()
        self._spare = spare
        self._poll.register(spare.sock, 0)  # for POLLHUP

    def end_spare(self) -> bool:
        """End the spare worker, if one waits; return whether a child of the parent was killed."""
        spare = self._release_spare()
        return spare is not None and spare.end()

    def _release_spare(self) -> Worker | None:
        spare, self._spare = self._spare, None
        if spare is not None:
            self._poll.unregister(spare.sock)
        return spare

    def is_spare(self, number: int) -> bool:
        """Return whether *number* is the socket to the spare worker."""
        return self._spare is not None and self._spare.number == number

    def replace_spare(self) -> None:
        """End the spare worker, which has hung up; :meth:`keep_spare` starts another one later."""
        self.end_spare()
        self._restarts.failed(time.monotonic())

    def keep_spare(self, now: float) -> float:
        """Start a spare worker if none waits, now or later; return the time of the next call.

        Args:
            now: the time (time.monotonic()).
        """
        if self._spare is None and self._restarts.at <= now:
            try:
                self.take_spare(self.execute())
            except OSError as exc:
                delay = self._restarts.failed(now)
                problem = (
                    f"cannot start a spare worker: {exc.strerror}: trying again in {delay:g} s"
                )
                self._log.log("warning", problem)
            else:
                self._log.log("warning", "no spare worker was waiting: started one")
                return NEVER
        return self._restarts.at if self._spare is None else NEVER

    # -- the worker ----------------------------------------------------------------------------

    def start(self, names: Iterable[bytes], *, may_hang: bool) -> Worker:
        """Start a worker: the spare worker, if it is usable, or a new process.

        Args:
            names: the names of the stored descriptors.
            may_hang: whether the end of the worker that has forked the spare worker may hang.

        Raises:
            OSError: the parent is out of descriptors or processes.
        """
        self._restarts = Restarts()
        worker = self._release_spare()
        if worker is not None and not worker.wake(may_hang):
            worker.end()
            worker = None
        worker = worker or self.execute()
        worker.start(list(names))
        return worker

    def close_passed(self) -> None:
        """Close the descriptors for the first worker that serves: from now on they are stored."""
        while self._passed:
            close(self._passed.pop())
        for variable in _LISTEN:
            os.environ.pop(variable, None)

    def execute(self) -> Worker:
        """Execute the worker's program in a new process, which waits for START.  Return when it has
        closed the stored descriptors: one that is removed from here on is closed everywhere.

        Raises:
            OSError: the parent is out of descriptors or processes.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with theirs:
                executed, held = socket.socketpair()
                with executed:
                    with held:
                        pid = self._fork(theirs.fileno(), held.fileno())
                    poll = select.poll()
                    poll.register(executed, 0)
                    poll.poll(_EXEC_TIMEOUT)
        except BaseException:
            ours.close()
            raise
        return Worker(pid, ours)

    def _fork(self, sock: int, held: int) -> int:
        # Blocked until the child has default handlers: the parent's would swallow a signal.
        signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)
        try:
            pid = os.fork()
            if pid == 0:
                self._become(sock, held)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
        return pid

    def _become(self, sock: int, held: int) -> NoReturn:
        """Execute the worker's program in the child, or exit with status 126."""
        try:
            self._execute(sock, held)
        except OSError as exc:
            self._log.log("error", f"{self._command[0]} cannot be run: {exc.strerror or exc}")
        finally:
            os._exit(126)

    def _execute(self, sock: int, held: int) -> None:
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
        # execve(2) closes descriptors with close-on-exec, lowest number first: this one last.
        try:
            os.dup2(held, max(_open_fds()) + 1, inheritable=False)
        except OSError:  # beyond RLIMIT_NOFILE
            pass
        os.set_inheritable(sock, True)
        environment = {
            **{name: text for name, text in os.environ.items() if name not in _FOR_PARENT},
            "QMPFD_NOTIFY_FD": str(sock),
            "FDSTORE": str(self.store_size),
            "WATCHDOG_USEC": str(int(self._heartbeat * 1e6)),
        }
        if environment.get("LISTEN_PID") == str(os.getppid()):
            environment["LISTEN_PID"] = str(os.getpid())
        os.execve(self._command[0], self._command, environment)


def listen_fds() -> set[int]:
    """Return the numbers of the descriptors passed by the service manager (sd_listen_fds(3))."""
    count = os.environ.get("LISTEN_FDS", "")
    if os.environ.get("LISTEN_PID") != str(os.getpid()) or not count.isdecimal():
        return set()
    return {number for number in _open_fds() if number < FIRST + int(count[:9])}


def is_inherited(number: int) -> bool:
    """Return whether a descriptor was inherited: Python opens with close-on-exec (PEP 446)."""
    try:
        return number >= FIRST and os.get_inheritable(number)
    except OSError:  # not open
        return False


def _open_fds() -> list[int]:
    """Return the numbers of open descriptors."""
    try:
        return [int(name) for name in os.listdir("/proc/self/fd")]
    except OSError:  # /proc is not mounted
        return [number for number in range(1024) if _is_open(number)]


def _is_open(number: int) -> bool:
    try:
        os.get_inheritable(number)
    except OSError:
        return False
    return True
