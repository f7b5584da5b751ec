"""Gives descriptors the numbers that they had in another process: in a restart and in a takeover.

It has to run before anything is imported that opens descriptors of its own.  Since Python 3.14,
importing ctypes, which Trio does, leaves one of libffi's open at the lowest free number.
"""

from __future__ import annotations

import fcntl
import logging
import os
import resource
from collections.abc import Iterable, Sequence
from typing import Protocol

from ..kernel.fd import Fd

_log = logging.getLogger("qmpfd")


class Movable(Protocol):
    """The owner of a descriptor, which may get another number."""

    def fileno(self) -> int:
        """The descriptor's number."""

    def move_to(self, number: int) -> None:
        """As :meth:`qmpfd.kernel.fd.Fd.move_to`."""


def renumber(
    fds: Sequence[Fd], targets: Sequence[int | None], others: Iterable[Movable] = ()
) -> None:
    """Give descriptors their numbers; the owners stay the same.

    A number that cannot be had (a library or a parent process has opened something there, or it is
    beyond RLIMIT_NOFILE) costs that descriptor its number, and a line of the log; all others get
    theirs.

    Args:
        fds: the descriptors.
        targets: the number that each of them is to have; None if it does not matter.
        others: more descriptors that may get other numbers.
    """
    if all(target in (None, fd.number) for fd, target in zip(fds, targets, strict=True)):
        return
    table = _Table([*fds, *others], targets)
    for _ in range(2):  # where the table is full, the first pass makes room for the second
        for index in range(len(fds)):
            table.settle(index)
    for fd, target in zip(fds, targets, strict=True):
        if target is not None and fd.fileno() != target:
            _log.warning(
                "descriptor %d now has the number %d: number %d is in use in this process",
                target,
                fd.fileno(),
                target,
            )


#: Numbers at most that :func:`keep_free` has something open at.
_MOST_FILLERS = 1 << 16


def keep_free(numbers: Iterable[int], movable: Iterable[Movable]) -> tuple[list[int], list[Fd]]:
    """See to it that these numbers are the lowest that are free: the next descriptors that this
    process gets, have them.

    Args:
        numbers: the numbers.
        movable: descriptors that are open here and may get other numbers.

    Returns:
        The numbers, ascending, without those that cannot be had; and what is open at all others
        up to there, which the caller owns.

    Raises:
        OSError: this process may not have so many descriptors.
    """
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = sorted(number for number in numbers if 0 <= number < most)
    end = wanted[-1] + 1 if wanted else 0
    if end - len(wanted) > _MOST_FILLERS:
        return [], []
    targets = set(wanted)
    for each in movable:
        if each.fileno() in targets:
            aside = fcntl.fcntl(each.fileno(), fcntl.F_DUPFD_CLOEXEC, end)
            each.move_to(aside)
    open_ = _open_numbers(end)
    fillers: list[Fd] = []
    with Fd(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)) as null:
        null.move_to(fcntl.fcntl(null.fileno(), fcntl.F_DUPFD_CLOEXEC, end))
        fillers += (
            Fd(os.dup2(null.fileno(), number, inheritable=False))
            for number in range(end)
            if number not in targets and number not in open_
        )
    return [number for number in wanted if number not in open_], fillers


def _open_numbers(end: int) -> set[int]:
    """The numbers below *end* that are open."""
    try:
        # The one that the folder is listed with is closed again.
        return {n for n in map(int, os.listdir("/proc/self/fd")) if n < end and _is_open(n)}
    except OSError:  # there is no /proc
        return {number for number in range(end) if _is_open(number)}


class _Table:
    """The process's table of descriptors, as far as it is ours."""

    def __init__(self, movables: Sequence[Movable], targets: Sequence[int | None]) -> None:
        self._movables = movables
        self._at = {movable.fileno(): index for index, movable in enumerate(movables)}
        self._targets: dict[int, int] = {}  # by index; no two are equal
        self._wanted: set[int] = set()
        most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        for index, target in enumerate(targets):
            if target is None or target in self._wanted or not 0 <= target < most:
                continue
            if target in self._at or not _is_open(target):
                self._targets[index] = target
                self._wanted.add(target)

    def settle(self, index: int) -> None:
        """Have that descriptor at its number: whoever is in the way goes first to its own."""
        chain: list[int] = []
        mover: int | None = index
        while mover is not None:
            target = self._targets.get(mover)
            if target is None or mover in chain[:1]:  # it may go anywhere, or the chain is a ring
                if not chain or not self._move_aside(mover):
                    return
                break
            if self._movables[mover].fileno() == target:
                return
            chain.append(mover)
            mover = self._at.get(target)
        for mover in reversed(chain):
            self._move(mover, self._targets[mover])

    def _move_aside(self, index: int) -> bool:
        """Move a descriptor to a number that nobody wants; whether there is one."""
        lowest = 0
        while True:
            try:
                number = self._movables[index].fileno()
                spare = Fd(fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, lowest))
            except OSError:  # EMFILE, EINVAL: none up to the limit
                return False
            with spare:
                if spare.fileno() not in self._wanted:
                    self._move(index, spare.detach())
                    return True
                lowest = spare.fileno() + 1

    def _move(self, index: int, number: int) -> None:
        movable = self._movables[index]
        del self._at[movable.fileno()]
        movable.move_to(number)
        self._at[number] = index


def _is_open(number: int) -> bool:
    try:
        fcntl.fcntl(number, fcntl.F_GETFD)
    except OSError:
        return False
    return True
