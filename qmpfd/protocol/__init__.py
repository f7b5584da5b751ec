"""QMP without I/O: the JSON dialect, requests and replies, and which command gets which fd."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._facade import lazily

if TYPE_CHECKING:
    from .arguments import Int64 as Int64
    from .arguments import bare_type as bare_type
    from .client import ClientConnection as ClientConnection
    from .client import QMPEvent as QMPEvent
    from .client import Reply as Reply
    from .connection import Connection as Connection
    from .connection import ProtocolError as ProtocolError
    from .connection import State as State
    from .parser import Budget as Budget
    from .request_decoder import Request as Request
    from .request_decoder import RequestDecoder as RequestDecoder
    from .request_decoder import Spec as Spec
    from .server import ReceivedRequest as ReceivedRequest
    from .server import ServerConnection as ServerConnection

_HOMES = {
    "Int64": ".arguments",
    "bare_type": ".arguments",
    "ClientConnection": ".client",
    "QMPEvent": ".client",
    "Reply": ".client",
    "Connection": ".connection",
    "ProtocolError": ".connection",
    "State": ".connection",
    "Budget": ".parser",
    "ReceivedRequest": ".server",
    "ServerConnection": ".server",
    "Request": ".request_decoder",
    "Spec": ".request_decoder",
    "RequestDecoder": ".request_decoder",
}

__all__ = [*_HOMES]  # noqa: PLE0604 - a test compares it with the imports above

__getattr__ = lazily(__name__, _HOMES)
