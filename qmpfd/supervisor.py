"""The parent of ``serve --supervise``: keeps duplicates of what its worker stores, and starts it
again when it dies.

A program of its own, run by its path in an interpreter without the rest of the package, so that
there is little in it that can fail and little that takes memory.  To its worker it is what systemd
is to a service: it passes descriptors with $LISTEN_FDS (sd_listen_fds(3)) and hears of readiness
and of descriptors to be kept (sd_notify(3), sd_pid_notify_with_fds(3)), over a socket that the
worker inherits and nobody else can reach.  What it is told besides, it passes on to its own service
manager.

Whatever comes over that socket, the parent goes on: it looks at names as it does at numbers, and
what it does not understand it lets go.
"""

from __future__ import annotations

import _thread
import fcntl
import os
import resource
import select
import signal
import socket
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:  # typing takes a mebibyte
    from typing import NoReturn

#: The first inherited descriptor (SD_LISTEN_FDS_START).
FIRST = 3

#: Seconds until the next start of a worker that died before it could serve; after the last, it is
#: given up.
DELAYS = (0.1, 0.2, 0.4, 0.8, 1.6, 3.2)

#: What the worker's journal is called: without it, what is kept means nothing.
JOURNAL = b"qmpfd-journal-"

#: Seconds that a worker serves at least, or it waits for as long before it is started again.
SHORT_LIFE, PAUSE = 1.0, 0.02

#: Descriptors of this table that are not the worker's: standard streams, sockets, room to pass on.
SPARE = 64

#: Closes that may hang at a time; more wait for one of them.
MAX_THREADS = 32

_CONTROL = socket.CMSG_SPACE(253 * 4)
_FLAGS = int(socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC)

Sockets = list["tuple[str, int]"]


def close(number: int) -> None:
    """Close a descriptor; whatever close reports, it is closed (close(2))."""
    try:
        os.close(number)
    except OSError:
        pass


class SlowCloser:
    """Closes what may hang in its close, in threads."""

    def __init__(self) -> None:
        self._lock = _thread.allocate_lock()
        self._waiting: list[int] = []
        self._threads = 0

    def close(self, number: int) -> None:
        """Close a descriptor, some time."""
        with self._lock:
            self._waiting.append(number)
            if self._threads == MAX_THREADS:
                return
            self._threads += 1
        try:
            _thread.start_new_thread(self._work, ())
        except RuntimeError:  # no more threads: the next one does it
            with self._lock:
                self._threads -= 1

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._threads -= 1
                    return
                number = self._waiting.pop()
            close(number)


class Log:
    """Says things on standard error, in the worker's way, and waits for nobody.

    Args:
        form: ``text`` or ``json``.
        level: the least that is said: ``debug``, ``info``, ``warning`` or ``error``.
    """

    LEVELS = ("debug", "info", "warning", "error")
    PRIORITIES = (7, 6, 4, 3)  # sd-daemon(3)

    def __init__(self, form: str, level: str) -> None:
        self._json = form == "json"
        self._least = self.LEVELS.index(level)
        self._journal = "JOURNAL_STREAM" in os.environ

    def say(self, level: str, message: str) -> None:
        """Say one line, of plain text without quotes."""
        rank = self.LEVELS.index(level)
        if rank < self._least:
            return
        if self._json:
            now = time.time()
            stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now))
            stamp += f".{int(now * 1000) % 1000:03}Z"
            line = f'{{"time": "{stamp}", "level": "{level}", "message": "{message}"}}\n'
        else:
            line = f"qmpfd: {message}\n"
            if self._journal:
                line = f"<{self.PRIORITIES[rank]}>{line}"
        try:
            poll = select.poll()
            poll.register(2, select.POLLOUT)
            if poll.poll(0):
                os.write(2, line.encode())
        except OSError:
            pass


#: What is passed on to the worker.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Worker:
    """A running worker.

    Args:
        pid: its process.
        sock: our end of the socket.
    """

    def __init__(self, pid: int, sock: socket.socket) -> None:
        self.pid = pid
        self.pidfd = os.pidfd_open(pid)
        self.sock = sock
        self.ready_at: float | None = None
        self.listening = True  # there is somebody at the other end of the socket
        self.had_journal = False  # kept by us

    def close(self) -> None:
        """Forget it."""
        close(self.pidfd)
        self.sock.close()


