"""Commands about the connection and the daemon itself."""

from __future__ import annotations

from typing import Any

from .._version import __version__
from ..errors import InvalidParameterValue
from ..limits import TAKEOVER_FORMAT
from .context import Context, Ending
from .extension_types import Takeover
from .schema import schema
from .table import Table
from .types import (
    Arguments,
    Capabilities,
    CommandInfo,
    NameInfo,
    SchemaInfo,
    VersionInfo,
    VersionTriple,
)
from .types import Result as Nothing

table: Table[Context] = Table(touches_store=False)

#: This daemon's version, for query-version and the greeting.
VERSION = VersionInfo(
    VersionTriple(*reversed([int(part) for part in __version__.split(".")])), f"qmpfd {__version__}"
)


@table.command("qmp_capabilities", Capabilities, Nothing)
def qmp_capabilities(context: Context, arguments: Capabilities) -> None:
    """Enable capabilities and enter command mode; the first command of every connection."""
    enable = arguments.enable
    context.connection.negotiate([] if enable is None else list(enable))


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
    return [CommandInfo(name) for name in context.shared.table.commands]


@table.command("query-qmp-schema", Arguments, list[SchemaInfo])
def query_qmp_schema(context: Context, arguments: Arguments) -> list[dict[str, Any]]:
    """Describe all commands and events, and their types."""
    return schema(context.shared.table)


@table.command("takeover", Takeover, Nothing)
def takeover(context: Context, arguments: Takeover) -> None:
    """Hand everything over to the client, the successor daemon."""
    context.access.require("admin")
    if arguments.format < TAKEOVER_FORMAT:  # a successor can read older formats than its own
        raise InvalidParameterValue(
            f"Parameter 'format' expects {TAKEOVER_FORMAT}, this daemon's, or a newer one"
        )
    context.ending = Ending.TAKEOVER


@table.command("quit", Arguments, Nothing)
def quit_(context: Context, arguments: Arguments) -> None:
    """End the daemon: every stored descriptor is closed."""
    context.access.require("admin")
    context.ending = Ending.QUIT
    context.shared.stop()
