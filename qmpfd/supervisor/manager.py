"""The parent's own service manager: notifications for it, and its watchdog (sd_notify(3))."""

from __future__ import annotations

import os
import socket
import time

#: A time that does not come.
NEVER = float("inf")

#: Seconds until a notification that could not be sent is sent again.
_RETRY = 0.5


class Manager:
    """The service manager at $NOTIFY_SOCKET, if there is one."""

    def __init__(self) -> None:
        path = os.environ.get("NOTIFY_SOCKET", "")
        self._address: str | None = None
        if path.startswith(("/", "@")):
            self._address = "\0" + path[1:] if path.startswith("@") else path
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._sock.setblocking(False)
        self._unsent: dict[bytes, bytes] = {}  # by the name of the first variable, oldest first
        self._retry_at = 0.0
        usec, pid = os.environ.get("WATCHDOG_USEC", ""), os.environ.get("WATCHDOG_PID")
        #: Seconds within which the service manager wants a heartbeat of us; None if it does not.
        self.watchdog: float | None = None
        if usec.isdecimal() and len(usec) < 18 and pid in (None, str(os.getpid())):
            self.watchdog = int(usec) / 1e6 or None
        self._feed_at = 0.0

    def forward(self, message: bytes) -> None:
        """Send a notification, now or when it is possible; a newer one of its kind replaces it."""
        if self._address is None:
            return
        kind = message.partition(b"=")[0]
        self._unsent.pop(kind, None)
        self._unsent[kind] = message
        self._flush()

    def _flush(self) -> None:
        while self._unsent:
            kind = next(iter(self._unsent))
            if not self._send(self._unsent[kind]):
                self._retry_at = time.monotonic() + _RETRY
                return
            del self._unsent[kind]

    def _send(self, message: bytes) -> bool:
        assert self._address is not None
        try:
            self._sock.sendto(message, self._address)
        except (OSError, ValueError):  # it is busy, or is just executing itself again
            return False
        return True

    def work(self, now: float) -> float:
        """Do what is due; when to call this again.

        Args:
            now: the time, as the result (time.monotonic()).
        """
        due = NEVER
        if self._unsent:
            if self._retry_at <= now:
                self._flush()
            due = self._retry_at if self._unsent else NEVER
        if self._address is not None and self.watchdog is not None:
            if self._feed_at <= now:
                self._send(b"WATCHDOG=1")
                self._feed_at = now + self.watchdog / 2
            due = min(due, self._feed_at)
        return due
