"""Gives descriptors the numbers that they had in another process: in a restart and in a takeover.

The functions here run before the import of any module that opens descriptors of its own: since
Python 3.14 importing ctypes, which Trio does, leaves one of libffi's at the lowest free number.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Container, Iterable, Mapping
from typing import Protocol

from .fd import Fd, close_all, duplicate, is_open, open_files_limit, open_numbers
from .files import open_null

_log = logging.getLogger("qmpfd")


class Movable(Protocol):
    """Owner of a descriptor whose number may change."""

    def fileno(self) -> int:
        """The descriptor's number."""

    def move_to(self, number: int) -> None:
        """As :meth:`qmpfd.kernel.fd.Fd.move_to`."""


def renumber(fds: Mapping[int, Fd], others: Iterable[Movable] = ()) -> None:
    """Give descriptors the numbers in *fds*; the owning objects stay the same.

    Where a number is in use by a library or inherited from the parent process, or is beyond
    RLIMIT_NOFILE, that descriptor keeps its present number and a warning is logged.

    Args:
        fds: the descriptors, by target number.
        others: more descriptors that may be moved out of the way.
    """
    if all(fd.number == number for number, fd in fds.items()):
        return
    movables: list[Movable] = [*fds.values(), *others]
    at = {movable.fileno(): movable for movable in movables}
    most = open_files_limit()
    wanted = {
        number: fd
        for number, fd in fds.items()
        if 0 <= number < most and (number in at or not is_open(number))
    }
    for number in wanted:  # targets that are free, and those that become free thereby
        _fill(number, wanted, at)
    for number, fd in wanted.items():  # the rest: occupied targets, and cycles of targets
        if at[number] is not fd and _move_aside(number, wanted, at):
            _fill(number, wanted, at)
    for number, fd in fds.items():
        if fd.number != number:
            why = "in use in this process" if number < most else "above the limit of open files"
            _log.warning(
                "descriptor %d now has the number %d: number %d is %s",
                number,
                fd.number,
                number,
                why,
            )


#: Maximum of placeholders that :func:`keep_free` opens.
_MOST_FILLERS = 1 << 16


def keep_free(numbers: Iterable[int], movable: Iterable[Movable]) -> tuple[list[int], list[Fd]]:
    """Make *numbers* the lowest free descriptor numbers: the next descriptors opened get them.

    Args:
        numbers: the numbers.
        movable: open descriptors of this process that may be moved out of the way.

    Returns:
        Those of *numbers* that are free now, ascending; and the placeholders that occupy all other
        numbers up to the highest, which the caller owns.  Neither, if RLIMIT_NOFILE does not allow
        so many.
    """
    most = open_files_limit()
    wanted = sorted(number for number in numbers if 0 <= number < most)
    end = wanted[-1] + 1 if wanted else 0
    if end - len(wanted) > _MOST_FILLERS:
        return [], []
    targets = set(wanted)
    fillers: list[Fd] = []
    try:
        for each in movable:
            if each.fileno() in targets:
                each.move_to(duplicate(each, end).detach())
        open_ = set(open_numbers(end))
        with open_null() as null:
            null.move_to(duplicate(null, end).detach())
            fillers += (
                Fd(os.dup2(null.fileno(), number, inheritable=False))
                for number in range(end)
                if number not in targets and number not in open_
            )
    except OSError:  # EINVAL, EMFILE: there is no number beyond the highest
        close_all(fillers)
        return [], []
    return [number for number in wanted if number not in open_], fillers


def _fill(number: int, wanted: Mapping[int, Movable], at: dict[int, Movable]) -> None:
    """If *number* is free, move its descriptor there; then fill the number freed thereby, etc."""
    while number in wanted and number not in at:
        movable = at[number] = wanted[number]
        former = movable.fileno()
        del at[former]
        movable.move_to(number)
        number = former


def _move_aside(number: int, wanted: Container[int], at: dict[int, Movable]) -> bool:
    """Move the descriptor at *number* to a number that is no target; return whether one is free."""
    try:
        aside = duplicate(number, avoid=wanted).detach()
    except OSError:  # EMFILE, EINVAL: no free number up to RLIMIT_NOFILE
        return False
    movable = at[aside] = at.pop(number)
    movable.move_to(aside)
    return True
