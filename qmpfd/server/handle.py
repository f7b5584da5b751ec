"""Handle of a running daemon, for the program that has started ``qmpfd.serve``."""

from __future__ import annotations

from abc import ABC, abstractmethod

import trio

from ..policy import Policy


class Server(ABC):
    """A running daemon: what ``await nursery.start(qmpfd.serve, [path])`` returns."""

    @property
    @abstractmethod
    def ended(self) -> trio.Event:
        """Event that is set once the daemon has ended and every stored descriptor is closed."""

    @abstractmethod
    def stop(self) -> None:
        """End gracefully: accept no more clients, execute the commands received, then end."""

    @abstractmethod
    def change_policy(self, policy: Policy) -> None:
        """Apply another policy, to connected clients too.

        Args:
            policy: which users may connect, and which commands each may run.
        """
