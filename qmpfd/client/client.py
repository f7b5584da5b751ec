"""A QMP client for Trio that passes descriptors."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from typing import Any, Concatenate

import trio

from ..commands.events import EVENTS
from ..limits import CLEANUP_TIMEOUT
from ..protocol.client import QMPEvent
from . import calls
from .calls import Call, ParamsT, ResultT, as_method
from .connection import open_connection
from .reconnect import ReconnectingConnection


def _awaited(
    description: Callable[Concatenate[Any, ParamsT], Call[ResultT]],
) -> Callable[Concatenate[Client, ParamsT], Coroutine[Any, Any, ResultT]]:
    """The method that awaits the reply to a described call."""

    async def method(self: Client, /, *args: ParamsT.args, **kwargs: ParamsT.kwargs) -> ResultT:
        call = description(self, *args, **kwargs)
        return call.result(*await self._link.execute(call.command, call.arguments, call.fds))

    return as_method(method, description)


class Client:
    """A connection to a QMP server; made by :func:`connect`.

    Calls may be made from many tasks at once.  A call that is cancelled breaks no other: if its
    request was sent already, the server executes it, and the reply is dropped.

    Args:
        link: the connection; owned from here on.
    """

    def __init__(self, link: ReconnectingConnection) -> None:
        self._link = link
        self._watching = 0  # blocks of watch_fdsets

    @property
    def greeting(self) -> Mapping[str, Any]:
        """The server's greeting: its ``version`` and ``capabilities``."""
        return self._link.greeting

    def close(self) -> None:
        """Close the connection; calls that wait for a reply raise ClientClosed."""
        self._link.close()

    execute = _awaited(calls.execute)
    add_fd = _awaited(calls.add_fd)
    remove_fd = _awaited(calls.remove_fd)
    query_fdsets = _awaited(calls.query_fdsets)
    open_fdset = _awaited(calls.open_fdset)
    add_fds = _awaited(calls.add_fds)
    query_fds = _awaited(calls.query_fds)
    remove_fds = _awaited(calls.remove_fds)

    @asynccontextmanager
    async def watch_fdsets(self) -> AsyncGenerator[AsyncIterator[QMPEvent], None]:
        """Receive an event for each descriptor added or removed in the block (``watch-fdsets``).

        Use it as ``async with client.watch_fdsets() as events`` and ``async for event in events``;
        the events are those since the beginning of the block.  If several blocks run at a
        time, each event goes to one of them.

        Raises:
            Exception: what :meth:`execute` raises.
        """
        if not self._watching:  # what nobody asked for in an earlier block
            events = self._link.events
            others = [event for event in events if event.name not in EVENTS]
            events.clear()
            events.extend(others)
        await self._link.watch()
        self._watching += 1
        try:
            yield self.events()
        finally:
            self._watching -= 1
            with trio.move_on_after(CLEANUP_TIMEOUT, shield=True):
                if not self._watching:
                    await self._link.unwatch()

    def events(self) -> AsyncIterator[QMPEvent]:
        """The server's events, as they arrive; a QEMU sends some without a request.

        At most 4096 unread events are kept; beyond that, the oldest is dropped.

        Raises:
            NoDaemon: the connection is lost; also a trio.BrokenResourceError.
            ClientClosed: this client is closed; also a trio.ClosedResourceError.
        """
        return self._link


@asynccontextmanager
async def connect(
    path: str | os.PathLike[str], *, reconnect: float | None = None
) -> AsyncGenerator[Client, None]:
    """Connect to the QMP server at *path*: a qmpfd daemon, or a real QEMU's monitor.

    Use it as ``async with qmpfd.connect(path) as client``; the connection is closed at the end.

    With *reconnect*, the next call makes a broken connection again, and negotiates; so does waiting
    for events.  Requests that are harmless to repeat are sent again: the ``query-`` commands and
    ``open-fdset``.  A call of another command whose reply was lost raises :exc:`ReplyLost`.
    Watching continues with the event ``FD_EVENTS_LOST``, its ``count`` 0: other events may be
    missing.  What belonged to the old connection is gone: the names of ``getfd``, and descriptors
    that were added with ``lifetime="connection"``.

    Args:
        path: the server's Unix socket; ``@NAME`` is one in the abstract namespace (unix(7)).
        reconnect: seconds that a call may wait for a new connection; None: never connect again.

    Raises:
        NoDaemon: no server listens at *path*, or it closed the connection at once.
        QMPError: the server refuses the connection.
        ProtocolError: the peer does not speak QMP.
    """
    client = Client(ReconnectingConnection(path, await open_connection(path), reconnect))
    try:
        yield client
    finally:
        client.close()
