"""What each QMP command does."""

from .context import Client, Context, Daemon, Dialect, Stats
from .control import VERSION
from .dispatch import TABLE, VOCABULARY, execute
from .extension_types import FdInfo, OpenedFd, PeerInfo
from .types import NOTHING, AddfdInfo, FdsetFdInfo, FdsetInfo, VersionInfo

__all__ = [
    "NOTHING",
    "TABLE",
    "VERSION",
    "VOCABULARY",
    "AddfdInfo",
    "Client",
    "Context",
    "Daemon",
    "Dialect",
    "FdInfo",
    "FdsetFdInfo",
    "FdsetInfo",
    "OpenedFd",
    "PeerInfo",
    "Stats",
    "VersionInfo",
    "execute",
]
