"""``qmpfd add``: files, inherited descriptors and listening sockets go into a fd set."""

from __future__ import annotations

import argparse
import os
from contextlib import ExitStack
from typing import Any

from ..client.blocking import BlockingClient
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
        help="add files, an inherited descriptor or a listening socket to a fd set",
        description="Open each PATH, take the inherited descriptor K, or listen on ADDRESS, and "
        "add what that gives to a fd set: all of it, or nothing.",
    )
    add_client_options(parser)
    parser.add_argument(
        "--fdset", type=number("fd set id"), metavar="N", help="the fd set (default: a new one)"
    )
    parser.add_argument(
        "--name", "--opaque", type=text, metavar="S", help="the name (opaque text) to find it by"
    )
    parser.add_argument(
        "--mode", choices=_MODES, help="open PATH to read, write or both (default: r)"
    )
    parser.add_argument(
        "--if-exists",
        choices=("add", "fail", "replace"),
        help="where there are descriptors of this name already (in fd set N, or anywhere): add "
        "beside them, refuse, or remove the older ones in the same step (default: add)",
    )
    parser.add_argument(
        "--expires",
        type=number("number of seconds", 1),
        metavar="S",
        help="remove it after S seconds",
    )
    parser.add_argument(
        "--connection",
        action="store_true",
        help="remove it when this command ends; it stays connected until it is interrupted",
    )
    parser.add_argument(
        "--watch-hangup",
        action="store_true",
        help="remove it when the other end of the socket or pipe is gone",
    )
    parser.add_argument(
        "-q", "--quiet", action="store_true", help="print the numbers alone: the fd set, the fds"
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("paths", nargs="*", default=[], metavar="PATH", help="the files to open")
    what.add_argument(
        "--fd",
        type=number("descriptor", most=(1 << 31) - 1),
        metavar="K",
        help="an inherited descriptor",
    )
    what.add_argument(
        "--listen",
        metavar="ADDRESS",
        help="make a socket that listens on HOST:PORT, [V6]:PORT or unix:PATH",
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
        raise UsageError("--mode goes with PATH: what --fd and --listen add is open already")
    if arguments.if_exists in ("fail", "replace") and arguments.name is None:
        raise UsageError("--if-exists goes with --name: it is about descriptors of the same name")
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
        check_open(arguments.fd, f" (as in: qmpfd add --fd {arguments.fd} {arguments.fd}< FILE)")
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
    members: dict[str, Any] = {}
    if arguments.fdset is not None:
        members["fdset-id"] = arguments.fdset
    if arguments.name is not None:
        members["opaque"] = arguments.name
    more: dict[str, Any] = {}
    if arguments.if_exists in ("fail", "replace"):
        more["if-exists"] = arguments.if_exists
    if arguments.expires is not None:
        more["expires"] = arguments.expires
    if arguments.connection:
        more["lifetime"] = "connection"
    if arguments.watch_hangup:
        more["watch-hangup"] = True
    if more or len(fds) > 1:
        added: dict[str, Any] = client.execute("add-fds", {**members, **more}, fds)
        return added
    info = client.execute("add-fd", members, fds)  # which a QEMU has too
    fd = {"fd": info["fd"]} | ({"opaque": arguments.name} if arguments.name is not None else {})
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
