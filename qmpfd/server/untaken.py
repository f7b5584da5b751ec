"""Connections that are over, and whose clients have not taken descriptors that were sent to them.

Such descriptors count against the daemon's user until they are received (unix(7), ETOOMANYREFS): a
client that ended one connection after the other, without reading, could have as many as it likes.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import suppress

from ..commands import Daemon
from ..transport import FdStream


class Untaken:
    """Keeps our end of them, which tells when they are taken.

    Args:
        daemon: where they count as waiting meanwhile.
        close: closes a connection.
    """

    def __init__(self, daemon: Daemon, close: Callable[[FdStream], None]) -> None:
        self._daemon = daemon
        self._close = close
        self._kept: dict[FdStream, tuple[int, int]] = {}

    def keep(self, stream: FdStream, uid: int, count: int) -> None:
        """End a connection, but keep our end of it.

        Args:
            stream: the connection; owned from here on.
            uid: whose it is.
            count: descriptors that its client has not taken.
        """
        with suppress(OSError):  # the client is gone
            stream.socket.shutdown(socket.SHUT_RDWR)
        self._daemon.hold_waiting(uid, count)
        self._kept[stream] = uid, count

    def look(self) -> None:
        """Close those whose clients have taken everything, or are gone."""
        for stream in [each for each in self._kept if not each.most_untaken()]:
            self._forget(stream)

    def close(self) -> None:
        """Close all."""
        for stream in list(self._kept):
            self._forget(stream)

    def _forget(self, stream: FdStream) -> None:
        uid, count = self._kept.pop(stream)
        self._daemon.hold_waiting(uid, -count)
        self._close(stream)
