"""QMP without I/O: the JSON dialect, requests and replies, and which command gets which fd."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._facade import homes, lazily

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

_HOMES = homes(
    {
        ".arguments": "Int64 bare_type",
        ".client": "ClientConnection QMPEvent Reply",
        ".connection": "Connection ProtocolError State",
        ".parser": "Budget",
        ".request_decoder": "Request RequestDecoder Spec",
        ".server": "ReceivedRequest ServerConnection",
    }
)

__all__ = [*_HOMES]  # noqa: PLE0604 - a test compares it with the imports above

__getattr__ = lazily(__name__, _HOMES)
