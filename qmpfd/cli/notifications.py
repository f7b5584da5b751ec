"""Messages to the service manager: readiness, status, reloads, watchdog (sd_notify(3))."""

from __future__ import annotations

import os

import trio

from ..kernel.systemd import Notifier
from ..limits import NOTIFY_RETRY


class Notifications:
    """Messages to the service manager, or to the parent of ``serve --supervise``.

    Each is sent again until it was taken: the queue of the socket may be full, the service manager
    busy with its own restart, or this process out of descriptors.  The socket stays open, so that
    a full table is no reason for silence.

    Args:
        parent: the connection to the parent, which stays the caller's; None where there is none.
    """

    def __init__(self, parent: Notifier | None) -> None:
        self._parent = parent
        self._notifier = parent
        #: Whether anybody is to be told.
        self.wanted = parent is not None or bool(os.environ.get("NOTIFY_SOCKET"))
        self._messages: dict[str, str] = {}  # those not taken yet, by the name of their first line
        self._unsent = trio.Event()

    def tell(self, *assignments: str) -> None:
        """Send a message, such as ``"READY=1"``; it replaces an older one of that name that was
        not taken yet.
        """
        if self.wanted:
            name = assignments[0].partition("=")[0]
            self._messages.pop(name, None)
            self._messages[name] = "\n".join(assignments)
            self._flush()

    async def resend(self) -> None:
        """Send again what was not taken, for as long as the daemon runs."""
        while True:
            await self._unsent.wait()
            await trio.sleep(NOTIFY_RETRY)
            self._unsent = trio.Event()
            self._flush()

    def close(self) -> None:
        """End the connection, if it is of our own."""
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
        except OSError:  # a service manager that was restarted may have made its socket anew
            self.close()
        if self._messages:
            self._unsent.set()
