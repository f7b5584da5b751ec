"""``qmpfd rm``: removes stored descriptors; the daemon closes them."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any

from ..client.blocking import BlockingClient, NoDaemon
from ..client.calls import is_missing
from ..errors import CommandNotFound, FdNotFound, QMPError
from .exit_codes import DONE, REFUSED, UsageError
from .options import CONNECTION, JSON, client_of, number, option
from .output import print_error, print_result, printable
from .targets import TARGETS, Target, described, first_found, listed

#: A removed fd set, with its removed descriptors if the reply lists them.
Removed = dict[str, Any]

SUMMARY = "remove fd sets or descriptors"
DESCRIPTION = (
    "Remove stored descriptors; the daemon closes them. If the daemon refuses "
    "one target, the others are removed all the same."
)
EXAMPLES = ["qmpfd rm 0", "qmpfd rm 0/12 @web", "qmpfd rm '@vm1:*'", "qmpfd rm --all"]
OPTIONS = [
    *CONNECTION,
    JSON,
    TARGETS,
    option(
        "--pid N",
        "remove all descriptors that process N has added, even if it has ended",
        number("process", 1),
    ),
    option("--all", "remove all descriptors"),
]


def run(arguments: argparse.Namespace) -> int:
    targets: list[Target] = arguments.targets
    if (bool(targets), arguments.pid is not None, arguments.all).count(True) != 1:
        raise UsageError("rm needs one of TARGET..., --pid N and --all (see qmpfd rm --help)")
    removed: list[Removed] = []
    try:
        with client_of(arguments) as client:
            refused = _remove_all(client, arguments, removed)
    except (QMPError, NoDaemon, KeyboardInterrupt):
        if removed:
            _report(arguments, removed)
        raise
    if removed or arguments.json:
        _report(arguments, removed)
    elif arguments.all:
        print_result("no fd sets")
    return REFUSED if refused else DONE


def _remove_all(
    client: BlockingClient, arguments: argparse.Namespace, removed: list[Removed]
) -> bool:
    """Remove the descriptors that the arguments name, and append them to *removed*; return whether
    one target of several was refused.
    """
    if arguments.all:
        sets: dict[int, None] = dict.fromkeys(fdset_id for fdset_id, _ in listed(client))
        _remove_listed(client, sets.items(), removed)
    elif arguments.pid is not None:
        removed += client.execute("remove-fds", {"added-by-pid": arguments.pid})
    targets: list[Target] = arguments.targets
    refused = False
    for target in targets:
        try:
            _remove_target(client, target, removed)
        except QMPError as exc:
            if len(targets) == 1:
                raise
            why = printable(f"{exc.error_class}: {exc.desc}")
            print_error(f"qmpfd: {printable(target.word)}: {why}")
            refused = True
    return refused


def _remove_target(client: BlockingClient, target: Target, removed: list[Removed]) -> None:
    if target.name is None:
        removed.append(_remove(client, target.selector))
        return
    if not target.is_pattern:
        with suppress(CommandNotFound):  # QEMU has only remove-fd
            removed += first_found(
                target, lambda reading: client.execute("remove-fds", reading.selector)
            )
            return
    found = [row for row in listed(client) if target.matches(*row)]
    if not found:
        raise FdNotFound(f"no name matches {target.name!r}")
    _remove_listed(client, found, removed)


def _remove_listed(
    client: BlockingClient,
    found: Iterable[tuple[int, dict[str, Any] | None]],
    removed: list[Removed],
) -> None:
    """Remove listed fd sets or descriptors, and append them to *removed*.

    Ignore those that another client has removed since.

    Raises:
        QMPError: the first refusal, after all have been tried.
    """
    refusal: QMPError | None = None
    for fdset_id, fd in found:
        where = {"fdset-id": fdset_id} | ({} if fd is None else {"fd": fd["fd"]})
        try:
            removed.append(_remove(client, where, fd))
        except QMPError as exc:
            if not is_missing(exc):
                refusal = refusal or exc
    if refusal is not None:
        raise refusal


def _remove(
    client: BlockingClient, members: dict[str, Any], fd: dict[str, Any] | None = None
) -> Removed:
    """Remove an fd set, or one descriptor.

    Args:
        client: the connection.
        members: the arguments of ``remove-fd``.
        fd: the descriptor's entry in a listing.  Its number may have become another descriptor's
            since; ``remove-fds``, which QEMU lacks, compares the name too.
    """
    if fd is None or "opaque" not in fd:
        client.execute("remove-fd", members)
    else:
        try:
            client.execute("remove-fds", {**members, "opaque": fd["opaque"]})
        except CommandNotFound:
            client.execute("remove-fd", members)
    if fd is None and "fd" in members:
        fd = {"fd": members["fd"]}
    return {"fdset-id": members["fdset-id"]} | ({} if fd is None else {"fds": [fd]})


def _report(arguments: argparse.Namespace, removed: list[Removed]) -> None:
    if arguments.json:
        print_result(removed)
    else:
        print_result("\n".join(f"removed {line}" for line in _lines(removed)))


def _lines(removed: list[Removed]) -> Iterator[str]:
    for fdset in removed:
        if "fds" not in fdset:
            yield printable(f"fd set {fdset['fdset-id']}")
        for fd in fdset.get("fds", ()):
            yield described(fdset["fdset-id"], fd)
