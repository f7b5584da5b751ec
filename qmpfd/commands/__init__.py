"""The QMP commands."""

from .context import Context, Ending
from .control import VERSION
from .dispatch import DECODER, TABLE, execute
from .extension_types import FdInfo, OpenedFd, PeerInfo
from .shared import Client, Dialect, SharedState, Stats
from .types import NOTHING, AddfdInfo, FdsetFdInfo, FdsetInfo, VersionInfo

__all__ = [
    "DECODER",
    "NOTHING",
    "TABLE",
    "VERSION",
    "AddfdInfo",
    "Client",
    "Context",
    "Dialect",
    "Ending",
    "FdInfo",
    "FdsetFdInfo",
    "FdsetInfo",
    "OpenedFd",
    "PeerInfo",
    "SharedState",
    "Stats",
    "VersionInfo",
    "execute",
]
