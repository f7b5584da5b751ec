"""Where the daemon and its keeper meet: from before the first client until after the last."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import trio

from ...kernel.fd import Fd
from ...limits import FORGET_TIMEOUT
from ..listen.listener import UnixListener
from .mirror import FdStoreConfig, FdStoreMirror, Holdings
from .recover import Recovered

if TYPE_CHECKING:
    from ..server import Server


@asynccontextmanager
async def kept(
    server: Server,
    keeping: FdStoreConfig | None,
    listeners: Sequence[UnixListener],
    recovered: Recovered | None,
    witness: Fd | None,
) -> AsyncGenerator[None, None]:
    """Have everything kept safe while the block runs.

    Args:
        server: the daemon; it does not run yet.
        keeping: by whom; None if there is nobody.
        listeners: the sockets that are to be kept.
        recovered: what came back from there, if anything may have.
        witness: what tells whether it is ours, in the middle of a takeover.

    Raises:
        GenericError: it is more than can be kept.
    """
    useless = [] if recovered is None else recovered.useless
    if keeping is None:
        server.daemon.closer.close(useless)
        yield
        return
    holdings = Holdings() if recovered is None else recovered.holdings
    keeper = FdStoreMirror(keeping, server.daemon.closer)
    async with keeper.running():
        await keeper.start(server.store, listeners, holdings, witness)
        server.daemon.closer.close(useless)
        server.keeper = server.daemon.keeper = keeper
        try:
            yield
        except Exception:
            # Whoever starts us again expects them where they are.
            for listener in listeners:
                listener.abandon()
            raise
        answers = keeper.is_settled  # or else the end has waited for it long enough
        if server.quits:
            keeper.leave()
        elif not server.has_left:
            keeper.finish()
        if answers:
            with trio.move_on_after(FORGET_TIMEOUT):
                await keeper.settle()
