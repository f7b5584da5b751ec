"""Properties of this process: its limit of open files, and orphans that become its children."""

from __future__ import annotations

import resource
from contextlib import suppress

_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h


def hard_limit() -> int:
    """Return the hard limit of open descriptors (RLIMIT_NOFILE, getrlimit(2))."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[1]


def raise_open_files_limit() -> None:
    """Raise the soft limit of open descriptors to the hard limit."""
    most = hard_limit()
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def adopt_orphans() -> None:
    """Make this process a subreaper (prctl(2)), if that is possible: an orphaned descendant becomes
    its child.  execve(2) preserves it.
    """
    with suppress(ImportError, OSError, AttributeError):
        import ctypes  # noqa: PLC0415 - its import opens a descriptor

        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
