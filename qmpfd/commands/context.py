"""What a command can reach while it is carried out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from ..errors import FdNotSupplied
from ..fd import Fd
from ..fdsets import FdSets
from ..protocol import ServerConnection

Dialect: TypeAlias = Literal["spec", "qemu"]


@dataclass(slots=True)
class Daemon:
    """What all connections share.

    Args:
        store: the fd sets.
        dialect: ``"spec"`` or ``"qemu"``.
        stop: ends the daemon, gracefully.
    """

    store: FdSets
    dialect: Dialect
    stop: Callable[[], None]


@dataclass(slots=True)
class Context:
    """One connection, as its commands see it.

    Args:
        daemon: what it shares with the others.
        connection: its protocol state.
        names: the descriptors of ``getfd``, by name; owned here.
        fds: the descriptors that came with the command being carried out; what the command
            leaves in the list is closed.
    """

    daemon: Daemon
    connection: ServerConnection
    names: dict[str, Fd] = field(default_factory=dict)
    fds: list[Fd] = field(default_factory=list)

    def first_fd(self) -> Fd:
        """The descriptor that came with the command.

        Raises:
            FdNotSupplied: none did.
        """
        if not self.fds:
            raise FdNotSupplied("No file descriptor supplied via SCM_RIGHTS")
        return self.fds[0]

    def close(self) -> None:
        """The connection is over: its names are gone, their descriptors garbage."""
        self.connection.garbage += self.names.values()
        self.names.clear()
