"""Fetches the stored descriptors from the parent into a worker, at their numbers.

The kernel gives a received descriptor the lowest free number.  So the worker occupies all other
numbers, and requests the descriptors by ascending number.  None has to be moved afterwards:
closing the duplicate could hang (close(2) of a file on a FUSE mount that does not answer).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Sequence

from ...kernel.fd import close_all
from ...kernel.renumber import Movable, keep_free
from ...kernel.systemd import InheritedFd, Notifier
from ...limits import SCM_MAX_FD
from .names import JOURNAL, is_numbered
from .recover import newest
from .replay import History

#: Seconds that the parent has to answer.
_TIMEOUT = 60.0


def fetch(
    parent: Notifier, names: Iterable[str], movable: Sequence[Movable]
) -> tuple[list[InheritedFd], History]:
    """Fetch the descriptors that the parent keeps.

    Args:
        parent: connection to the parent.
        names: the names of these descriptors.
        movable: descriptors of this process that may be moved out of the way.

    Returns:
        The descriptors, and the history in the newest journal among them.

    Raises:
        OSError: the parent cannot pass the descriptors.
        ValueError: no journal among them can be read.
    """
    names = list(names)
    fetched = _fetch(parent, [name for name in names if not is_numbered(name)])
    try:
        history = newest([given.fd for given in fetched if given.name.startswith(JOURNAL)])
        numbers = {entry.name: number for number, entry in history.entries.items()}
        at = {numbers[name]: name for name in names if name in numbers}
        own = [given.fd for given in fetched]
        targets, fillers = keep_free(at, [*movable, *own])
        try:
            placed = [at[number] for number in targets]
            fetched += _fetch(parent, placed)
            received = {given.name for given in fetched}
            fetched += _fetch(parent, [name for name in names if name not in received])
        finally:
            close_all(fillers)
    except BaseException:
        close_all(given.fd for given in fetched)
        raise
    return fetched, history


def _fetch(parent: Notifier, names: Sequence[str]) -> list[InheritedFd]:
    """Fetch the descriptors *names* in that order; request each chunk before the last one came."""
    chunks = [names[at : at + SCM_MAX_FD] for at in range(0, len(names), SCM_MAX_FD)]
    fetched: list[InheritedFd] = []
    asked = 0
    try:
        for number in range(len(chunks)):
            while asked < min(number + 2, len(chunks)):
                parent.send("QMPFD_FETCH=" + ":".join(chunks[asked]))
                asked += 1
            fetched += _receive(parent)
    except BaseException:
        close_all(given.fd for given in fetched)
        raise
    return fetched


def _receive(parent: Notifier) -> list[InheritedFd]:
    while True:
        text, fds = parent.receive_fds(_TIMEOUT)
        kind, _, value = text.partition("=")
        names = value.split(":") if value else []
        if kind == "FETCHED" and len(names) == len(fds):
            return list(map(InheritedFd, fds, names))
        close_all(fds)
        if kind == "FETCHED" or not text:
            raise OSError(errno.EIO, os.strerror(errno.EIO) if text else "it is gone")
