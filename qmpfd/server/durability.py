"""Durability of changes of the store, the interface: whether they would survive a crash."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

from ..fdsets import StoredFd
from ..kernel.close_pool import ClosePool
from ..kernel.fd import Fd


@dataclass(slots=True)
class Unproven:
    """Descriptors stored by one command, while the fd store may still have no room for them.

    Args:
        entries: the stored descriptors.
        is_refused: whether the fd store had no room, and *entries* were removed again.
    """

    entries: list[StoredFd] = field(default_factory=list)
    is_refused: bool = False


class Durability(Protocol):
    """Second copy of the store, which survives a crash of this process."""

    #: The descriptors stored last, if their command may be answered only once the fd store has
    #: shown that it kept them.  A caller that stores descriptors sets it to None before.
    unproven: Unproven | None

    @property
    def is_synced(self) -> bool:
        """Whether the second copy has every change of the store."""

    async def sync(self) -> None:
        """Wait until the second copy has every change made so far, or is lost for good; return
        without a checkpoint if that is so already.
        """

    def on_synced(self, action: Callable[[], object]) -> None:
        """Call *action* once the second copy has every change made so far, or is lost for good.
        The caller then calls :meth:`push`.
        """

    def push(self) -> None:
        """Start sending every change made so far to the second copy, in one batch."""

    def close_after_sync(self, fds: list[Fd], uid: int | None = None) -> None:
        """Close descriptors removed from the store, once the second copy has removed them as well.

        Args:
            fds: the descriptors; owned from here on.
            uid: the user whose quota they are charged to until they are closed.
        """

    @property
    def journal(self) -> Fd | None:
        """The journal, in which a successor reads whether the takeover was completed; None if there
        is none.  The daemon keeps ownership.
        """

    @property
    def store(self) -> str | None:
        """The invocation id of the service whose fd store has the second copy (systemd.exec(5))."""

    def confirm(self) -> None:
        """Note that the takeover by this daemon is complete: the predecessor has released all."""

    def log_handover(self, handed_over: bool | None) -> None:
        """Write into the journal whether a successor owns everything; None while undecided."""

    def release_all(self, quick: Iterable[Fd] = ()) -> None:
        """Drop the second copy, which a successor now has, and record no more changes.

        Args:
            quick: descriptors whose close(2) cannot block.
        """


class Unmirrored:
    """Durability of a daemon without a second copy: every change counts as synced.

    Args:
        closer: closes removed descriptors.
    """

    is_synced = True
    journal = store = None
    unproven: Unproven | None = None

    def __init__(self, closer: ClosePool) -> None:
        self._closer = closer

    async def sync(self) -> None:
        pass

    def on_synced(self, action: Callable[[], object]) -> None:
        action()

    def push(self) -> None:
        pass

    def close_after_sync(self, fds: list[Fd], uid: int | None = None) -> None:
        self._closer.close(fds, uid)

    def confirm(self) -> None:
        pass

    def log_handover(self, handed_over: bool | None) -> None:
        pass

    def release_all(self, quick: Iterable[Fd] = ()) -> None:
        pass
