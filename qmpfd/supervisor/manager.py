"""Notifications for the parent's own service manager, and its watchdog (sd_notify(3))."""

from __future__ import annotations

import os
import socket
import time

#: Deadline that is never reached.
NEVER = float("inf")

#: Seconds until a notification that could not be sent is retried.
_RETRY = 0.5


class Manager:
    """Connection to the service manager at $NOTIFY_SOCKET, if that is set."""

    def __init__(self) -> None:
        path = os.environ.get("NOTIFY_SOCKET", "")
        self._address: str | None = None
        if path.startswith(("/", "@")):
            self._address = "\0" + path[1:] if path.startswith("@") else path
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._sock.setblocking(False)
        self._unsent: dict[bytes, bytes] = {}  # messages by their first variable, oldest first
        self._retry_at = 0.0
        usec, pid = os.environ.get("WATCHDOG_USEC", ""), os.environ.get("WATCHDOG_PID")
        #: Timeout of the service manager's watchdog in seconds; None without a watchdog.
        self.watchdog: float | None = None
        if usec.isdecimal() and len(usec) < 18 and pid in (None, str(os.getpid())):
            self.watchdog = int(usec) / 1e6 or None
        self._feed_at = 0.0

    def forward(self, message: bytes) -> None:
        """Send a notification, now or later; one with the same first variable replaces it."""
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
        except (OSError, ValueError):  # the service manager is busy, or is being restarted
            return False
        return True

    def work(self, now: float) -> float:
        """Send pending messages and heartbeats; return the time of the next call.

        Args:
            now: the time (time.monotonic()).
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
