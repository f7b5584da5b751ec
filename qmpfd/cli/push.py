"""``qmpfd push``: copies stored descriptors to another QMP server."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from ..client.blocking import BlockingClient, NoDaemon
from ..client.calls import members
from ..errors import CommandNotFound, FdNotFound, QMPError
from ..kernel.fd import close_all
from .exit_codes import UsageError
from .forgetful import stay_or_warn
from .options import CONNECTION, JSON, client_of, client_within, number, option, socket_path
from .output import print_error, print_result, printable
from .targets import Row, Target, listed, open_target, select, target

#: Seconds of attempts to connect again to a server from which copies have to be removed.
_PATIENCE = 1.0

SUMMARY = "copy stored descriptors to another QMP server, such as a QEMU"
DESCRIPTION = (
    "Copy all descriptors that TARGET names to one fd set of another QMP "
    "server, a qmpfd or a QEMU. Either all of them are copied or none."
)
EXAMPLES = [
    "qmpfd push 0 --to /run/vm1/qmp.sock",
    "qmpfd push @vm1:disk:rw --to /run/vm1/qmp.sock --fdset 3",
]
EXIT_STATUS = "  0 done, 1 one of the two servers refused, 2 usage, 3 one of the two does not run"
OPTIONS = [
    *CONNECTION,
    JSON,
    option("target", "SET[/FD][:ACCESS] or @NAME[:ACCESS]", target, metavar="TARGET"),
    option("--to QMP_SOCKET", "the other server's socket", socket_path, required=True),
    option(
        "--fdset M",
        "the fd set of the other server (default: a new one)",
        number("fd set id"),
        dest="to_fdset",
    ),
    option(
        "--hold",
        "stay connected to the other server until interrupted; QEMU up to 9.0 closes "
        "descriptors that it does not use when its last QMP client disconnects",
    ),
]


def run(arguments: argparse.Namespace) -> None:
    wanted: Target = arguments.target
    if wanted.at is not None:
        raise UsageError(
            f"{wanted.word!r}: push takes no =AT (--fdset names the fd set of the other server)"
        )
    with (
        client_of(arguments) as source,
        BlockingClient(arguments.to, arguments.timeout) as sink,
    ):
        # Only query-fds has the access mode; its entries are reversed: it lists the newest first.
        stored = listed(source) if wanted.access is None else listed(source, long=True)[::-1]
        rows, missing = select([wanted], stored)
        if missing:
            _, fds = open_target(source, wanted)  # raises the daemon's own error
            close_all(fds)
            raise FdNotFound(f"no such descriptor: {wanted.word}")
        with _all_or_nothing(arguments, sink) as added:
            _copy(source, sink, rows, arguments.to_fdset, added)
        fdset_id = added[0]["fdset-id"]
        if arguments.json:
            fds = [{k: v for k, v in each.items() if k != "fdset-id"} for each in added]
            print_result({"fdset-id": fdset_id, "fds": fds})
        else:
            numbers = ", ".join(str(each["fd"]) for each in added)
            print_result(printable(f"fd set {fdset_id} of {arguments.to}: fd {numbers}"))
        stay_or_warn(sink, arguments.hold, "push --hold stays connected")


def _copy(
    source: BlockingClient,
    sink: BlockingClient,
    rows: list[Row],
    fdset_id: int | None,
    added: list[dict[str, Any]],
) -> None:
    """Add duplicates of the descriptors in *rows* to one fd set of *sink*.

    Args:
        source: the server that stores them.
        sink: the server to copy to.
        rows: the descriptors.
        fdset_id: the fd set; a new one if None.
        added: list to append the added descriptors to; if a reply is lost, the last entry has no
            ``fd``: *sink* may have added that descriptor or not.
    """
    for source_id, fd in rows:
        # With the name: the number may have become another descriptor's since the listing.
        where = members(fdset_id=source_id, fd=fd["fd"], opaque=fd.get("opaque"))
        opened, passed = source.request("open-fdset", where)
        new = members(fdset_id=fdset_id, opaque=opened.get("opaque"))
        added.append(new)
        try:
            info = sink.execute("add-fd", new, passed)
        except QMPError:
            added.pop()
            raise
        finally:
            close_all(passed)
        fdset_id = info["fdset-id"]
        added[-1] = {**new, "fdset-id": fdset_id, "fd": info["fd"]}


@contextmanager
def _all_or_nothing(
    arguments: argparse.Namespace, sink: BlockingClient
) -> Iterator[list[dict[str, Any]]]:
    """After an error, remove the descriptors that the block has added: over a new connection, if
    the old one may be broken.  Warn about descriptors that may be left.
    """
    before: set[tuple[int, int]] = set()
    with suppress(QMPError):  # the policy may allow to add, but not to query
        before = {(fdset_id, fd["fd"]) for fdset_id, fd in listed(sink)}
    added: list[dict[str, Any]] = []
    try:
        yield added
    except QMPError:
        _remove_copies(sink, before, added)
        raise
    except BaseException:
        sink.close()  # a QEMU serves one client at a time, and takes a moment to accept the next
        reconnect = argparse.Namespace(socket=arguments.to, timeout=arguments.timeout)
        try:
            with client_within(reconnect, _PATIENCE) as again:
                _remove_copies(again, before, added)
        except (QMPError, NoDaemon) as exc:
            if added:
                left = ", ".join(str(each["fd"]) for each in added if "fd" in each) or "the first"
                print_error(printable(f"qmpfd: fd {left} may be left in {arguments.to}: {exc}"))
        raise


def _remove_copies(
    sink: BlockingClient, before: set[tuple[int, int]], added: list[dict[str, Any]]
) -> None:
    """Remove the added descriptors; ignore errors: another client may have removed some."""
    ours = {(each["fdset-id"], each["fd"]) for each in added if "fd" in each}
    if added and "fd" not in added[-1]:
        ours |= _find_unanswered(_described(sink), before, ours, added[-1])
    for fdset_id, fd in ours:
        with suppress(QMPError):
            sink.execute("remove-fd", {"fdset-id": fdset_id, "fd": fd})


def _find_unanswered(
    rows: list[Row],
    before: set[tuple[int, int]],
    ours: set[tuple[int, int]],
    members: dict[str, Any],
) -> set[tuple[int, int]]:
    """Find the descriptor that an ``add-fd`` with these *members* has added, whose reply was lost.
    A qmpfd says which process has added a descriptor; with several candidates, warn.
    """
    me = os.getpid()
    adders = {(fdset_id, fd["fd"]): fd.get("added-by", {}).get("pid", me) for fdset_id, fd in rows}
    # Through a relay, or in a container, the server sees this process under another pid.
    pids = {me} | {adders[each] for each in ours & adders.keys()}
    found = {
        (fdset_id, fd["fd"])
        for fdset_id, fd in rows
        if (fdset_id, fd["fd"]) not in before | ours
        and fd.get("opaque") == members.get("opaque")
        and members.get("fdset-id", fdset_id) == fdset_id
    }
    if len(found) == 1 and all(adders[each] in pids for each in found):
        return found
    for fdset_id, fd in found:
        print_error(f"qmpfd: fd set {fdset_id}, fd {fd} may be left of this, or another client's")
    return set()


def _described(sink: BlockingClient) -> list[Row]:
    """List all descriptors of a server; a qmpfd's entries say which process has added each."""
    try:
        return listed(sink, long=True)
    except CommandNotFound:
        return listed(sink)
