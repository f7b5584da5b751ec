"""``qmpfd status``: whether the daemon runs, its limits, and who is connected."""

from __future__ import annotations

import argparse
import os
import pwd
import time
from typing import Any

from ..errors import QMPError
from .options import CONNECTION, JSON, client_within, default_socket, option, seconds
from .output import duration, print_json, print_pairs, print_table, printable

SUMMARY = "show whether the daemon runs, its limits, and who is connected"
DESCRIPTION = (
    "Show whether the daemon runs and since when, its limits and what is used "
    "of them, and who is connected."
)
EXAMPLES = [
    "qmpfd status",
    "qmpfd status --wait 5",
    "qmpfd status --socket /run/vm1/qmp.sock",
    "qmpfd status --json | jq .stats.fds",
]
OPTIONS = [
    *CONNECTION,
    JSON,
    option(
        "--wait S",
        "if no daemon runs yet, wait for one for at most S seconds",
        seconds,
        default=0.0,
    ),
]


def run(arguments: argparse.Namespace) -> None:
    path = str(arguments.socket or default_socket())
    with client_within(arguments, arguments.wait) as client:
        version = client.execute("query-version")
        stats, reason = None, "this is not qmpfd"
        if server_name(version).startswith("qmpfd "):  # QEMU's query-stats is another command
            try:
                stats, reason = client.execute("query-stats"), ""
            except QMPError as exc:
                reason = f"{exc.error_class}: {exc.desc}"
    if arguments.json:
        print_json({"socket": path, "version": version, "stats": stats})
        return
    pairs = [("socket", path), ("server", server_name(version))]
    if stats is None:
        print_pairs([*pairs, ("statistics", f"none: {reason}")])
    else:
        print_pairs([*pairs, *_rows(stats)])
        _print_peers(stats)


def server_name(version: Any) -> str:
    """Format the server's name and version; *version* is a ``query-version`` reply of any form."""
    members = version if isinstance(version, dict) else {}
    package = printable(str(members.get("package", "")))
    if package.startswith("qmpfd "):
        return package
    numbers = members["qemu"] if isinstance(members.get("qemu"), dict) else {}
    number = ".".join(str(numbers.get(name, "?")) for name in ("major", "minor", "micro"))
    return f"QEMU {printable(number)} {package}".rstrip()


_HIDDEN = "hidden: this user may not query all descriptors"
_SAFE = "yes: stored descriptors survive a crash of the daemon"
_UNSAFE = "no: a crash of the daemon loses the stored descriptors (see serve --supervise)"


def _rows(stats: dict[str, Any]) -> list[tuple[str, str]]:
    limits = stats["limits"]
    since = time.strftime("%Y-%m-%d %H:%M", time.localtime(time.time() - stats["uptime"]))
    fds = _gauge(stats["fds-kept"], limits, "max-fds") if "fds-kept" in stats else _HIDDEN
    connections = _gauge(stats["connections"], limits, "max-connections")
    timeouts = [
        f"{name} {limits[f'{name}-timeout']:g} s"
        for name in ("idle", "write", "drain")
        if f"{name}-timeout" in limits
    ]
    pairs = [
        ("process", str(stats["pid"])),
        ("since", f"{since}, for {duration(stats['uptime'])}"),
        ("dialect", stats["dialect"]),
        ("fd sets", str(stats.get("fdsets", _HIDDEN))),
        ("descriptors", fds),
        ("kept safe", _SAFE if stats["kept-safe"] else _UNSAFE),
        ("connections", connections),
        ("open files", f"at most {limits['max-open-files']}"),
        ("requests", f"at most {limits['max-request-bytes']} bytes each"),
        ("timeouts", ", ".join(timeouts)),
        ("served", _counted(stats["connections-accepted"], stats.get("commands"))),
        ("refused", _counted(stats["connections-refused"], stats.get("errors"))),
    ]
    if closing := stats.get("closes-pending"):
        pairs.append(("closing", f"{closing} of the removed descriptors: close(2) takes long"))
    return pairs


def _counted(connections: int, commands: list[dict[str, Any]] | None) -> str:
    counts = {"connection": connections}
    if commands is not None:  # None for a user without the right to query everything
        counts["command"] = sum(each["count"] for each in commands)
    return ", ".join(f"{n} {noun}{'' if n == 1 else 's'}" for noun, n in counts.items())


def _gauge(used: int, limits: dict[str, Any], name: str) -> str:
    """Format the use of a limit."""
    full = "FULL: " if used >= limits[name] else ""
    return f"{full}{used} of {limits[name]}, of one user at most {limits[f'{name}-per-uid']}"


# -- who is connected --------------------------------------------------------------------------


def _print_peers(stats: dict[str, Any]) -> None:
    peers = stats["peers"]
    # The pids are valid here only if the daemon is in the same pid namespace, and so has our pid.
    named = any(peer["pid"] == os.getpid() for peer in peers)
    print()
    print_table(
        ("PID", "USER", "COMMAND", "CONNECTIONS", "AGE", "IDLE", "FDS", "WATCHES"),
        [_peer_row(peer, named) for peer in peers],
    )
    others = stats["connections"] - sum(peer["connections"] for peer in peers)
    if others > 0:
        print(f"{others} more connections are not shown")


def _peer_row(peer: dict[str, Any], named: bool) -> tuple[str, ...]:
    return (
        str(peer["pid"] or "-"),
        _user(peer["uid"]),
        (_command(peer["pid"]) if named else "") or "-",
        str(peer["connections"]),
        duration(peer["age"]),
        duration(peer["idle"]),
        str(peer["fds"]),
        "yes" if peer["watching"] else "no",
    )


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _command(pid: int) -> str:
    """Return the name of a process; empty if it has ended or /proc hides it."""
    if pid == os.getpid():
        return "(this one)"
    try:
        with open(f"/proc/{pid}/comm", "rb") as file:
            return file.read().decode(errors="replace").strip()
    except OSError:
        return ""
