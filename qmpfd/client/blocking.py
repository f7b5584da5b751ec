"""The client for programs without an event loop, and for the short verbs of the command line.

It imports neither Trio nor msgspec at its top: Trio alone takes longer to import than all of a
short verb's work.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Concatenate

from ..protocol.client import QMPEvent
from . import calls
from .blocking_connection import BlockingConnection
from .calls import Call, ParamsT, ResultT, as_method
from .errors import ClientClosed, NoDaemon

__all__ = ["BlockingClient", "NoDaemon", "connect_blocking"]


def _blocking(
    description: Callable[Concatenate[Any, ParamsT], Call[ResultT]],
) -> Callable[Concatenate[BlockingClient, ParamsT], ResultT]:
    """The method that blocks until the reply to a described call is here."""

    def method(self: BlockingClient, /, *args: ParamsT.args, **kwargs: ParamsT.kwargs) -> ResultT:
        call = description(self, *args, **kwargs)
        return call.result(*self.request(call.command, call.arguments, call.fds))

    return as_method(method, description)


class BlockingClient(BlockingConnection):
    """A connection to a QMP server whose calls block; made by :func:`connect_blocking`.

    Calls may come from several threads; one is executed at a time.

    Args:
        path: the server's Unix socket; ``@NAME`` is one in the abstract namespace (unix(7)).
        timeout: seconds that connecting, and then each call, may take; None for no limit.

    Raises:
        NoDaemon: no QMP server answers at *path* in time.
        QMPError: the server refuses the connection.
    """

    def __init__(self, path: str | os.PathLike[str], timeout: float | None = 10.0) -> None:
        self._watching = 0  # blocks of watch_fdsets
        super().__init__(path, timeout)

    execute = _blocking(calls.execute)
    add_fd = _blocking(calls.add_fd)
    remove_fd = _blocking(calls.remove_fd)
    query_fdsets = _blocking(calls.query_fdsets)
    open_fdset = _blocking(calls.open_fdset)
    add_fds = _blocking(calls.add_fds)
    query_fds = _blocking(calls.query_fds)
    remove_fds = _blocking(calls.remove_fds)

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
            if not self._watching:
                with suppress(ClientClosed):
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
        NoDaemon: no QMP server answers at *path* in time.
        QMPError: the server refuses the connection.
    """
    return BlockingClient(path, timeout)
