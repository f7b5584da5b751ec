"""Exit statuses, and the error for wrong usage."""

from __future__ import annotations

DONE, REFUSED, USAGE, NO_DAEMON = range(4)


class UsageError(Exception):
    """The command line is invalid, or names things that do not exist: exit status 2."""
