"""The mirror of the store, from before the first client until after the last."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import trio

from ...kernel.fd import Fd
from ...limits import FORGET_TIMEOUT
from ..lifecycle import State
from ..listen.listener import UnixListener
from .mirror import FdStoreMirror
from .recover import Holdings, Recovered

if TYPE_CHECKING:
    from ..server import DaemonServer


@asynccontextmanager
async def mirrored(
    server: DaemonServer,
    listeners: Sequence[UnixListener],
    recovered: Recovered | None,
    evidence: Fd | None,
) -> AsyncGenerator[None, None]:
    """Mirror the store while the block runs.

    Args:
        server: the daemon; it does not run yet.
        listeners: the sockets that the fd store gets too.
        recovered: what came back from there, if anything may have.
        evidence: what tells whether it is ours, in the middle of a takeover.

    Raises:
        GenericError: it is more than the fd store holds.
    """
    stale_fds = [] if recovered is None else recovered.stale_fds
    mirror = server.durability
    if not isinstance(mirror, FdStoreMirror):
        server.daemon.closer.close(stale_fds)
        yield
        return
    holdings = Holdings() if recovered is None else recovered.holdings
    async with mirror.running():
        try:
            await mirror.start(server.store, listeners, holdings, evidence)
            server.daemon.closer.close(stale_fds)
            server.daemon.mirror = mirror
            yield
        except Exception:
            # Whoever starts us again expects them where they are.
            for listener in listeners:
                listener.abandon()
            if not mirror.is_ours:  # the old daemon goes on, and closes what it is told to
                mirror.release_all()
                with trio.move_on_after(FORGET_TIMEOUT):
                    await mirror.sync()  # noqa: ASYNC120 - a cancellation ends the start as well
            raise
        answers = mirror.is_synced  # or else the end has waited for it long enough
        if server.lifecycle.state is State.QUITTING:
            mirror.release_all()
        elif not server.lifecycle.handed_over:
            mirror.finish()
        if answers:
            with trio.move_on_after(FORGET_TIMEOUT):
                await mirror.sync()
