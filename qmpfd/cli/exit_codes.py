"""Exit statuses, the error for wrong usage, and the cause of a failure."""

from __future__ import annotations

DONE, REFUSED, USAGE, NO_DAEMON = range(4)


def cause(failure: BaseException) -> BaseException:
    """Return the first exception in the groups that nested nurseries make of it."""
    while isinstance(failure, BaseExceptionGroup):
        failure = failure.exceptions[0]
    return failure


class UsageError(Exception):
    """The command line is invalid, or names things that do not exist: exit status 2."""
