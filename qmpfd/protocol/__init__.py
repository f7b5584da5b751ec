"""QMP without I/O: the JSON dialect, requests and replies, and which command gets which fd."""

from .arguments import Int64, bare_type
from .connection import (
    ClientConnection,
    Connection,
    ProtocolError,
    QMPEvent,
    Received,
    Reply,
    ServerConnection,
    State,
)
from .encode import encode
from .parser import Budget
from .vocabulary import Request, Spec, Vocabulary

__all__ = [
    "Budget",
    "ClientConnection",
    "Connection",
    "Int64",
    "ProtocolError",
    "QMPEvent",
    "Received",
    "Reply",
    "Request",
    "ServerConnection",
    "Spec",
    "State",
    "Vocabulary",
    "bare_type",
    "encode",
]
