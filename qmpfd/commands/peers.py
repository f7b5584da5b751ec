"""Who is connected: the part of ``query-stats`` that tells of the clients."""

from __future__ import annotations

from ..fdsets import Peer
from ..limits import MAX_PEERS
from .context import Context
from .extension_types import PeerStats
from .shared import Client


def peers(context: Context) -> list[PeerStats]:
    """The processes that are connected, those connected for longest first.

    Whoever may end the daemon is told of all; other clients only of those of their own user.
    """
    sees_all = any("admin" in grant.rights for grant in context.access.grants)
    found: dict[Peer, list[Client]] = {}
    for client in context.shared.clients():
        if sees_all or client.peer.uid == context.peer.uid:
            found.setdefault(client.peer, []).append(client)
    longest_first = sorted(found, key=lambda peer: -max(client.age for client in found[peer]))
    return [_of_one(peer, found[peer]) for peer in longest_first[:MAX_PEERS]]


def _of_one(peer: Peer, clients: list[Client]) -> PeerStats:
    return PeerStats(
        *peer,
        connections=len(clients),
        age=int(max(client.age for client in clients)),
        idle=int(min(client.idle for client in clients)),
        fds=sum(client.fds for client in clients),
        watching=any(client.watching for client in clients),
    )
