"""Finds descriptors that refer to the same open file description (open(2)).

The service manager stores one descriptor of each description, and silently drops a second one.  No
call here asks a file system, so none can block.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import platform
from bisect import bisect_left
from collections.abc import Callable
from functools import cache, cmp_to_key

#: System call number of kcmp(2) by machine; most others have the number of the generic table.
_KCMP = {"x86_64": 312, "i386": 349, "i686": 349, "armv7l": 378, "ppc64le": 354, "s390x": 343}
_KCMP_GENERIC = 272
_KCMP_FILE = 0

#: fcntl(2): whether two descriptors refer to the same description; since Linux 6.10.
_F_DUPFD_QUERY = 1027


@cache
def _syscall() -> Callable[..., int]:
    return ctypes.CDLL(None, use_errno=True).syscall


def compare(one: int, other: int) -> int:
    """Compare the open file descriptions of two descriptors by kcmp(2); return -1, 0 or 1.

    Raises:
        OSError: kcmp(2) is not implemented or not permitted.
    """
    number = _KCMP.get(platform.machine(), _KCMP_GENERIC)
    pid = os.getpid()
    result = _syscall()(number, pid, pid, _KCMP_FILE, one, other)
    if result not in (0, 1, 2):
        code = ctypes.get_errno() or errno.ENOSYS
        raise OSError(code, os.strerror(code))
    return (0, -1, 1)[result]


def is_same(one: int, other: int) -> bool:
    """Whether two descriptors refer to the same open file description.

    Raises:
        OSError: the kernel is older than Linux 6.10.
    """
    return fcntl.fcntl(one, _F_DUPFD_QUERY, other) == 1


class Descriptions:
    """Set of open file descriptions, each represented by one of its descriptors.

    Raises:
        OSError: neither kcmp(2) nor F_DUPFD_QUERY works here.
    """

    def __init__(self) -> None:
        try:
            compare(0, 0)
        except OSError as exc:
            self._ordered = exc.errno == errno.EBADF  # descriptor 0 is closed, but kcmp(2) works
            if not self._ordered:
                is_same(0, 0)
        else:
            self._ordered = True
        self._known: list[int] = []

    def find(self, number: int) -> int | None:
        """Return the descriptor that represents the description of *number*, or None."""
        at, found = self._search(number)
        return self._known[at] if found else None

    def add(self, number: int) -> None:
        """Add the description of *number*, which must not be in the set yet."""
        self._known.insert(self._search(number)[0], number)

    def replace(self, number: int, by: int | None) -> None:
        """Have *by* represent the description that *number* represents; None removes it.

        Without effect if *number* represents none.  *number* may be closed or reused by now.
        """
        if number in self._known:
            at = self._known.index(number)
            self._known[at : at + 1] = [] if by is None else [by]

    def _search(self, number: int) -> tuple[int, bool]:
        """Return the index of the description in the list, or for it; and whether it is there."""
        known = self._known
        if not self._ordered:
            for at, other in enumerate(known):
                if other == number or is_same(other, number):
                    return at, True
            return len(known), False
        key = cmp_to_key(compare)
        at = bisect_left(known, key(number), key=key)
        return at, at < len(known) and compare(known[at], number) == 0
