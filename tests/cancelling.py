"""Cancels a task at its k-th step, for every k."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import trio


class CancelAt(trio.abc.Instrument):
    """Cancels a scope at the k-th step of the tasks that *which* picks, from 1.

    Args:
        which: tells the tasks whose steps are counted.
        scope: what to cancel.
        step: k.
        before: cancel before the step, so that the task meets it at the next checkpoint that it
            comes to; else after it, so that it is met by a task that waits.
    """

    def __init__(
        self,
        which: Callable[[trio.lowlevel.Task], bool],
        scope: trio.CancelScope,
        step: int,
        *,
        before: bool,
    ) -> None:
        self._which = which
        self._scope = scope
        self._left = step
        self._before = before

    @property
    def done(self) -> bool:
        """Whether the step has come."""
        return self._left <= 0

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        if self._before:
            self._step(task)

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        if not self._before:
            self._step(task)

    def _step(self, task: trio.lowlevel.Task) -> None:
        if self._which(task):
            self._left -= 1
            if self._left == 0:
                self._scope.cancel()

    def __enter__(self) -> Self:
        trio.lowlevel.add_instrument(self)
        return self

    def __exit__(self, *exc_info: object) -> None:
        trio.lowlevel.remove_instrument(self)
