"""What each QMP command does."""

from .context import Context, Daemon, Dialect, Stats
from .control import VERSION
from .dispatch import TABLE, VOCABULARY, execute
from .types import AddfdInfo, FdInfo, FdsetFdInfo, FdsetInfo, OpenedFd, PeerInfo, VersionInfo

__all__ = [
    "TABLE",
    "VERSION",
    "VOCABULARY",
    "AddfdInfo",
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
