"""Which signals mean something to the daemon's processes: all others are ignored."""

from __future__ import annotations

import signal

TYPE_CHECKING = False
if TYPE_CHECKING:  # typing takes a mebibyte
    from collections.abc import Collection

#: Signals that end the worker or have it read its policy again: those are forwarded.
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

#: Signals that keep what they do by default: faults, job control, what nobody can change, and the
#: end of a child, which nobody could wait for if it were ignored (waitpid(2)).
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

#: What is said of SIGQUIT, which a user may expect to end a program.
QUIT_IGNORED = "SIGQUIT is ignored: SIGTERM ends the daemon, a second one at once"


def set_up_signals(heard: Collection[int]) -> None:
    """Ignore every signal that would end or stop this process and is none of *heard*, and block
    none: the signal mask is inherited (signal(7)).

    Anybody who may signal the process can send one by mistake, and the kernel sends SIGIO for a
    descriptor with O_ASYNC (fcntl(2), F_SETOWN).  SIGTTOU is one of them: with ``stty tostop``, it
    would stop a process that logs to its terminal.
    """
    for number in signal.valid_signals() - _BY_DEFAULT - set(heard):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
