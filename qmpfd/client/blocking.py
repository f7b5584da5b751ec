"""The client for programs without an event loop, and for the short verbs of the command line.

It imports neither Trio nor msgspec at its top: Trio alone takes longer to import than all of a
short verb's work.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

from ..kernel.fd import Fd, FileDescriptorLike
from ..protocol.client import QMPEvent
from ..protocol.connection import State
from .blocking_connection import BlockingConnection
from .calls import members, one_fd, typed
from .errors import NoDaemon

if TYPE_CHECKING:
    from typing import Unpack

    from ..commands import AddfdInfo, FdInfo, FdsetInfo
    from .calls import Selector

__all__ = ["BlockingClient", "NoDaemon", "connect_blocking"]


class BlockingClient(BlockingConnection):
    """A connection to a QMP server whose calls block; made by :func:`connect_blocking`.

    The calls may come from several threads: one is carried out at a time.

    Args:
        path: the server's Unix socket; ``@NAME`` is one in the abstract namespace (unix(7)).
        timeout: seconds that connecting, and then each call, may take; None for no limit.

    Raises:
        NoDaemon: nobody answers there, or not QMP.
        QMPError: the server turns us away.
    """

    def __init__(self, path: str | os.PathLike[str], timeout: float | None = 10.0) -> None:
        self._watching = 0  # blocks of watch_fdsets
        super().__init__(path, timeout)

    def add_fd(
        self, fd: FileDescriptorLike, fdset_id: int | None = None, opaque: str | None = None
    ) -> AddfdInfo:
        """As :meth:`qmpfd.Client.add_fd`.

        Args:
            fd: an int or anything with ``fileno()``; it stays the caller's.
            fdset_id: the set; a new one if None.
            opaque: a free-form text to find the descriptor by.

        Raises:
            InvalidParameterValue: the server wants an existing set.
            Exception: what :meth:`execute` raises.
        """
        from ..commands import AddfdInfo  # noqa: PLC0415 - it loads msgspec

        arguments = members(fdset_id=fdset_id, opaque=opaque)
        return typed(self.execute("add-fd", arguments, [fd]), AddfdInfo)

    def remove_fd(self, fdset_id: int, fd: int | None = None) -> None:
        """As :meth:`qmpfd.Client.remove_fd`.

        Args:
            fdset_id: the set.
            fd: the descriptor's number in the server; all of the set if None.

        Raises:
            FdNotFound: there is no such set, or no such descriptor in it.
            Exception: what :meth:`execute` raises.
        """
        self.execute("remove-fd", members(fdset_id=fdset_id, fd=fd))

    def query_fdsets(self) -> list[FdsetInfo]:
        """As :meth:`qmpfd.Client.query_fdsets`."""
        from ..commands import FdsetInfo  # noqa: PLC0415 - it loads msgspec

        return typed(self.execute("query-fdsets"), list[FdsetInfo])

    # -- commands that only qmpfd has ----------------------------------------------------------

    def open_fdset(
        self,
        fdset_id: int | None = None,
        access: Literal["rdonly", "wronly", "rdwr"] | None = None,
        fd: int | None = None,
        *,
        remove: bool = False,
        **selector: Unpack[Selector],
    ) -> Fd:
        """As :meth:`qmpfd.Client.open_fdset`.

        Args:
            fdset_id: the fd set.
            access: the access mode that it must have; any if None.
            fd: its number in the server; the newest that matches if None.
            remove: take it out of the store in the same step.
            selector: what else it is chosen by.

        Raises:
            FdNotFound: there is no such descriptor.
            Exception: what :meth:`execute` raises.
        """
        arguments = members(
            fdset_id=fdset_id, access=access, fd=fd, remove=remove or None, **selector
        )
        return one_fd(self.request("open-fdset", arguments)[1])

    def add_fds(
        self,
        fds: Sequence[FileDescriptorLike],
        fdset_id: int | None = None,
        opaque: str | None = None,
        *,
        lifetime: Literal["daemon", "connection"] = "daemon",
        expires: int | None = None,
        watch_hangup: bool = False,
        if_exists: Literal["add", "fail", "replace"] = "add",
    ) -> FdsetInfo:
        """As :meth:`qmpfd.Client.add_fds`.

        Args:
            fds: ints or anything with ``fileno()``; they stay the caller's.
            fdset_id: the set; a new one if None.
            opaque: a free-form text to find the descriptors by.
            lifetime: ``"connection"``: they are removed when this connection ends.
            expires: seconds after which they are removed.
            watch_hangup: remove each when the other end of the socket or pipe is gone.
            if_exists: what to do where the set has descriptors of that opaque text.

        Raises:
            InvalidParameterValue: the server wants an existing set, or sockets and pipes.
            FdExists: there are such descriptors already, and *if_exists* is ``"fail"``.
            Exception: what :meth:`execute` raises.
        """
        from ..commands import FdsetInfo  # noqa: PLC0415 - it loads msgspec

        arguments = members(
            fdset_id=fdset_id,
            opaque=opaque,
            lifetime=None if lifetime == "daemon" else lifetime,
            expires=expires,
            watch_hangup=watch_hangup or None,
            if_exists=None if if_exists == "add" else if_exists,
        )
        return typed(self.execute("add-fds", arguments, fds), FdsetInfo)

    def query_fds(
        self, fdset_id: int | None = None, fd: int | None = None, **selector: Unpack[Selector]
    ) -> list[FdInfo]:
        """As :meth:`qmpfd.Client.query_fds`.

        Args:
            fdset_id: only this fd set.
            fd: only the descriptor with this number in the server.
            selector: what else they are chosen by.

        Raises:
            Exception: what :meth:`execute` raises.
        """
        from ..commands import FdInfo  # noqa: PLC0415 - it loads msgspec

        arguments = members(fdset_id=fdset_id, fd=fd, **selector)
        return typed(self.execute("query-fds", arguments), list[FdInfo])

    def remove_fds(
        self, fdset_id: int | None = None, fd: int | None = None, **selector: Unpack[Selector]
    ) -> list[FdsetInfo]:
        """As :meth:`qmpfd.Client.remove_fds`.

        Args:
            fdset_id: only of this fd set.
            fd: only the descriptor with this number in the server.
            selector: what else they are chosen by.

        Raises:
            FdNotFound: there are none.
            Exception: what :meth:`execute` raises.
        """
        from ..commands import FdsetInfo  # noqa: PLC0415 - it loads msgspec

        arguments = members(fdset_id=fdset_id, fd=fd, **selector)
        return typed(self.execute("remove-fds", arguments), list[FdsetInfo])

    # -- events --------------------------------------------------------------------------------

    @contextmanager
    def watch_fdsets(self) -> Iterator[Iterator[QMPEvent]]:
        """As :meth:`qmpfd.Client.watch_fdsets`: ``with client.watch_fdsets() as events``.

        Raises:
            Exception: what :meth:`execute` raises.
        """
        self.execute("watch-fdsets", {"enable": True})
        self._watching += 1
        try:
            yield self.events()
        finally:
            self._watching -= 1
            if not self._watching and self._connection.state is not State.CLOSED:
                self.execute("watch-fdsets", {"enable": False})


def connect_blocking(
    path: str | os.PathLike[str], *, timeout: float | None = 10.0
) -> BlockingClient:
    """Connect to the QMP server at *path*, for a program without an event loop.

    Use it as ``with qmpfd.connect_blocking(path) as client``; the connection is closed at the end.
    An asyncio program calls it, and the methods of the client, with :func:`asyncio.to_thread`.

    Args:
        path: the server's Unix socket; ``@NAME`` is one in the abstract namespace (unix(7)).
        timeout: seconds that connecting, and then each call, may take; None for no limit.

    Raises:
        NoDaemon: nobody answers there in time, or not QMP.
        QMPError: the server turns us away.
    """
    return BlockingClient(path, timeout)
