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
from .listener import ListenerShutDown, UnixListener

_log = logging.getLogger("qmpfd")

#: accept(2): this process, or the system, is out of descriptors or memory.
_FULL = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}

#: accept(2): trouble of this one connection; the next may do better.
_GONE = {errno.ECONNABORTED, errno.EPERM, errno.EPROTO}

#: Seconds until the next try where nobody can be accepted, not even to be told so.
_PAUSE = 0.2


class SpareFd:
    """A descriptor kept back, so that a client can be told when there are no others."""

    def __init__(self) -> None:
        self._fd: Fd | None = None
        self.refill()

    def refill(self) -> bool:
        """Have a descriptor in reserve again; whether there is one."""
        if self._fd is None:
            try:
                self._fd = Fd(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
            except OSError:
                return False
        return True

    def give_up(self) -> None:
        """Make room for one descriptor."""
        if self._fd is not None:
            self._fd.close()
            self._fd = None


class Acceptor:
    """Accepts clients on all listeners.

    Args:
        lifecycle: while the daemon is paused, nobody is accepted.
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
        self._spare = SpareFd()
        self._scopes: set[trio.CancelScope] = set()

    @property
    def is_quiescent(self) -> bool:
        """Whether no connection is being accepted."""
        return not self._scopes

    def pause(self) -> None:
        """Accept nobody else while the daemon is paused: who connects waits in the backlog."""
        for scope in self._scopes:
            scope.cancel()

    def close(self) -> None:
        """Give up the spare descriptor."""
        self._spare.give_up()

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
            try:
                sock = await self._accept(listener)
            except ListenerShutDown:
                listener.bind_again()
                _log.warning(
                    "the listening socket %s was shut down from outside: made it again", listener
                )
            except OSError as exc:
                if exc.errno in _GONE:
                    await trio.lowlevel.checkpoint()  # noqa: ASYNC120 - the client of that error is gone
                    continue
                if exc.errno not in _FULL:
                    raise
                if not full:
                    _log.error("clients are turned away: %s", exc.strerror)
                full = True
                rejected = self._reject_on_emfile(listener, exc)
                await trio.sleep(0 if rejected else _PAUSE)
            else:
                if sock is None:  # the daemon was paused meanwhile
                    continue
                if full:
                    _log.warning("clients are served again")
                full = False
                self._spare.refill()  # it was lost if the table shrank meanwhile
                self._isolated(partial(self._handle, sock))

    def accept_backlog(self, listener: UnixListener, limit: int) -> None:
        """Accept up to *limit* clients that have connected already."""
        with suppress(OSError):
            for _ in range(limit):
                self._isolated(partial(self._handle, listener.accept_nowait()))

    async def _accept(self, listener: UnixListener) -> trio.socket.SocketType | None:
        """The next client; None if the daemon is paused first."""
        with trio.CancelScope() as scope:
            self._scopes.add(scope)
            try:
                return await listener.accept()
            finally:
                self._scopes.discard(scope)
        return None

    def _reject_on_emfile(self, listener: UnixListener, reason: OSError) -> bool:
        """Accept one client by means of the spare descriptor, and tell it why it cannot stay;
        whether that was possible.
        """
        self._spare.give_up()
        try:
            sock = listener.accept_nowait()
        except OSError:
            return False
        else:
            error = GenericError(f"The daemon is out of file descriptors: {reason.strerror}")
            self._isolated(partial(self._reject, sock, error))
            return True
        finally:
            self._spare.refill()

    def _isolated(self, action: Callable[[], None]) -> None:
        """What goes wrong with one client costs that client only."""
        try:
            action()
        except Exception:  # noqa: BLE001 - whatever it is, the others are served
            _log.exception("a client could not be served")
