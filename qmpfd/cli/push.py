"""``qmpfd push``: copies stored descriptors to another QMP server."""

from __future__ import annotations

import argparse
from contextlib import suppress
from typing import Any

from ..client.blocking import BlockingClient
from ..errors import FdNotFound, QMPError
from ..kernel.fd import close_all
from .exit_codes import DONE, UsageError
from .forgetful import stay_connected, warn_of_forgetting
from .options import Subparsers, add_client_options, add_examples, client_of, number, socket_path
from .output import print_result
from .targets import Row, Target, listed, open_target, select, target


def add_parsers(verbs: Subparsers) -> None:
    """Add ``push`` to the command line."""
    parser = verbs.add_parser(
        "push",
        help="copy stored descriptors to another QMP server, such as a QEMU",
        description="Copy all descriptors that TARGET names to one fd set of another QMP "
        "server, a qmpfd or a QEMU. Either all of them are copied or none.",
    )
    add_client_options(parser)
    parser.add_argument(
        "target", type=target, metavar="TARGET", help="SET[/FD][:ACCESS] or @NAME[:ACCESS]"
    )
    parser.add_argument(
        "--to",
        type=socket_path,
        required=True,
        metavar="QMP_SOCKET",
        help="the other server's socket",
    )
    parser.add_argument(
        "--fdset",
        dest="to_fdset",
        type=number("fd set id"),
        metavar="M",
        help="the fd set of the other server (default: a new one)",
    )
    parser.add_argument(
        "--hold",
        action="store_true",
        help="stay connected to the other server until interrupted; QEMU up to 9.0 closes "
        "descriptors that it does not use when its last QMP client disconnects",
    )
    add_examples(
        parser,
        "qmpfd push 0 --to /run/vm1/qmp.sock",
        "qmpfd push @vm1:disk:rw --to /run/vm1/qmp.sock --fdset 3",
        status="  0 done, 1 one of the two servers refused, 2 usage, 3 one of the two does not run",
    )
    parser.set_defaults(run=_push)


def _push(arguments: argparse.Namespace) -> int:
    wanted: Target = arguments.target
    if wanted.at is not None:
        raise UsageError(
            f"{wanted.word!r}: push takes no =AT (--fdset names the fd set of the other server)"
        )
    with (
        client_of(arguments) as source,
        BlockingClient(arguments.to, arguments.timeout) as sink,
    ):
        rows, missing = select([wanted], _stored(source, wanted))
        if missing:
            _, fds = open_target(source, wanted)  # is refused, in the daemon's words
            close_all(fds)
            raise FdNotFound(f"no such descriptor: {wanted.word}")
        added = _copy(source, sink, rows, arguments.to_fdset)
        fdset_id = added[0]["fdset-id"]
        if arguments.json:
            fds = [{k: v for k, v in each.items() if k != "fdset-id"} for each in added]
            print_result({"fdset-id": fdset_id, "fds": fds})
        else:
            numbers = ", ".join(str(each["fd"]) for each in added)
            print_result(f"fd set {fdset_id} of {arguments.to}: fd {numbers}")
        warn_of_forgetting(sink, arguments.hold, "push --hold stays connected")
        if arguments.hold:
            stay_connected(sink)
    return DONE


def _stored(source: BlockingClient, wanted: Target) -> list[Row]:
    """All that is stored, each with its fd set; with its access mode where that matters."""
    if wanted.access is None:
        return listed(source)
    fds = [(fd["fdset-id"], fd) for fd in source.execute("query-fds")]
    return fds[::-1]  # the oldest first, as query-fdsets has them


def _copy(
    source: BlockingClient, sink: BlockingClient, rows: list[Row], fdset_id: int | None
) -> list[dict[str, Any]]:
    """Add duplicates of the rows to one fd set of *sink*; what was added, or nothing was."""
    added: list[dict[str, Any]] = []
    try:
        for source_id, fd in rows:
            where = {"fdset-id": source_id, "fd": fd["fd"]}
            opened, passed = source.request("open-fdset", where)
            members = {"opaque": opened["opaque"]} if "opaque" in opened else {}
            if fdset_id is not None:
                members["fdset-id"] = fdset_id
            try:
                info = sink.execute("add-fd", members, passed)
            finally:
                close_all(passed)
            fdset_id = info["fdset-id"]
            added.append({**members, **info})
    except BaseException:
        for each in added:
            with suppress(QMPError, OSError):  # whoever else removed it meanwhile has done so
                sink.execute("remove-fd", {"fdset-id": each["fdset-id"], "fd": each["fd"]})
        raise
    return added
