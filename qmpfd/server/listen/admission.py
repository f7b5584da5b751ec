"""Who gets in: the policy's answer, and whether there is room; and what others are told."""

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
from ...limits import REFUSAL_LOG_INTERVAL, Limits
from ...policy import Access, Policy
from ...protocol.encode import encode

_log = logging.getLogger("qmpfd")

#: SO_PEERGROUPS (socket(7)): all groups of whoever connected; not in Python's socket module.
_SO_PEERGROUPS = 59

#: Bytes that Python lets an option have; what has more groups than fit is asked by the C library.
_OPTION_BYTES = 1024
#: As many groups as a process can have (NGROUPS_MAX, getgroups(2)).
_MAX_GROUPS = 65536


class Connected(Protocol):
    """A connection that is served."""

    peer: Peer


def peer_of(sock: socket.socket) -> Peer:
    """Who connected (SO_PEERCRED, unix(7))."""
    packed = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return Peer(*struct.unpack("3i", packed))


def groups_of(sock: socket.socket, peer: Peer) -> frozenset[int]:
    """All groups of whoever connected, supplementary ones included."""
    groups = array.array("I")
    try:
        groups.frombytes(sock.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _OPTION_BYTES))
    except OSError as exc:
        if exc.errno == errno.ERANGE:
            groups = _many_groups(sock)
        # else a kernel before 4.13
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
    """Let a client in, if there is room beside those that are connected: what it may do.

    Raises:
        PermissionDenied: no rule gives it anything.
        GenericError: there is no room.
    """
    access = policy.access(peer.uid, groups)
    if not access:
        raise PermissionDenied(
            f"uid {peer.uid} may not connect: only uid {os.geteuid()}, root "
            "and those to whom a policy rule gives a right"
        )
    total, most = len(connected), limits.max_connections_per_uid
    if total >= limits.max_connections:
        raise GenericError(f"Too many connections: the limit is {limits.max_connections}")
    # As a rule there are so few that nobody has to count.
    if total >= most and sum(each.peer.uid == peer.uid for each in connected) >= most:
        raise GenericError(f"Too many connections of uid {peer.uid}: the limit is {most}")
    return access


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
