"""Cancel a scope at the k-th step of some tasks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import trio


class CancelAt(trio.abc.Instrument):
    """Trio instrument that cancels a scope at the k-th step of the tasks that *which* selects.

    Args:
        which: whether a task's steps count.
        scope: the scope.
        step: k, from 1.
        before: cancel before the step: Cancelled is raised at the next checkpoint in the step.
            Else cancel after the step: Cancelled is raised where the task waits.
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
        """Whether the scope has been cancelled."""
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
