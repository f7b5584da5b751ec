"""Exit statuses, and the errors that lead to them."""

from __future__ import annotations

DONE, REFUSED, USAGE, NO_DAEMON = range(4)


class UsageError(Exception):
    """What was typed cannot be done."""
