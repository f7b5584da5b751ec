"""The mirror of the store, from before the first client until after the last."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING

import trio

from ...fdsets import StoredFd
from ...kernel.fd import Fd
from ...limits import FORGET_TIMEOUT
from ..lifecycle import State
from ..listen.listener import UnixListener
from ..services import Services
from .mirror import FdStoreMirror
from .recover import Recovered

if TYPE_CHECKING:
    from ..server import DaemonServer


def _remove(services: Services, entries: Iterable[StoredFd]) -> None:
    """Take out of the store what is not kept safe, and close it."""
    fds: list[Fd] = []
    services.shared.remove(entries, "removed", fds)
    services.durability.close_after_sync(fds)


@asynccontextmanager
async def mirrored(
    server: DaemonServer,
    listeners: Sequence[UnixListener],
    recovered: Recovered,
    *,
    lifeline: Fd | None,
) -> AsyncGenerator[Callable[[Fd | None], Awaitable[None]], None]:
    """Mirror the store while the block runs; gives what is to be called once all is there, with
    the journal of the daemon that this one takes over from, if there is one.

    Args:
        server: the daemon; it does not run yet.
        listeners: the sockets that the fd store gets too, once all is there.
        recovered: what came back from there.
        lifeline: of a takeover: the store has placeholders of what is about to come.

    Raises:
        GenericError: it is more than the fd store holds.
    """
    mirror = server.durability
    kept = set(recovered.names)

    async def start(previous: Fd | None) -> None:
        if isinstance(mirror, FdStoreMirror):
            await mirror.start(listeners, recovered, previous)
            kept.update(listener.socket.fileno() for listener in listeners)
            server.daemon.mirror = mirror
        server.daemon.closer.close(recovered.stale_fds)

    if not isinstance(mirror, FdStoreMirror):
        yield start
        return
    mirror.on_refused = partial(_remove, server.services)
    async with mirror.running():
        try:
            mirror.claim(server.store, recovered, lifeline)
            if mirror.is_parent:
                server.daemon.mirror = mirror
            yield start
        except Exception:
            if not mirror.is_ours:  # the old daemon goes on, and closes what it is told to
                mirror.release_all()
                with trio.move_on_after(FORGET_TIMEOUT):
                    await mirror.sync()  # noqa: ASYNC120 - a cancellation ends the start as well
            else:  # whoever starts us again expects the files of those that it has where they are
                for listener in listeners:
                    if listener.socket.fileno() in kept:
                        listener.abandon()
            raise
        answers = mirror.is_synced  # or else the end has waited for it long enough
        if not server.lifecycle.handed_over:
            mirror.finish()
        if server.lifecycle.state is State.QUITTING:
            mirror.release_all()
        if answers:
            with trio.move_on_after(FORGET_TIMEOUT):
                await mirror.sync()
