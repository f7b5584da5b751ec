"""The parent's main loop: starts workers, handles their messages and deaths, and signals."""

from __future__ import annotations

import os
import select
import signal
import time
from itertools import islice

from .log import Log
from .mailbox import Mailbox
from .manager import NEVER, Manager
from .program import Program
from .restarts import FIRST_DELAY, Restarts
from .signals import FORWARDED, QUIT_IGNORED, set_up_signals
from .states import ENDING, TRANSITIONS, Event, State
from .store import SlowCloser, Store
from .worker import START_TIMEOUT, Worker

TYPE_CHECKING = False
if TYPE_CHECKING:  # typing takes a mebibyte
    from collections.abc import Sequence

#: Watchdog timeout of a worker in seconds, if the parent has no watchdog timeout itself.
HEARTBEAT = 10.0

#: Messages that are handled before signals are handled.
MESSAGES = 512

#: Maximum number of seconds of one poll(2).
_LONGEST_WAIT = 3600.0

#: Seconds that a draining worker has for its end beyond --drain-timeout.
_END_TIMEOUT = 2.0

#: Seconds that the parent waits for the end of a worker after SIGKILL.  Its code does not run any
#: more, but the close of a descriptor may hang (a FUSE mount that does not answer).
_DEATH_TIMEOUT = 1.0

#: If the parent notices a deadline more than this number of seconds late, it was stopped itself:
#: the worker gets as many seconds more.
_GRACE = 1.0

# local names: looking up an Enum member is slow before Python 3.12
_POLLIN, _SERVING, _ENDED = select.POLLIN, State.SERVING, State.ENDED

HANDLED = (*FORWARDED, signal.SIGQUIT, signal.SIGCHLD)


