"""The Trio client, for qmpfd and for any other QMP server."""

from .client import Client, connect

__all__ = ["Client", "connect"]
