"""The command line of the parent."""

from __future__ import annotations

from .log import Log
from .parent import Supervisor
from .program import inherited_sockets
from .signals import set_up_signals

#: Default number of seconds that a worker has to end.
DRAIN_TIMEOUT = 5.0


def main(arguments: list[str]) -> int:
    """Supervise workers; return the exit status.

    Args:
        arguments: ``--drain-timeout=SECONDS``, if it is not 5; format and level of the log; the
            numbers of descriptors for the first worker only, separated by commas; the worker's
            command line.
    """
    drain_timeout = DRAIN_TIMEOUT
    if arguments[0].startswith("--drain-timeout="):
        drain_timeout = float(arguments[0].partition("=")[2])
        arguments = arguments[1:]
    form, level, passed, *command = arguments
    numbers = {int(number) for number in passed.split(",") if number}
    log = Log(form, level)
    status = Supervisor(log, command, numbers, inherited_sockets(), drain_timeout).run()
    set_up_signals(())  # a signal while the interpreter ends must not change the exit status
    return status
