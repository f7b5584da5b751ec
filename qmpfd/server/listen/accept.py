"""Accepting clients, even with no descriptor left."""

from __future__ import annotations

import errno
import logging
import os
from typing import TYPE_CHECKING

import trio

from ...errors import GenericError
from ...kernel.fd import Fd

if TYPE_CHECKING:
    from ..server import Server
    from .listener import UnixListener

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


async def accept_clients(server: Server, listener: UnixListener) -> None:
    """Accept clients for as long as the daemon serves.

    With the descriptor table full, a client is accepted in place of the reserve, told why, and
    closed again: it is not left to wait, and the loop does not spin on it.
    """
    full = False
    while True:
        await server.lifecycle.wait_running()
        try:
            sock = await server.accept(listener)
        except OSError as exc:
            failure = exc
        else:
            if sock is None:  # the daemon was frozen meanwhile
                continue
            if full:
                _log.warning("clients are served again")
            full = False
            server.reserve.refill()  # it was lost if the table shrank meanwhile
            server.handle_accepted(sock)
            continue
        if failure.errno in _GONE:
            await trio.lowlevel.checkpoint()
            continue
        if failure.errno not in _FULL:
            raise failure
        if not full:
            _log.error("clients are turned away: %s", failure.strerror)
        full = True
        turned_away = turn_one_away(server, listener, failure)
        await trio.sleep(0 if turned_away else _PAUSE)


def turn_one_away(server: Server, listener: UnixListener, reason: OSError) -> bool:
    """Accept one client by means of the reserve, and tell it why it cannot stay; whether that
    was possible.
    """
    server.reserve.give_up()
    try:
        sock = listener.accept_nowait()
    except OSError:
        return False
    else:
        server.reject(
            sock, GenericError(f"The daemon is out of file descriptors: {reason.strerror}")
        )
        return True
    finally:
        server.reserve.refill()
