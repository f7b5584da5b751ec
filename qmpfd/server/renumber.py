"""Gives descriptors the numbers that they had in another process."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Collection, Sequence

from ..kernel.fd import Fd
from ..kernel.systemd import Notifier


def make_way(parent: Notifier | None, numbers: Collection[int]) -> None:
    """Have the parent's socket, if there is one, at none of *numbers*."""
    if parent is not None and parent.fileno() in numbers:
        parent.move(_spare(parent.fileno(), numbers))


def _spare(number: int, avoid: Collection[int]) -> Fd:
    """A duplicate of a descriptor, under a number that is not one of *avoid*."""
    lowest = 0
    while True:
        duplicate = Fd(fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, lowest))
        if duplicate.fileno() not in avoid:
            return duplicate
        lowest = duplicate.fileno() + 1
        duplicate.close()


def place(fds: Sequence[Fd], wanted: Sequence[int | None]) -> list[Fd]:
    """Give descriptors the numbers that they are to have.

    Args:
        fds: the descriptors; owned from here on.
        wanted: the number of each; None if it does not matter.

    Returns:
        Their new owners, in the same order.

    Raises:
        ValueError: a number is in use by something else.
    """
    placed = list(fds)
    numbers = {number for number in wanted if number is not None}
    at = {fd.fileno(): index for index, fd in enumerate(placed)}
    for number in numbers - at.keys():
        if os.path.exists(f"/proc/self/fd/{number}"):
            raise ValueError(f"descriptor {number} is in use in this process already")

    def move(index: int, to: Fd) -> None:
        number = placed[index].fileno()
        placed[index].close()
        placed[index] = to
        del at[number]
        at[to.fileno()] = index

    for index, target in enumerate(wanted):
        if target is None and placed[index].fileno() in numbers:
            move(index, _spare(placed[index].fileno(), numbers))
    for index, target in enumerate(wanted):
        # Whoever has the number goes first to where it belongs, and so on; in a ring, the first
        # one has to make way.
        chain = []
        mover, goal = index, target
        while goal is not None and placed[mover].fileno() != goal:
            chain.append((mover, goal))
            if goal not in at:
                break
            mover = at[goal]
            goal = wanted[mover]
            if mover == index:
                move(index, _spare(placed[index].fileno(), numbers))
                break
        for following, place_ in reversed(chain):
            os.dup2(placed[following].fileno(), place_, inheritable=False)
            move(following, Fd(place_))
    return placed
