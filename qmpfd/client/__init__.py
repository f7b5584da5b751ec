"""The Trio client, for qmpfd and for any other QMP server."""

from .client import Client, connect
from .link import ReplyLost

__all__ = ["Client", "ReplyLost", "connect"]
