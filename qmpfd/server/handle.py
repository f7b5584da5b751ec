"""The handle that ``qmpfd.serve`` gives to the program that runs it."""

from __future__ import annotations

from abc import ABC, abstractmethod

import trio

from ..policy import Policy


class Server(ABC):
    """A running daemon, as ``await nursery.start(qmpfd.serve, [path])`` gives it."""

    @property
    @abstractmethod
    def ended(self) -> trio.Event:
        """Set when the daemon has ended: every stored descriptor is closed."""

    @abstractmethod
    def stop(self) -> None:
        """End gracefully: accept nobody else, carry out what was received, then end."""

    @abstractmethod
    def change_policy(self, policy: Policy) -> None:
        """Apply another policy, to connected clients too.

        Args:
            policy: who may connect, and do what.
        """
