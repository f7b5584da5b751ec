"""Whether an epoll instance is watched by another one, in whatever process (epoll(7))."""

from __future__ import annotations

import errno
import os
import select
from contextlib import ExitStack
from itertools import pairwise

from .fd import Fd

#: Epoll instances may watch each other up to a depth of 5 (epoll_ctl(2), ELOOP).
_DEEPEST = 5

#: Errors of epoll_ctl(2) beyond that depth; EINVAL by kernels that count it from the file.
_TOO_DEEP = {errno.ELOOP, errno.EINVAL}


class WatchDetector:
    """Detects whether an epoll instance is watched by another one.

    The detector has a chain of epoll instances; the last one watches a file.  With the chain below
    it, an instance is as deep as the kernel allows.  So it can be given the chain only if no other
    one watches it.

    Raises:
        OSError: this process is out of descriptors, or the kernel of epoll watches.
    """

    def __init__(self) -> None:
        with ExitStack() as stack:
            file = stack.enter_context(Fd(os.eventfd(0, os.EFD_CLOEXEC)))
            chain = [stack.enter_context(select.epoll()) for _ in range(_DEEPEST - 1)]
            chain[0].register(file, 0)
            for watched, watching in pairwise(chain):
                watching.register(watched, 0)
            self._top = chain[-1].fileno()
            self._open = stack.pop_all()

    def is_watched(self, epoll: select.epoll) -> bool:
        """Return whether another epoll instance watches *epoll*, which watches nothing; False if
        the kernel is out of memory or epoll watches.
        """
        try:
            epoll.register(self._top, 0)
        except OSError as exc:
            return exc.errno in _TOO_DEEP
        epoll.unregister(self._top)
        return False

    def close(self) -> None:
        """Close the chain."""
        self._open.close()
