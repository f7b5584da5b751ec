"""Admits or rejects a new client: credentials, policy, limits of connections; log of rejections."""

from __future__ import annotations

import array
import ctypes
import errno
import logging
import os
import socket
import struct
from collections.abc import Collection
from math import inf
from typing import Protocol

import trio

from ...errors import GenericError, PermissionDenied, QMPError
from ...fdsets import Peer
from ...limits import REFUSAL_LOG_INTERVAL, Limits, left_to_others
from ...policy import Access, Policy, is_owner
from ...protocol.encode import encode

_log = logging.getLogger("qmpfd")

#: SO_PEERGROUPS (socket(7)): all groups of the peer; Python's socket module lacks it.
_SO_PEERGROUPS = 59

#: Maximum size of an option in Python's getsockopt(); for more groups the C library is called.
_OPTION_BYTES = 1024
#: Maximum number of groups of a process (NGROUPS_MAX, getgroups(2)).
_MAX_GROUPS = 65536


class Connected(Protocol):
    """A connection with its peer's credentials."""

    peer: Peer


def peer_of(sock: socket.socket) -> Peer:
    """Return the client's credentials (SO_PEERCRED, unix(7))."""
    packed = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return Peer(*struct.unpack("3i", packed))


def groups_of(sock: socket.socket, peer: Peer) -> frozenset[int]:
    """Return all groups of the client, supplementary ones included."""
    groups = array.array("I")
    try:
        groups.frombytes(sock.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _OPTION_BYTES))
    except OSError as exc:
        if exc.errno == errno.ERANGE:
            groups = _many_groups(sock)
        # else the kernel is older than 4.13 and lacks SO_PEERGROUPS
    return frozenset([peer.gid, *groups])


def _many_groups(sock: socket.socket) -> array.array[int]:
    groups = array.array("I", bytes(4 * _MAX_GROUPS))
    size = ctypes.c_uint32(4 * _MAX_GROUPS)
    address, _ = groups.buffer_info()
    getsockopt = ctypes.CDLL(None).getsockopt
    if getsockopt(
        sock.fileno(),
        socket.SOL_SOCKET,
        _SO_PEERGROUPS,
        ctypes.c_void_p(address),
        ctypes.byref(size),
    ):
        return array.array("I")
    return groups[: size.value // groups.itemsize]


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
        raise PermissionDenied(
            f"uid {peer.uid} may not connect: only uid {os.geteuid()}, root "
            "and those to whom a policy rule gives a right"
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
        self._unsaid = 0
        self._said_at = -inf

    def note(self, peer: Peer, reason: QMPError) -> None:
        """Log the rejection of a client, or count it for a later line."""
        now = trio.current_time()
        if now - self._said_at < REFUSAL_LOG_INTERVAL:
            self._unsaid += 1
            return
        more = f" (and {self._unsaid} others before)" if self._unsaid else ""
        self._unsaid, self._said_at = 0, now
        _log.info("turned away pid %d, uid %d: %s%s", peer.pid, peer.uid, reason.desc, more)
