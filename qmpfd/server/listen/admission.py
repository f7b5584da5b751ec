"""Admits or rejects a new client: policy, limits of connections; log of rejections."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection
from math import inf
from typing import Protocol

import trio

from ...errors import GenericError, PermissionDenied, QMPError
from ...fdsets import Peer
from ...kernel.credentials import is_owner
from ...limits import REFUSAL_LOG_INTERVAL, Limits, left_to_others
from ...policy import Access, Policy
from ...protocol.encode import encode

_log = logging.getLogger("qmpfd")


class Connected(Protocol):
    """A connection with its peer's credentials."""

    peer: Peer


def admit(
    peer: Peer,
    groups: frozenset[int],
    policy: Policy,
    limits: Limits,
    connected: Collection[Connected],
) -> Access:
    """Admit a client if policy and limits allow; return its access rights.

    Raises:
        PermissionDenied: the policy grants it no right.
        GenericError: a limit of connections is reached.
    """
    access = policy.access(peer.uid, groups)
    if not access:
        own = f"uid {os.geteuid()}, " if is_owner(os.geteuid()) else ""
        raise PermissionDenied(
            f"uid {peer.uid} may not connect: only {own}root and those to whom a policy rule gives "
            "a right"
        )
    total, most = len(connected), limits.max_connections
    if not is_owner(peer.uid):
        most = left_to_others(most)
    if total >= most:
        raise GenericError(f"Too many connections: the limit is {most}")
    most = limits.max_connections_per_uid
    # Count one user's connections only when all together reach the limit of one user.
    if total >= most and sum(each.peer.uid == peer.uid for each in connected) >= most:
        raise GenericError(f"Too many connections of uid {peer.uid}: the limit is {most}")
    return access


def rejection_reply(reason: QMPError) -> bytes:
    """Return the error reply for a client that is rejected or evicted."""
    reply = {"error": {"class": reason.error_class, "desc": reason.desc}}
    return encode(reply) + b"\r\n"


class RejectionLog:
    """Logs rejected clients: one line per REFUSAL_LOG_INTERVAL, with the number left out."""

    def __init__(self) -> None:
        self._left_out = 0
        self._logged_at = -inf

    def note(self, peer: Peer, reason: QMPError) -> None:
        """Log the rejection of a client, or count it for a later line."""
        now = trio.current_time()
        if now - self._logged_at < REFUSAL_LOG_INTERVAL:
            self._left_out += 1
            return
        more = f" (and {self._left_out} others before)" if self._left_out else ""
        self._left_out, self._logged_at = 0, now
        _log.info("turned away pid %d, uid %d: %s%s", peer.pid, peer.uid, reason.desc, more)
