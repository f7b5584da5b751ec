"""QMP without I/O: the JSON dialect, requests and replies, and which command gets which fd."""

from .arguments import Int64
from .connection import (
    ClientConnection,
    Connection,
    ProtocolError,
    QMPEvent,
    Reply,
    ServerConnection,
    State,
)
from .encode import encode
from .vocabulary import Request, Spec, Vocabulary

__all__ = [
    "ClientConnection",
    "Connection",
    "Int64",
    "ProtocolError",
    "QMPEvent",
    "Reply",
    "Request",
    "ServerConnection",
    "Spec",
    "State",
    "Vocabulary",
    "encode",
]