class Supervisor:
    """The parent.

    Args:
        log: the parent's log.
        command: the worker's program, and its arguments.
        passed: numbers of inherited descriptors for the first worker that serves.
        drain_timeout: seconds that a worker has to end.
    """

    def __init__(
        self, log: Log, command: list[str], passed: set[int], drain_timeout: float
    ) -> None:
        self._log = log
        self._manager = Manager()
        heartbeat = self._manager.watchdog or HEARTBEAT
        # Maximum seconds of a worker in each state (Worker.start_timeout while it starts); SERVING:
        # maximum seconds between two messages.  DRAINING: counted from the first signal.
        self._timeouts = {
            State.SERVING: heartbeat,
            State.STOPPING: drain_timeout,
            State.DRAINING: drain_timeout + _END_TIMEOUT,
            **dict.fromkeys((State.GONE, State.HUNG, State.KILLED), _DEATH_TIMEOUT),
        }
        self._restarts = Restarts()
        self._state = State.FIRST_WAIT
        self._since = 0.0  # begin of the state's timeout
        self._worker: Worker | None = None
        self._stuck: set[int] = set()  # pids of killed workers whose end hangs
        self._due = 0.0  # time of the next _work() (time.monotonic()); 0: at once
        self._lifeline = -1  # lifeline of a takeover in which the worker died, outcome unknown
        self._reload = False  # whether to forward SIGHUP once the worker serves
        self._status = 0
        self._poll = select.poll()
        self._program = Program(log, command, passed, heartbeat, self._poll)
        self._wake, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._closer = SlowCloser(writer)
        self._store = Store(self._closer)
        self._mailbox = Mailbox(log, self._store, self._program)
        self._poll.register(self._wake, select.POLLIN)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        for number in HANDLED:
            signal.signal(number, lambda *_: None)
        set_up_signals(HANDLED)

    def run(self) -> int:
        """Supervise until the worker ends by itself or by a signal; return the exit status."""
        while self._state is not _ENDED:
            try:
                self._turn()
            except Exception as exc:  # noqa: BLE001 - the parent has the only copy after a crash
                self._log.log("error", f"the parent goes on after an error: {exc!r}")
                time.sleep(FIRST_DELAY)
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
        if self._program.end_spare():
            signal.sigtimedwait([signal.SIGCHLD], _DEATH_TIMEOUT)
            self._reap()
        return self._status

    def _turn(self) -> None:
        """Do one pass of the main loop: due work, poll(2), events."""
        now = time.monotonic()
        if self._due <= now:
            self._due = self._work(now)
        for number, events in self._poll.poll(max(self._due - now, 0) * 1000 + 1):
            worker = self._worker
            if worker is not None and number == worker.number:
                if events & _POLLIN:
                    self._receive(worker, MESSAGES)
                if events & select.POLLHUP:  # the worker has closed its end, or is dying
                    self._receive(worker)
                    self._poll.unregister(worker.sock)
                    self._apply(Event.HANGUP)
                elif worker.unsent or self._closer.pending or worker.polled_for != _POLLIN:
                    self._update_poll(worker)
            elif number == self._wake:
                self._handle_wakeup()
            elif self._program.is_spare(number):
                self._program.replace_spare()
                self._due = 0.0
            elif number == self._lifeline:
                self._poll.unregister(number)
                self._lifeline = -1
                self._store.settle_takeover()
                self._due = 0.0

    def _work(self, now: float) -> float:
        """Do the work that is due; return the time of the next call."""
        if self._start_at <= now:
            self._start(now)
        if self._deadline <= now:
            self._time_out(now)
        spare_at = self._program.keep_spare(now) if self._state is _SERVING else NEVER
        due = min(self._manager.work(now), self._deadline, self._start_at, spare_at)
        return min(due, now + _LONGEST_WAIT)

    @property
    def _start_at(self) -> float:
        """Time of the next start of a worker; NEVER while the outcome of a takeover is unknown."""
        return NEVER if self._worker is not None or self._lifeline >= 0 else self._restarts.at

    @property
    def _deadline(self) -> float:
        """End of the timeout of the worker's state."""
        if self._worker is None:
            return NEVER
        return self._since + self._timeouts.get(self._state, self._worker.start_timeout)

    def _handle_wakeup(self) -> None:
        """Handle signals received, and slow closes completed."""
        numbers = os.read(self._wake, 64)
        for name in self._closer.take_closed():
            if self._worker is not None:
                self._worker.send(b"CLOSED=" + name)
        for number in numbers:
            if number:
                self._handle_signal(number)
        if self._worker is not None and self._state is not State.ENDED:
            self._update_poll(self._worker)
        self._due = 0.0

    def _update_poll(self, worker: Worker) -> None:
        """Update the events that the worker's socket is polled for.  With a full descriptor table,
        no message is received until a close under way has made room.
        """
        full = self._closer.pending and (
            len(self._store.fds) + self._closer.pending >= self._program.most_open
        )
        events = (0 if full else select.POLLIN) | (select.POLLOUT if worker.flush() else 0)
        if events != worker.polled_for:
            worker.polled_for = events
            try:
                self._poll.modify(worker.sock, events)
            except OSError:  # unregistered after a hang-up
                pass

    def _apply(self, event: Event) -> None:
        """Apply the transition for *event*, and restart the timeout."""
        former, self._state = self._state, TRANSITIONS[self._state].get(event, self._state)
        if self._state is not former and self._state is not State.DRAINING:
            self._since = time.monotonic()
        self._due = 0.0

    # -- the worker's life ---------------------------------------------------------------------

    def _start(self, now: float) -> None:
        """Start a worker."""
        try:
            if self._restarts.failures:  # the spare worker may have the same fault
                self._program.end_spare()
            worker = self._program.start(self._store.fds, may_hang=bool(self._stuck))
        except OSError as exc:
            delay = self._restarts.failed(now)
            self._log.log(
                "error", f"cannot start a worker: {exc.strerror}: trying again in {delay:g} s"
            )
            return
        self._worker = worker
        self._poll.register(worker.sock, worker.polled_for)
        self._update_poll(worker)
        self._apply(Event.START)

    def _time_out(self, now: float) -> None:
        """Kill a worker that has missed its deadline."""
        worker = self._worker
        assert worker is not None
        self._receive(worker)  # its messages may have waited while the parent was stopped
        late = now - self._deadline
        if late < 0:
            return
        if late > _GRACE:  # the parent was stopped, perhaps with the worker (cgroup freezer)
            self._since += late + _GRACE
            return
        if self._state in (State.HUNG, State.KILLED):
            self._log.log("error", "the worker was killed and does not end: not waiting for it")
            self._stuck.add(worker.pid)
            self._handle_death(worker, -signal.SIGKILL)
            return
        if self._state in ENDING:
            what = f"has not ended {now - self._since:.1f} s after it was told to"
        elif self._state is State.GONE:
            what = "has closed its socket and does not end"
        else:
            what = f"has not answered for {now - self._since:.1f} s"
        self._log.log("error", f"the worker {what}: killing it")
        worker.kill(signal.SIGKILL)
        self._apply(Event.TIMEOUT)

    def _reap(self) -> None:
        """Call waitpid(2) for each dead child.  As process 1, the parent has orphans too."""
        while True:
            try:
                pid, wait_status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            self._stuck.discard(pid)
            if self._worker is not None and pid == self._worker.pid:
                self._handle_death(self._worker, os.waitstatus_to_exitcode(wait_status))

    def _handle_death(self, worker: Worker, status: int) -> None:
        """Handle the death of the worker: schedule the start of another, or end."""
        # Handle its last messages first: clients and a successor may rely on them already.
        self._receive(worker)
        try:
            self._poll.unregister(worker.sock)
        except KeyError:  # unregistered after a hang-up
            pass
        self._worker = None
        worker.sock.close()
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        if self._state in ENDING:
            if status != 0:
                self._store.remove_files()
            # 0 after a death by a signal: the worker was told to end.
            return self._end(max(status, 0))
        if status == 0 or (status > 0 and self._state is State.FIRST_START):
            return self._end(status)  # the worker has logged why
        if not self._store.has_journal:
            self._store.clear()
            if self._store.had_journal:  # the worker has removed everything: handed over, or quit
                self._log.log("info", f"the worker {how}, after another daemon took over: ending")
                return self._end(0)
        self._start_again(worker, how)
        self._lifeline = self._store.lifeline
        if self._lifeline >= 0:
            self._poll.register(self._lifeline, select.POLLIN)
        return self._apply(Event.DIED)

    def _end(self, status: int) -> None:
        self._status = status
        self._apply(Event.END)

    def _start_again(self, worker: Worker, how: str) -> None:
        now = time.monotonic()
        if worker.ready_at is not None:
            self._restarts.served(now, worker.ready_at)
            self._log.log("warning", f"the worker {how}: starting it again")
            return
        delay = self._restarts.failed(now)
        message = f"the worker {how} before it could serve: trying again in {delay:g} s"
        if not self._restarts.are_many:
            self._log.log("warning", message)
            return
        pid = os.getpid()
        self._log.log(
            "error",
            f"{message}. pid {pid} keeps {len(self._store.fds)} descriptors: once the cause is "
            f"gone, kill -HUP {pid} tries at once; kill {pid} closes them",
        )

    # -- signals -------------------------------------------------------------------------------

    def _handle_signal(self, number: int) -> None:
        if number == signal.SIGCHLD:
            self._reap()
        elif number == signal.SIGHUP:
            self._handle_hangup()
        elif number in (signal.SIGTERM, signal.SIGINT):
            self._handle_stop(number)
        elif number == signal.SIGQUIT:
            self._log.log("warning", QUIT_IGNORED)

    def _handle_hangup(self) -> None:
        """Handle SIGHUP: start the next worker at once, or forward the signal."""
        if self._worker is None:
            self._restarts = Restarts()
        elif self._state is State.SERVING:
            self._worker.kill(signal.SIGHUP)
        else:  # SIGHUP would kill a worker that does not handle it yet
            self._reload = True

    def _handle_stop(self, number: int) -> None:
        worker = self._worker
        if worker is None:
            self._store.remove_files()
            self._end(0)
            return
        # SIGNALS= lets the worker tell a forwarded signal from one that was sent to both processes.
        worker.stops += 1
        worker.send(b"SIGNALS=%d" % worker.stops)
        # While the worker starts, SIGINT would end it with a traceback.
        worker.kill(signal.SIGTERM if worker.ready_at is None else number)
        self._apply(Event.STOP)

    # -- messages of the worker ----------------------------------------------------------------

    def _receive(self, worker: Worker, most: int | None = None) -> None:
        """Handle the worker's pending messages, *most* of them or all."""
        for data, fds, truncated in islice(iter(worker.receive, None), most):
            if self._state is _SERVING:
                self._since = time.monotonic()
            else:
                worker.start_timeout = START_TIMEOUT
            waits, others = self._mailbox.handle(worker, data, fds, truncated)
            if others:
                self._handle_notification(worker, others)
            if waits and most is not None:
                return  # the worker waits for an answer: most likely it has sent nothing more

    def _handle_notification(self, worker: Worker, lines: Sequence[bytes]) -> None:
        """Handle lines of a message that are for the service manager too."""
        if b"READY=1" in lines:
            if worker.ready_at is None:
                worker.ready_at = time.monotonic()
            self._program.close_passed()
            self._apply(Event.READY)
            if self._reload and self._state is State.SERVING:
                self._reload = False
                worker.kill(signal.SIGHUP)
        if b"STOPPING=1" in lines:
            self._apply(Event.STOPS)
        self._manager.forward(b"\n".join(lines))
        self._due = 0.0
