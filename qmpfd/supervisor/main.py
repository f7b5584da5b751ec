"""The command line of the parent."""

from __future__ import annotations

from .log import Log
from .parent import Supervisor
from .program import is_inherited, listen_fds
from .signals import set_up_signals

#: The exit status of a daemon that cannot start.
CANNOT_START = 2


def main(arguments: list[str]) -> int:
    """Supervise workers; return the exit status.

    Args:
        arguments: format and level of the log; number of seconds that a worker has to end; the
            numbers of descriptors for the first worker that serves, separated by commas; the
            worker's command line.
    """
    form, level, drain_timeout, passed, *command = arguments
    numbers = {int(number) for number in passed.split(",") if number} | listen_fds()
    log = Log(form, level)
    try:
        parent = Supervisor(log, command, set(filter(is_inherited, numbers)), float(drain_timeout))
    except OSError as exc:  # out of descriptors
        problem = f"the parent cannot start: {exc.strerror}"
        log.log("error", problem)
        return CANNOT_START
    status = parent.run()
    set_up_signals(())  # a signal while the interpreter ends must not change the exit status
    return status
