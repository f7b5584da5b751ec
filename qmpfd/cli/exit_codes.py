"""Exit statuses, and the errors that lead to them."""

from __future__ import annotations

DONE, REFUSED, USAGE, NO_DAEMON = range(4)


class UsageError(Exception):
    """The command line cannot be carried out: exit status 2."""
