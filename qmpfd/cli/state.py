"""``qmpfd status``: what to type first when something is wrong."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from ..errors import QMPError
from .options import add_client_options, add_examples, client_of, default_socket
from .output import duration, print_json
from .status import DONE

if TYPE_CHECKING:
    from .options import Subparsers


def add_parsers(verbs: Subparsers) -> None:
    """Add ``status`` to the command line."""
    parser = verbs.add_parser(
        "status",
        help="show whether the daemon is up, how full it is, and its limits",
        description="Show whether the daemon is up, how full it is, and its limits.",
    )
    add_client_options(parser)
    add_examples(
        parser,
        "qmpfd status",
        "qmpfd status --socket /run/vm1/qmp.sock",
        "qmpfd status --json | jq .stats.fds",
    )
    parser.set_defaults(run=_status)


def _status(arguments: argparse.Namespace) -> int:
    path = str(arguments.socket or default_socket())
    with client_of(arguments) as client:
        version = client.execute("query-version")
        try:
            stats = client.execute("query-stats")
        except QMPError:  # another QMP server: it is up, and that is all it tells
            stats = None
    if arguments.json:
        print_json({"socket": path, "version": version, "stats": stats})
        return DONE
    rows = [("socket", path), ("server", server_name(version))]
    rows += [] if stats is None else _rows(stats)
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")
    return DONE


def server_name(version: dict[str, Any]) -> str:
    """What a server is, by its ``query-version``."""
    package = str(version.get("package", ""))
    if package.startswith("qmpfd "):
        return package
    numbers = version["qemu"]
    return f"QEMU {numbers['major']}.{numbers['minor']}.{numbers['micro']} {package}".rstrip()


def _rows(stats: dict[str, Any]) -> list[tuple[str, str]]:
    limits = stats["limits"]
    commands = sum(each["count"] for each in stats["commands"])
    errors = sum(each["count"] for each in stats["errors"])
    return [
        ("up for", duration(stats["uptime"])),
        ("dialect", stats["dialect"]),
        ("fd sets", f"{stats['fdsets']}"),
        ("descriptors", f"{stats['fds-kept']} of {limits['max-fds']}"),
        ("open files", f"at most {limits['max-open-files']}"),
        ("connections", f"{stats['connections']} of {limits['max-connections']}"),
        ("served", f"{stats['connections-accepted']} connections, {commands} commands"),
        ("refused", f"{stats['connections-refused']} connections, {errors} commands"),
    ]
