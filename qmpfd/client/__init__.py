"""Clients for qmpfd and any other QMP server: one for Trio, one that blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._facade import lazily

if TYPE_CHECKING:
    from .blocking import BlockingClient as BlockingClient
    from .blocking import connect_blocking as connect_blocking
    from .calls import Selector as Selector
    from .client import Client as Client
    from .client import connect as connect
    from .errors import ClientClosed as ClientClosed
    from .errors import NoDaemon as NoDaemon
    from .opener import fdset_opener as fdset_opener
    from .reconnect import ReplyLost as ReplyLost

# Loaded when first used: the blocking client is on the path of every short verb, without Trio.
_HOMES = {
    "BlockingClient": ".blocking",
    "connect_blocking": ".blocking",
    "Selector": ".calls",
    "Client": ".client",
    "connect": ".client",
    "ClientClosed": ".errors",
    "NoDaemon": ".errors",
    "fdset_opener": ".opener",
    "ReplyLost": ".reconnect",
}

__all__ = [*_HOMES]  # noqa: PLE0604 - a test compares it with the imports above

__getattr__ = lazily(__name__, _HOMES)
