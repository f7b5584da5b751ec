"""``qmpfd add``: adds files, inherited descriptors and listening sockets to an fd set."""

from __future__ import annotations

import argparse
import os
from contextlib import ExitStack
from typing import Any

from ..client.blocking import BlockingClient
from ..client.calls import members
from ..kernel.fd import FileDescriptorLike
from ..limits import SCM_MAX_FD
from .exit_codes import UsageError
from .forgetful import stay_or_warn
from .opening import check_open, listening_socket, open_file
from .options import CONNECTION, JSON, client_of, number, one_of, option, text
from .output import print_result, printable

_MODES = {"r": os.O_RDONLY, "w": os.O_WRONLY, "rw": os.O_RDWR}

SUMMARY = "add files, an inherited descriptor or a listening socket to an fd set"
DESCRIPTION = (
    "Open each PATH and add it to an fd set; or add a new socket that listens on "
    "ADDRESS, or the inherited descriptor K. Either all PATHs are added or none."
)
EXAMPLES = [
    "qmpfd add disk.img",
    "qmpfd add --mode rw --name vm1:disk --fdset 0 disk.img",
    "qmpfd add --listen 127.0.0.1:8000 --name web",
    "qmpfd add --fd 5 --name tap0 5<>/dev/net/tun",
]
OPTIONS = [
    *CONNECTION,
    JSON,
    option("--fdset N", "the fd set (default: a new one)", number("fd set id")),
    option(
        "--name --opaque S", "the descriptors' name (opaque text); targets find them by @S", text
    ),
    option("--mode", "open PATH for reading, writing or both (default: r)", choices=_MODES),
    option(
        "--if-exists",
        "if fd set N (without --fdset: any fd set) has descriptors of this name already: "
        "add beside them, refuse, or remove the older ones in the same step (default: add)",
        choices=("add", "fail", "replace"),
    ),
    option(
        "--expires S",
        "the daemon removes the descriptors after S seconds",
        number("number of seconds", 1),
    ),
    option(
        "--connection",
        "stay connected until interrupted; the daemon removes the descriptors when the "
        "connection ends",
    ),
    option("--watch-hangup", "the daemon removes the socket or pipe when its other end is closed"),
    option("-q --quiet", "print numbers only: the fd set, then the fds"),
    one_of(
        option("paths", "a file to open and add", nargs="*", default=[], metavar="PATH"),
        option(
            "--fd K", "add the inherited descriptor K", number("descriptor", most=(1 << 31) - 1)
        ),
        option(
            "--listen ADDRESS",
            "add a new socket that listens on HOST:PORT, [V6]:PORT or unix:PATH",
        ),
        required=True,
    ),
]


def run(arguments: argparse.Namespace) -> None:
    if arguments.mode is not None and not arguments.paths:
        raise UsageError("--mode needs PATH: the descriptors of --fd and --listen are open already")
    if len(arguments.paths) > SCM_MAX_FD:
        raise UsageError(f"add takes at most {SCM_MAX_FD} PATHs: all are added or none")
    if arguments.if_exists in ("fail", "replace") and arguments.name is None:
        raise UsageError("--if-exists needs --name: it compares names")
    with ExitStack() as stack:
        fds, note = _opened(arguments, stack)
        client = stack.enter_context(client_of(arguments))
        added = _execute(client, arguments, fds)
        _report(arguments, added, note)
        advice = "keep another QMP client connected until QEMU uses it"
        stay_or_warn(client, arguments.connection, advice)


def _opened(
    arguments: argparse.Namespace, stack: ExitStack
) -> tuple[list[FileDescriptorLike], str]:
    """Open the descriptors to add; return them, and a note to append to the result."""
    if arguments.fd is not None:
        check_open(arguments.fd, f" (example: qmpfd add --fd {arguments.fd} {arguments.fd}< FILE)")
        return [arguments.fd], ""
    if arguments.listen is not None:
        fd, address = stack.enter_context(listening_socket(arguments.listen))
        return [fd], f", listening on {address}"
    flags = _MODES[arguments.mode or "r"]
    return [stack.enter_context(open_file(path, flags)) for path in arguments.paths], ""


def _execute(
    client: BlockingClient, arguments: argparse.Namespace, fds: list[FileDescriptorLike]
) -> dict[str, Any]:
    """Add the descriptors; return the result in the form of ``add-fds``."""
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
    info = client.execute("add-fd", where, fds)  # not add-fds, which QEMU lacks
    fd = members(fd=info["fd"], opaque=arguments.name)
    return {"fdset-id": info["fdset-id"], "fds": [fd]}


def _report(arguments: argparse.Namespace, added: dict[str, Any], note: str) -> None:
    fdset_id, numbers = added["fdset-id"], [fd["fd"] for fd in added["fds"]]
    if arguments.json:
        # The members of an add-fd reply for one descriptor, of an add-fds reply for several.
        print_result({"fdset-id": fdset_id, "fd": numbers[0]} if len(numbers) == 1 else added)
    elif arguments.quiet:
        print_result(" ".join(map(str, [fdset_id, *numbers])))
    else:
        print_result(printable(f"fd set {fdset_id}, fd {', '.join(map(str, numbers))}{note}"))
