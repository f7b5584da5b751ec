"""Signal dispositions of the daemon's processes: which signals are handled, which ignored."""

from __future__ import annotations

import signal

TYPE_CHECKING = False
if TYPE_CHECKING:  # typing takes a mebibyte
    from collections.abc import Collection

#: Signals that the parent forwards: they end the worker, or make it read its policy again.
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

#: Signals that keep their default action: faults, job control, SIGKILL and SIGSTOP, and SIGCHLD:
#: if it were ignored, waitpid(2) would not return the status of children.
_BY_DEFAULT = {
    signal.SIGKILL,
    signal.SIGSTOP,
    signal.SIGTSTP,
    signal.SIGCONT,
    signal.SIGCHLD,
    signal.SIGABRT,
    signal.SIGBUS,
    signal.SIGFPE,
    signal.SIGILL,
    signal.SIGSEGV,
    signal.SIGSYS,
    signal.SIGTRAP,
}

#: Log message for SIGQUIT, which users may expect to end a program.
QUIT_IGNORED = "SIGQUIT is ignored: SIGTERM ends the daemon, a second one at once"


def set_up_signals(handled: Collection[int]) -> None:
    """Ignore all signals that would end or stop this process, except *handled*, and clear the
    signal mask, which is inherited (signal(7)).

    Such a signal may be sent by mistake; the kernel sends SIGIO for a descriptor with O_ASYNC
    (fcntl(2), F_SETOWN).  SIGTTOU is ignored as well: with ``stty tostop``, it would stop a process
    that logs to its terminal.
    """
    for number in signal.valid_signals() - _BY_DEFAULT - set(handled):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
