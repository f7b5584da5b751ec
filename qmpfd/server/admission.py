"""Who gets in: the policy's answer, and whether there is room."""

from __future__ import annotations

import array
import os
import socket
import struct
from collections import Counter

from ..errors import GenericError, PermissionDenied
from ..fdsets import Peer
from ..limits import Limits
from ..policy import Access, Policy

#: SO_PEERGROUPS (socket(7)): all groups of whoever connected; not in Python's socket module.
_SO_PEERGROUPS = 59

#: Room for as many groups as a process can have (NGROUPS_MAX, getgroups(2)).
_GROUPS_BYTES = 65536 * 4


def peer_of(sock: socket.socket) -> Peer:
    """Who connected (SO_PEERCRED, unix(7))."""
    packed = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return Peer(*struct.unpack("3i", packed))


def groups_of(sock: socket.socket, peer: Peer) -> frozenset[int]:
    """All groups of whoever connected, supplementary ones included."""
    groups = array.array("I")
    try:
        groups.frombytes(sock.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _GROUPS_BYTES))
    except OSError:  # a kernel before 4.13
        pass
    return frozenset([peer.gid, *groups])


class Admission:
    """Lets clients in, or not.

    Args:
        limits: how many.
        policy: who, and to do what.
    """

    def __init__(self, limits: Limits, policy: Policy) -> None:
        self._limits = limits
        self.policy = policy
        self._count = 0
        self._of_uid: Counter[int] = Counter()

    def admit(self, peer: Peer, groups: frozenset[int]) -> Access:
        """Let a client in: what it may do.  :meth:`leave` is due once it is gone.

        Raises:
            PermissionDenied: no rule gives it anything.
            GenericError: there is no room.
        """
        access = self.policy.access(peer.uid, groups)
        if not access:
            raise PermissionDenied(
                f"uid {peer.uid} may not connect: uid {os.geteuid()} and root may, "
                "and whom a policy lets in"
            )
        limits = self._limits
        if self._count >= limits.max_connections:
            raise GenericError(f"Too many connections: the limit is {limits.max_connections}")
        if self._of_uid[peer.uid] >= limits.max_connections_per_uid:
            raise GenericError(
                f"Too many connections of uid {peer.uid}: "
                f"the limit is {limits.max_connections_per_uid}"
            )
        self._count += 1
        self._of_uid[peer.uid] += 1
        return access

    def leave(self, peer: Peer) -> None:
        """A client that was let in is gone."""
        self._count -= 1
        self._of_uid[peer.uid] -= 1
        if not self._of_uid[peer.uid]:
            del self._of_uid[peer.uid]
