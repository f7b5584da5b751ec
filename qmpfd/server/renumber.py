"""Gives descriptors the numbers that they had in another process: in a restart and in a takeover.

It has to run before anything is imported that opens descriptors of its own.  Since Python 3.14,
importing ctypes, which Trio does, leaves one of libffi's open at the lowest free number.
"""

from __future__ import annotations

import fcntl
import logging
import os
import resource
from collections.abc import Container, Iterable, Mapping
from typing import Protocol

from ..kernel.fd import Fd

_log = logging.getLogger("qmpfd")


class Movable(Protocol):
    """The owner of a descriptor, which may get another number."""

    def fileno(self) -> int:
        """The descriptor's number."""

    def move_to(self, number: int) -> None:
        """As :meth:`qmpfd.kernel.fd.Fd.move_to`."""


def renumber(fds: Mapping[int, Fd], others: Iterable[Movable] = ()) -> None:
    """Give descriptors their numbers; the owners stay the same.

    A number that cannot be had (a library or a parent process has opened something there, or it is
    beyond RLIMIT_NOFILE) costs that descriptor its number, and a line of the log; all others get
    theirs.

    Args:
        fds: the descriptors, by the number that each of them is to have.
        others: more descriptors that may get other numbers.
    """
    if all(fd.number == number for number, fd in fds.items()):
        return
    movables: list[Movable] = [*fds.values(), *others]
    at = {movable.fileno(): movable for movable in movables}
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = {
        number: fd
        for number, fd in fds.items()
        if 0 <= number < most and (number in at or not _is_open(number))
    }
    for number in wanted:  # those that are free, and whatever number that frees
        _fill(number, wanted, at)
    for number, fd in wanted.items():  # what is left: others are there, or it is a ring
        if at[number] is not fd and _move_aside(number, wanted, at):
            _fill(number, wanted, at)
    for number, fd in fds.items():
        if fd.number != number:
            _log.warning(
                "descriptor %d now has the number %d: number %d is in use in this process",
                number,
                fd.number,
                number,
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


def _fill(number: int, wanted: Mapping[int, Movable], at: dict[int, Movable]) -> None:
    """If nothing is at *number*, move what belongs there; then what belongs where that was, and so
    on.
    """
    while number in wanted and number not in at:
        movable = at[number] = wanted[number]
        former = movable.fileno()
        del at[former]
        movable.move_to(number)
        number = former


def _move_aside(number: int, wanted: Container[int], at: dict[int, Movable]) -> bool:
    """Move what is at *number* to one that nobody wants; whether there is one."""
    lowest = 0
    while True:
        try:
            spare = Fd(fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, lowest))
        except OSError:  # EMFILE, EINVAL: none up to the limit
            return False
        with spare:
            if spare.fileno() not in wanted:
                movable = at.pop(number)
                movable.move_to(spare.detach())
                at[movable.fileno()] = movable
                return True
            lowest = spare.fileno() + 1


def _is_open(number: int) -> bool:
    try:
        fcntl.fcntl(number, fcntl.F_GETFD)
    except OSError:
        return False
    return True
