"""The commands about the connection and the daemon itself."""

from __future__ import annotations

from msgspec import UNSET

from .._version import __version__
from .context import Context
from .fds import table as fds
from .table import Table
from .types import (
    NOTHING,
    Arguments,
    Capabilities,
    CommandInfo,
    NameInfo,
    VersionInfo,
    version_info,
)
from .types import Result as Nothing

table = Table()

#: What this daemon is; also in the greeting.
VERSION = version_info(__version__)


@table.command("qmp_capabilities", Capabilities, Nothing)
def qmp_capabilities(context: Context, arguments: Capabilities) -> Nothing:
    """Enable capabilities and enter command mode; the first command of every connection."""
    enable = arguments.enable
    context.connection.negotiate([] if enable is UNSET else list(enable))
    return NOTHING


@table.command("query-version", Arguments, VersionInfo)
def query_version(context: Context, arguments: Arguments) -> VersionInfo:
    """Return the version of the server."""
    return VERSION


@table.command("query-name", Arguments, NameInfo)
def query_name(context: Context, arguments: Arguments) -> NameInfo:
    """Return the name of the guest: there is none, so nothing is returned."""
    return NameInfo()


@table.command("query-commands", Arguments, list[CommandInfo])
def query_commands(context: Context, arguments: Arguments) -> list[CommandInfo]:
    """List the commands of the server."""
    return [CommandInfo(name) for name in (*table.commands, *fds.commands)]


@table.command("quit", Arguments, Nothing)
def quit_(context: Context, arguments: Arguments) -> Nothing:
    """End the daemon: every stored descriptor is closed."""
    context.daemon.stop()
    return NOTHING