class Supervisor:
    """The parent.

    Args:
        log: where things are said.
        command: the worker's program, and its arguments.
        passed: descriptors that the command line names, for the first worker only.
        sockets: those of the service manager, with their names, for each worker.
    """

    def __init__(self, log: Log, command: list[str], passed: list[int], sockets: Sockets) -> None:
        self._log = log
        self._command = command
        self._passed = passed
        self._sockets = sockets
        self._kept: dict[bytes, int] = {}
        self._slow = SlowCloser()
        self._worker: Worker | None = None
        self._served = False  # there was a worker that was ready
        self._failures = 0
        self._start_at: float | None = 0.0  # None: not by itself
        self._stopping = False
        self._store_size = open_files_limit() - SPARE - len(sockets)
        self._manager = service_manager()
        self._poll = select.poll()
        self._signals, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._poll.register(self._signals, select.POLLIN)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        for number in SIGNALS:
            signal.signal(number, lambda *_: None)

    def run(self) -> int:
        """Supervise until the worker ends, or we are told to; the exit status."""
        while True:
            timeout: float | None = None
            if self._worker is None and self._start_at is not None:
                timeout = self._start_at - time.monotonic()
                if timeout <= 0:
                    timeout = self._start()
            for number, events in self._poll.poll(None if timeout is None else timeout * 1000 + 1):
                worker = self._worker
                if number == self._signals:
                    for told in os.read(self._signals, 64):
                        if self._obey(told):
                            return 0
                elif worker is not None and number == worker.sock.fileno():
                    self._hear(worker, 512)
                    if events & select.POLLHUP and worker.listening:
                        self._hear(worker)
                        self._poll.unregister(worker.sock)
                        worker.listening = False
                elif worker is not None and number == worker.pidfd:
                    status = self._bury(worker)
                    if status is not None:
                        return status

    # -- the worker's life ---------------------------------------------------------------------

    def _start(self) -> float | None:
        """Start a worker; seconds until the next try if that is not possible now."""
        try:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs:
                # What we pass on before the worker's program runs is to end it, not to be lost.
                signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
                try:
                    pid = os.fork()
                    if pid == 0:
                        self._become_worker(theirs.fileno())
                finally:
                    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            self._worker = Worker(pid, ours)
        except OSError as exc:
            self._log.say("error", f"no worker can be started: {exc.strerror}")
            self._start_at = time.monotonic() + DELAYS[-1]
            return DELAYS[-1]
        self._poll.register(ours, select.POLLIN)
        self._poll.register(self._worker.pidfd, select.POLLIN)
        return None

    def _become_worker(self, sock: int) -> NoReturn:
        """Be the worker's program, whatever happens."""
        try:
            self._run_worker(sock)
        except OSError as exc:
            self._log.say("error", f"{self._command[0]} cannot be run: {exc.strerror}")
        finally:
            os._exit(126)

    def _run_worker(self, sock: int) -> None:
        """Put everything in its place, and become the worker's program."""
        signal.set_wakeup_fd(-1)
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        # A group of its own: a terminal's Ctrl-C is for us, and we pass it on.
        os.setpgid(0, 0)
        given = [*self._sockets, *((name.decode("ascii"), fd) for name, fd in self._kept.items())]
        given.sort(key=lambda each: each[1])
        end = FIRST + len(given)
        if sock < end:
            sock = fcntl.fcntl(sock, fcntl.F_DUPFD, end)
        # By rising numbers: each moves down, if at all, to one that is done with.
        for target, (_, number) in enumerate(given, FIRST):
            if number == target:
                os.set_inheritable(number, True)
            else:
                os.dup2(number, target)
        os.set_inheritable(sock, True)
        environment = dict(os.environ)
        for variable in ("NOTIFY_SOCKET", "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
            environment.pop(variable, None)
        pid = str(os.getpid())
        environment["QMPFD_NOTIFY_FD"] = str(sock)
        environment["FDSTORE"] = str(self._store_size)
        if "WATCHDOG_PID" in environment:
            environment["WATCHDOG_PID"] = pid
        if given:
            environment["LISTEN_PID"] = pid
            environment["LISTEN_FDS"] = str(len(given))
            environment["LISTEN_FDNAMES"] = ":".join(name for name, _ in given)
        os.execve(self._command[0], self._command, environment)

    def _bury(self, worker: Worker) -> int | None:
        """The worker is dead: see to another, or return the exit status."""
        _, wait_status = os.waitpid(worker.pid, 0)
        # First of all, what it has said: others have been told that it is safe.
        self._hear(worker)
        if worker.listening:
            self._poll.unregister(worker.sock)
        self._poll.unregister(worker.pidfd)
        worker.close()
        self._worker = None
        status = os.waitstatus_to_exitcode(wait_status)
        if self._stopping and status in (-signal.SIGTERM, -signal.SIGINT):
            return 0  # it was told before it could listen
        if status == 0 or self._stopping or (status > 0 and not self._served):
            return status if status >= 0 else 128 - status  # it has said why itself
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        if not any(name.startswith(JOURNAL) for name in self._kept):
            for name in list(self._kept):
                self._let_go(name, slow=True)
            if worker.had_journal:  # a successor has it all, or nothing is to be left
                self._log.say(
                    "info", f"the worker {how}, after it had let go of everything: ending"
                )
                return 0
        now = time.monotonic()
        if worker.ready_at is not None:
            self._failures = 0
            short = now - worker.ready_at < SHORT_LIFE
            self._start_at = now + (PAUSE if short else 0)
            self._log.say("warning", f"the worker {how}: starting it again")
            return None
        if self._failures < len(DELAYS):
            self._start_at = now + DELAYS[self._failures]
            self._failures += 1
            self._log.say("warning", f"the worker {how} before it could serve: trying again")
            return None
        self._start_at = None
        self._log.say(
            "error",
            f"the worker {how} before it could serve, {len(DELAYS) + 1} times in a row: given up. "
            f"{len(self._kept)} descriptors are kept by pid {os.getpid()}: once the cause is gone, "
            f"kill -HUP {os.getpid()} tries again; kill {os.getpid()} closes them",
        )
        return None

    def _obey(self, number: int) -> bool:
        """Pass a signal on; whether it ends us."""
        worker = self._worker
        if number == signal.SIGHUP:
            if worker is None:
                self._failures, self._start_at = 0, 0.0
            elif worker.ready_at is not None:  # before that, it would not know what to do with it
                self._pass_on(worker, number)
        elif number in (signal.SIGTERM, signal.SIGINT):
            if worker is None:
                return True
            self._stopping = True
            self._pass_on(worker, number)
        return False

    def _pass_on(self, worker: Worker, number: int) -> None:
        try:
            signal.pidfd_send_signal(worker.pidfd, number)
        except OSError:  # it is dead already
            pass

    # -- what the worker says ------------------------------------------------------------------

    def _hear(self, worker: Worker, most: int = -1) -> None:
        """Take what the worker has sent; *most* messages of it, all by default."""
        while most:
            most -= 1
            try:
                data, control, flags, _ = worker.sock.recvmsg(4096, _CONTROL, _FLAGS)
            except BlockingIOError:
                return
            except OSError:
                return
            fds: list[int] = []
            for level, kind, payload in control:
                if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                    fds += memoryview(payload[: len(payload) & ~3]).cast("i").tolist()
            if not data and not fds:  # nobody is left at the other end
                return
            if flags & socket.MSG_CTRUNC:
                self._log.say("error", "out of descriptors: one could not be kept")
            self._do(worker, data, fds)

    def _do(self, worker: Worker, data: bytes, fds: list[int]) -> None:
        """Do what one message says; what it came with and is not kept is closed."""
        name = b""
        stores = removes = slow = False
        others = []
        for line in data.split(b"\n"):
            key, _, value = line.partition(b"=")
            if key == b"FDSTORE":
                stores = value == b"1"
            elif key == b"FDNAME":
                name = value
            elif key == b"FDSTOREREMOVE":
                removes = value == b"1"
            elif key == b"QMPFD_CLOSE":
                slow = value == b"slow"
            elif key == b"READY":
                worker.ready_at = time.monotonic()
                self._begin_to_serve()
                others.append(line)
            elif key not in (b"FDPOLL", b"BARRIER", b"MAINPID", b""):
                others.append(line)
        if name and good_name(name):
            if removes or (stores and fds):
                self._let_go(name, slow)
            if stores and fds:
                self._kept[name] = fds.pop(0)
                worker.had_journal |= name.startswith(JOURNAL)
        for number in fds:
            close(number)
        if others:
            self._tell(b"\n".join(others))

    def _let_go(self, name: bytes, slow: bool) -> None:
        number = self._kept.pop(name, -1)
        if number < 0:
            return
        if slow:
            self._slow.close(number)
        else:
            close(number)

    def _begin_to_serve(self) -> None:
        self._served = True
        while self._passed:
            close(self._passed.pop())

    def _tell(self, data: bytes) -> None:
        """Pass on what is for the service manager."""
        if self._manager is None:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.setblocking(False)
                sock.sendto(data, self._manager)
        except OSError:
            pass


def good_name(name: bytes) -> bool:
    """Whether a descriptor may be called so (sd_pid_notify_with_fds(3), FDNAME)."""
    return len(name) <= 255 and all(32 <= byte < 127 and byte != 58 for byte in name)


def open_files_limit() -> int:
    """Allow ourselves as many descriptors as we may; how many that is."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def service_manager() -> str | None:
    """The address of our own service manager, or None."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path.startswith(("/", "@")):
        return None
    return "\0" + path[1:] if path.startswith("@") else path


def inherited_sockets() -> Sockets:
    """What the service manager has passed to us."""
    count = os.environ.get("LISTEN_FDS", "")
    if os.environ.get("LISTEN_PID") != str(os.getpid()) or not count.isdecimal():
        return []
    names = os.environ.get("LISTEN_FDNAMES", "").split(":")
    found = []
    for index in range(int(count)):
        os.set_inheritable(FIRST + index, False)
        found.append((names[index] if index < len(names) else "unknown", FIRST + index))
    return found


def main(arguments: list[str]) -> int:
    """Supervise.

    Args:
        arguments: format and level of the log, the descriptors that are for the worker only,
            with commas between, and the worker's command line.
    """
    form, level, passed, *command = arguments
    numbers = [int(number) for number in passed.split(",") if number]
    return Supervisor(Log(form, level), command, numbers, inherited_sockets()).run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
