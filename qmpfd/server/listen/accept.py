"""Accepting clients, even with no descriptor left."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable
from contextlib import suppress
from functools import partial

import trio

from ...errors import GenericError, QMPError
from ...kernel.fd import Fd
from ..lifecycle import Lifecycle
from .binding import BACKLOG
from .listener import ListenerShutDown, UnixListener

_log = logging.getLogger("qmpfd")

#: accept(2): this process, or the system, is out of descriptors or memory.
_FULL = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}

#: accept(2): trouble of this one connection; the next may do better.
_GONE = {errno.ECONNABORTED, errno.EPERM, errno.EPROTO}

#: Seconds until the next try where nobody can be accepted, not even to be told so.
_PAUSE = 0.2


class Acceptor:
    """Accepts clients on all listeners.

    Args:
        lifecycle: while the daemon is paused, nobody is accepted, and who connects waits in the
            backlog.
        handle: serves a client; it owns the connection.
        reject: tells a client why it is not served; it owns the connection.
    """

    def __init__(
        self,
        lifecycle: Lifecycle,
        handle: Callable[[trio.socket.SocketType], None],
        reject: Callable[[trio.socket.SocketType, QMPError], None],
    ) -> None:
        self._lifecycle = lifecycle
        self._handle = handle
        self._reject = reject
        # Kept back, so that a client can be told when there are no other descriptors.
        self._spare: Fd | None = None
        self._refill_spare()

    def _refill_spare(self) -> None:
        """Have the spare descriptor again, if one can be had."""
        if self._spare is None:
            with suppress(OSError):
                self._spare = Fd(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))

    def close(self) -> None:
        """Give up the spare descriptor."""
        if self._spare is not None:
            self._spare.close()
            self._spare = None

    async def accept_clients(self, listener: UnixListener) -> None:
        """Accept clients for as long as the daemon serves.

        With the descriptor table full, a client is accepted in place of the spare descriptor, told
        why, and closed again: it is not left to wait, and the loop does not spin on it.

        Raises:
            OSError: the listening socket cannot be used.
        """
        full = False
        while True:
            await self._lifecycle.wait_running()
            await listener.wait_readable()
            if self._lifecycle.paused:
                continue
            try:
                sock = listener.accept_nowait()
            except ListenerShutDown:
                listener.bind_again(self.accept_backlog)
                _log.warning(
                    "the listening socket %s was shut down from outside: made it again", listener
                )
            except OSError as exc:
                # Others may have the socket too, and have been faster (EAGAIN).
                if isinstance(exc, BlockingIOError) or exc.errno in _GONE:
                    continue
                if exc.errno not in _FULL:
                    raise
                if not full:
                    _log.error("clients are turned away: %s", exc.strerror)
                full = True
                rejected = self._reject_on_emfile(listener, exc)
                await trio.sleep(0 if rejected else _PAUSE)
            else:
                if full:
                    _log.warning("clients are served again")
                full = False
                self._refill_spare()  # it was lost if the table shrank meanwhile
                self._isolated(partial(self._handle, sock))

    def accept_backlog(self, listener: UnixListener) -> None:
        """Accept all clients that have connected already."""
        with suppress(OSError):
            for _ in range(BACKLOG):  # while others connect
                self._isolated(partial(self._handle, listener.accept_nowait()))

    def _reject_on_emfile(self, listener: UnixListener, reason: OSError) -> bool:
        """Accept one client by means of the spare descriptor, and tell it why it cannot stay;
        whether that was possible.
        """
        self.close()
        try:
            sock = listener.accept_nowait()
        except OSError:
            return False
        else:
            error = GenericError(f"The daemon is out of file descriptors: {reason.strerror}")
            self._isolated(partial(self._reject, sock, error))
            return True
        finally:
            self._refill_spare()

    def _isolated(self, action: Callable[[], None]) -> None:
        """What goes wrong with one client costs that client only."""
        try:
            action()
        except Exception:  # noqa: BLE001 - whatever it is, the others are served
            _log.exception("a client could not be served")
