"""What each QMP command does."""

from .context import Context, Daemon, Dialect
from .control import VERSION
from .dispatch import TABLE, VOCABULARY, execute
from .types import AddfdInfo, FdsetFdInfo, FdsetInfo, VersionInfo

__all__ = [
    "TABLE",
    "VERSION",
    "VOCABULARY",
    "AddfdInfo",
    "Context",
    "Daemon",
    "Dialect",
    "FdsetFdInfo",
    "FdsetInfo",
    "VersionInfo",
    "execute",
]
