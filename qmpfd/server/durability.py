"""Whether changes of the store would survive a crash, as the rest of the daemon sees it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

from ..fdsets import StoredFd
from ..kernel.close_pool import ClosePool
from ..kernel.fd import Fd


@dataclass(slots=True)
class Unproven:
    """What is stored together, before it is known whether there is room for it.

    Args:
        entries: what is stored.
        is_refused: there was no room, and it is removed.
    """

    entries: list[StoredFd] = field(default_factory=list)
    is_refused: bool = False


class Durability(Protocol):
    """Whether changes of the store would survive a crash of this process."""

    #: Where what was stored last is, if its client can be told of it only once that is shown to be
    #: kept; whoever stores something sets it to None before.
    unproven: Unproven | None

    @property
    def is_synced(self) -> bool:
        """Whether the second copy has every change of the store."""

    async def sync(self) -> None:
        """Wait until the second copy has every change made so far; without a checkpoint if it has.

        Returns as well when the second copy is lost for good.
        """

    def on_synced(self, action: Callable[[], object]) -> None:
        """Call *action* once the second copy has every change made so far, or is lost for good;
        :meth:`push` is due.
        """

    def push(self) -> None:
        """See to it that the second copy gets every change made so far, all in one go."""

    def close_after_sync(self, fds: list[Fd], uid: int | None = None) -> None:
        """Close descriptors that were taken out of the store, once the second copy has let go of
        theirs.

        Args:
            fds: the descriptors; owned from here on.
            uid: the user whom they count for until they are closed.
        """

    @property
    def journal(self) -> Fd | None:
        """The journal, which a successor reads to learn whether the takeover was completed; None
        if there is none.  It stays the daemon's own.
        """

    @property
    def store(self) -> str | None:
        """The invocation id of the service whose fd store has the second copy (systemd.exec(5))."""

    def confirm(self) -> None:
        """The takeover that this daemon began with is complete: the predecessor has let go."""

    def log_handover(self, handed_over: bool | None) -> None:
        """Write into the journal that a successor owns everything, or does not after all; None
        while that is undecided.
        """

    def release_all(self, quick: Iterable[Fd] = ()) -> None:
        """A successor owns everything: drop the second copy, and record no more changes.

        Args:
            quick: descriptors that are closed without waiting for anybody.
        """


class Unmirrored:
    """The durability of a daemon of which nobody has a second copy: a change is as safe as it gets.

    Args:
        closer: closes what was removed.
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
