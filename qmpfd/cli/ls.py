"""``qmpfd ls``: lists stored descriptors."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from .exit_codes import DONE, REFUSED
from .options import CONNECTION, JSON, client_of, option
from .output import duration, print_error, print_json, print_table, printable, size
from .targets import TARGETS, Row, Target, listed, select

#: The columns of the long listing.
_COLUMNS = (
    *("FDSET", "FD", "ACCESS", "KIND", "SIZE"),
    *("AGE", "KEPT", "PID", "UID", "NAME", "TARGET"),
)

SUMMARY = "list the stored descriptors"
DESCRIPTION = "List the stored descriptors, or those only that a TARGET names."
EXAMPLES = [
    "qmpfd ls",
    "qmpfd ls --long @web",
    "qmpfd ls '@vm1:*'",
    "qmpfd ls --json | jq '.[0].fds'",
]
OPTIONS = [
    *CONNECTION,
    JSON,
    option("--long -l", "show also what each descriptor is, and who added it"),
    TARGETS,
]


def run(arguments: argparse.Namespace) -> int:
    targets: list[Target] = arguments.targets
    with client_of(arguments) as client:
        rows, missing = select(targets, listed(client, long=arguments.long))
    if arguments.json:
        print_json([fd for _, fd in rows] if arguments.long else _sets(rows))
    elif not rows:
        if not targets:
            print("no fd sets")
    elif arguments.long:
        print_table(_COLUMNS, [_long_row(fd) for _, fd in rows])
    else:
        print_table(
            ("FDSET", "FD", "NAME"),
            [(str(fdset), str(fd["fd"]), fd.get("opaque", "")) for fdset, fd in rows],
        )
    sys.stdout.flush()
    for target in missing:
        print_error(f"qmpfd: {printable(target.word)}: no such descriptor")
    return REFUSED if missing else DONE


def _sets(rows: list[Row]) -> list[dict[str, Any]]:
    """Group the rows by fd set, as in a ``query-fdsets`` reply."""
    sets: dict[int, list[dict[str, Any]]] = {}
    for fdset_id, fd in rows:
        sets.setdefault(fdset_id, []).append(fd)
    return [{"fdset-id": fdset_id, "fds": fds} for fdset_id, fds in sets.items()]


def _long_row(fd: dict[str, Any]) -> tuple[str, ...]:
    lifetimes = [fd["lifetime"]] if fd["lifetime"] != "daemon" else []
    if "expires" in fd:
        lifetimes.append(duration(fd["expires"]))
    if fd["watch-hangup"]:
        lifetimes.append("hangup")
    by = fd.get("added-by", {})
    return (
        str(fd["fdset-id"]),
        str(fd["fd"]),
        ",".join([fd["access"], *fd.get("flags", ())]),
        fd["kind"],
        size(fd["size"]) if "size" in fd else "-",
        duration(fd["age"]),
        ",".join(lifetimes) or "-",
        str(by.get("pid", "-")),
        str(by.get("uid", "-")),
        fd.get("opaque", "") or "-",
        _what(fd),
    )


def _what(fd: dict[str, Any]) -> str:
    """Describe the file behind a descriptor; a socket by its addresses."""
    if "address" not in fd:
        return str(fd["target"])
    if fd.get("listening"):
        return f"listens on {fd['address']}"
    return f"{fd['address']} to {fd['peer']}" if fd.get("peer") else str(fd["address"])
