"""Accepts clients; rejects them with an error reply when the process is out of descriptors."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable
from contextlib import suppress

import trio

from ...errors import GenericError, QMPError
from ...kernel.binding import BACKLOG
from ...kernel.fd import Fd
from ...kernel.files import open_null
from ..lifecycle import Lifecycle
from .listener import ListenerShutDown, UnixListener

_log = logging.getLogger("qmpfd")

#: Errors of accept(2): this process, or the system, is out of descriptors or memory.
_FULL = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}

#: Errors of accept(2) that concern one connection only: the next one is accepted.
_GONE = {errno.ECONNABORTED, errno.EPERM, errno.EPROTO}

#: Seconds until the next accept(2) after it has failed with the spare descriptor closed as well.
_PAUSE = 0.2


class Acceptor:
    """Accepts clients on all listeners.

    Args:
        lifecycle: state of the daemon; while it is paused, clients wait in the backlog.
        handle: serves a client, or rejects it for a given reason; it owns the connection.
    """

    def __init__(
        self,
        lifecycle: Lifecycle,
        handle: Callable[[trio.socket.SocketType, QMPError | None], None],
    ) -> None:
        self._lifecycle = lifecycle
        self._handle = handle
        # Closed to make room for accept(2) when no other descriptor is free, see _reject_on_emfile.
        self._spare: Fd | None = None
        self._refill_spare()

    def _refill_spare(self) -> None:
        """Open the spare descriptor again, unless the process is out of descriptors."""
        if self._spare is None:
            with suppress(OSError):
                self._spare = open_null()

    def close(self) -> None:
        """Close the spare descriptor."""
        if self._spare is not None:
            self._spare.close()
            self._spare = None

    async def accept_clients(self, listener: UnixListener) -> None:
        """Accept clients for as long as the daemon serves.

        With the descriptor table full, the spare descriptor is closed to accept a client, which
        gets an error reply and is disconnected: no client hangs in the backlog, and the loop does
        not spin on a readable socket.

        Raises:
            OSError: accept(2) cannot work on the listening socket.
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
                shut_down = f"the listening socket {listener} was shut down from outside"
                if listener.file is None:  # abstract, or the service manager's
                    _log.error("%s: no client can connect to it any more", shut_down)
                    return
                listener.bind_again(self.accept_backlog)
                _log.warning("%s: made it again", shut_down)
            except OSError as exc:
                # EAGAIN: another process that has the same socket has accepted the client.
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
                self._refill_spare()  # the last refill may have failed with the table full
                self._isolated(sock)

    def accept_backlog(self, listener: UnixListener) -> None:
        """Accept all clients in the backlog."""
        with suppress(OSError):
            for _ in range(BACKLOG):  # bounded: new clients may connect meanwhile
                self._isolated(listener.accept_nowait())

    def _reject_on_emfile(self, listener: UnixListener, reason: OSError) -> bool:
        """Accept one client in place of the spare descriptor and reject it with an error reply;
        return whether accept(2) succeeded.
        """
        self.close()
        try:
            sock = listener.accept_nowait()
        except OSError:
            return False
        else:
            error = GenericError(f"The daemon is out of file descriptors: {reason.strerror}")
            self._isolated(sock, error)
            return True
        finally:
            self._refill_spare()

    def _isolated(self, sock: trio.socket.SocketType, reason: QMPError | None = None) -> None:
        """Handle one client, and log any exception: all other clients are served."""
        try:
            self._handle(sock, reason)
        except Exception:  # noqa: BLE001 - one client's failure must not end the accept loop
            _log.exception("a client could not be served")
