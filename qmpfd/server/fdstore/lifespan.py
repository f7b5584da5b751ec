"""Runs the mirror of the store, from before the first client until after the last."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
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
from .recover import Recovered

if TYPE_CHECKING:
    from ..server import DaemonServer


def _remove(services: Services, entries: Sequence[StoredFd]) -> None:
    """Remove and close descriptors for which the fd store has no room."""
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
    """Mirror the store in the fd store while the block runs.

    The context manager gives a function that starts the mirror; call it once the store is complete,
    with the predecessor's journal in a takeover, or None.

    Args:
        server: the daemon; it does not run yet.
        listeners: listening sockets to send to the fd store as well; may grow until the start.
        recovered: state and descriptors from the fd store.
        lifeline: the lifeline of a takeover, while the store has placeholders; or None.

    Raises:
        GenericError: the fd store has no room for all descriptors.
    """
    mirror = server.mirror
    kept = set(recovered.names)

    async def start(previous: Fd | None) -> None:
        if mirror is not None:
            await mirror.start(listeners, recovered, previous)
            kept.update(listener.socket.fileno() for listener in listeners)
            server.daemon.mirror = mirror
        server.daemon.closer.close(recovered.stale_fds)

    if mirror is None:
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
            if not mirror.is_ours:  # the predecessor goes on: remove our duplicates of its store
                mirror.release_all()
                with trio.move_on_after(FORGET_TIMEOUT):
                    await mirror.sync()  # noqa: ASYNC120 - a cancellation ends the start as well
            else:  # the fd store keeps these sockets for a restart: leave their files
                for listener in listeners:
                    if listener.socket.fileno() in kept:
                        listener.abandon()
            raise
        answers = mirror.is_synced  # if not, sessions have waited for the fd store in vain
        if not server.lifecycle.handed_over:
            mirror.finish()
        if server.lifecycle.state is State.QUITTING:
            mirror.release_all()
        if answers:
            with trio.move_on_after(FORGET_TIMEOUT):
                await mirror.sync()
