"""``qmpfd add``: adds files, inherited descriptors and listening sockets to an fd set."""

from __future__ import annotations

import argparse
import os
from contextlib import ExitStack
from typing import Any

from ..client.blocking import BlockingClient
from ..client.calls import members
from ..kernel.fd import FileDescriptorLike
from .exit_codes import DONE, UsageError
from .forgetful import stay_connected, warn_of_forgetting
from .opening import check_open, listening_socket, open_file
from .options import Subparsers, add_client_options, add_examples, client_of, number, text
from .output import print_result

_MODES = {"r": os.O_RDONLY, "w": os.O_WRONLY, "rw": os.O_RDWR}


def add_parsers(verbs: Subparsers) -> None:
    """Add ``add`` to the command line."""
    parser = verbs.add_parser(
        "add",
        help="add files, an inherited descriptor or a listening socket to an fd set",
        description="Open each PATH and add it to an fd set; or add a new socket that listens on "
        "ADDRESS, or the inherited descriptor K. Either all PATHs are added or none.",
    )
    add_client_options(parser)
    parser.add_argument(
        "--fdset", type=number("fd set id"), metavar="N", help="the fd set (default: a new one)"
    )
    parser.add_argument(
        "--name",
        "--opaque",
        type=text,
        metavar="S",
        help="the descriptors' name (opaque text); targets find them by @S",
    )
    parser.add_argument(
        "--mode", choices=_MODES, help="open PATH for reading, writing or both (default: r)"
    )
    parser.add_argument(
        "--if-exists",
        choices=("add", "fail", "replace"),
        help="if fd set N (without --fdset: any fd set) has descriptors of this name already: "
        "add beside them, refuse, or remove the older ones in the same step (default: add)",
    )
    parser.add_argument(
        "--expires",
        type=number("number of seconds", 1),
        metavar="S",
        help="the daemon removes the descriptors after S seconds",
    )
    parser.add_argument(
        "--connection",
        action="store_true",
        help="stay connected until interrupted; the daemon removes the descriptors when the "
        "connection ends",
    )
    parser.add_argument(
        "--watch-hangup",
        action="store_true",
        help="the daemon removes the socket or pipe when its other end is closed",
    )
    parser.add_argument(
        "-q", "--quiet", action="store_true", help="print numbers only: the fd set, then the fds"
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("paths", nargs="*", default=[], metavar="PATH", help="a file to open and add")
    what.add_argument(
        "--fd",
        type=number("descriptor", most=(1 << 31) - 1),
        metavar="K",
        help="add the inherited descriptor K",
    )
    what.add_argument(
        "--listen",
        metavar="ADDRESS",
        help="add a new socket that listens on HOST:PORT, [V6]:PORT or unix:PATH",
    )
    add_examples(
        parser,
        "qmpfd add disk.img",
        "qmpfd add --mode rw --name vm1:disk --fdset 0 disk.img",
        "qmpfd add --listen 127.0.0.1:8000 --name web",
        "qmpfd add --fd 5 --name tap0 5<>/dev/net/tun",
    )
    parser.set_defaults(run=_add)


def _add(arguments: argparse.Namespace) -> int:
    if arguments.mode is not None and not arguments.paths:
        raise UsageError("--mode needs PATH: the descriptors of --fd and --listen are open already")
    if arguments.if_exists in ("fail", "replace") and arguments.name is None:
        raise UsageError("--if-exists needs --name: it compares names")
    with ExitStack() as stack:
        fds, note = _opened(arguments, stack)
        client = stack.enter_context(client_of(arguments))
        added = _execute(client, arguments, fds)
        _report(arguments, added, note)
        warn_of_forgetting(client, arguments.connection)
        if arguments.connection:
            stay_connected(client)
    return DONE


def _opened(
    arguments: argparse.Namespace, stack: ExitStack
) -> tuple[list[FileDescriptorLike], str]:
    """The descriptors to add, and what is said of them besides."""
    if arguments.fd is not None:
        check_open(arguments.fd, f" (example: qmpfd add --fd {arguments.fd} {arguments.fd}< FILE)")
        return [arguments.fd], ""
    if arguments.listen is not None:
        fd, address = listening_socket(arguments.listen)
        return [stack.enter_context(fd)], f", listening on {address}"
    flags = _MODES[arguments.mode or "r"]
    return [stack.enter_context(open_file(path, flags)) for path in arguments.paths], ""


def _execute(
    client: BlockingClient, arguments: argparse.Namespace, fds: list[FileDescriptorLike]
) -> dict[str, Any]:
    """Add the descriptors; the result, in the form of ``add-fds``."""
    where = members(fdset_id=arguments.fdset, opaque=arguments.name)
    more = members(
        if_exists=None if arguments.if_exists == "add" else arguments.if_exists,
        expires=arguments.expires,
        lifetime="connection" if arguments.connection else None,
        watch_hangup=arguments.watch_hangup or None,
    )
    if more or len(fds) > 1:
        added: dict[str, Any] = client.execute("add-fds", {**where, **more}, fds)
        return added
    info = client.execute("add-fd", where, fds)  # which a QEMU has too
    fd = members(fd=info["fd"], opaque=arguments.name)
    return {"fdset-id": info["fdset-id"], "fds": [fd]}


def _report(arguments: argparse.Namespace, added: dict[str, Any], note: str) -> None:
    fdset_id, numbers = added["fdset-id"], [fd["fd"] for fd in added["fds"]]
    if arguments.json:
        # Of one descriptor, what add-fd returns; of several, what add-fds does.
        print_result({"fdset-id": fdset_id, "fd": numbers[0]} if len(numbers) == 1 else added)
    elif arguments.quiet:
        print_result(" ".join(map(str, [fdset_id, *numbers])))
    else:
        print_result(f"fd set {fdset_id}, fd {', '.join(map(str, numbers))}{note}")
