"""Messages to the service manager: readiness, status, reloads, watchdog (sd_notify(3))."""

from __future__ import annotations

import os

import trio

from ..kernel.systemd import Notifier
from ..limits import NOTIFY_RETRY


class Notifications:
    """Messages to the service manager, or to the parent of ``serve --supervise``.

    A message is retried until it is sent: the queue of the socket may be full, the service manager
    may restart, or this process may be out of descriptors.  The socket stays open: with a full
    descriptor table messages can still be sent.

    Args:
        parent: connection to the parent, which the caller keeps; or None.
    """

    def __init__(self, parent: Notifier | None) -> None:
        self._parent = parent
        self._notifier = parent
        #: Whether a parent or a service manager receives messages.
        self.wanted = parent is not None or bool(os.environ.get("NOTIFY_SOCKET"))
        self._messages: dict[str, str] = {}  # unsent messages, by the variable of their first line
        self._unsent = trio.Event()

    def notify(self, *assignments: str) -> None:
        """Send a message, such as ``"READY=1"``; it replaces an unsent message that begins with the
        same variable.
        """
        if self.wanted:
            name = assignments[0].partition("=")[0]
            self._messages.pop(name, None)
            self._messages[name] = "\n".join(assignments)
            self._flush()

    async def resend(self) -> None:
        """Retry unsent messages every NOTIFY_RETRY seconds, for as long as the daemon runs."""
        while True:
            await self._unsent.wait()
            await trio.sleep(NOTIFY_RETRY)
            self._unsent = trio.Event()
            self._flush()

    def close(self) -> None:
        """Close the connection, unless it is the parent's."""
        if self._notifier is not None and self._notifier is not self._parent:
            self._notifier.close()
            self._notifier = None

    def _flush(self) -> None:
        try:
            self._notifier = self._notifier or Notifier.connect()
            while self._notifier is not None and self._messages:
                name = next(iter(self._messages))
                self._notifier.send(self._messages[name])
                del self._messages[name]
        except BlockingIOError:
            pass
        except OSError:  # connect again: a restarted service manager may have a new socket
            self.close()
        if self._messages:
            self._unsent.set()
