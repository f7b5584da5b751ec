"""What clients are told that are turned away, and what the log says of them."""

from __future__ import annotations

import logging
from math import inf

import trio

from ...errors import QMPError
from ...fdsets import Peer
from ...limits import REFUSAL_LOG_INTERVAL
from ...protocol.encode import encode

_log = logging.getLogger("qmpfd")


def rejection_reply(reason: QMPError) -> bytes:
    """What a client is told that is not served, or no longer."""
    told = {"error": {"class": reason.error_class, "desc": reason.desc}}
    return encode(told) + b"\r\n"


class RejectionLog:
    """The lines of the log: of many a second, one, and how many there were."""

    def __init__(self) -> None:
        self._unsaid = 0
        self._said_at = -inf

    def note(self, peer: Peer, reason: QMPError) -> None:
        """A client was turned away."""
        now = trio.current_time()
        if now - self._said_at < REFUSAL_LOG_INTERVAL:
            self._unsaid += 1
            return
        more = f" (and {self._unsaid} others before)" if self._unsaid else ""
        self._unsaid, self._said_at = 0, now
        _log.info("turned away pid %d, uid %d: %s%s", peer.pid, peer.uid, reason.desc, more)
