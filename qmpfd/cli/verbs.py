"""The short verbs: add, ls, rm."""

from __future__ import annotations

import argparse
import errno
import fcntl
import os
from typing import TYPE_CHECKING, Any

from ..kernel.fd import Fd
from .exit_codes import DONE, UsageError
from .options import add_client_options, add_examples, client_of, number, text
from .output import duration, print_json, print_table, printable

if TYPE_CHECKING:
    from .options import Subparsers

#: What to do about a file that cannot be opened.
_OPEN_ADVICE = {
    errno.EACCES: "run this as somebody who may: the daemon need not be allowed to",
    errno.EISDIR: "a directory can be added with --mode r only",
    errno.ENXIO: "a socket cannot be opened by its name, nor a pipe to write that nobody reads",
}

_MODES = {"r": os.O_RDONLY, "w": os.O_WRONLY, "rw": os.O_RDWR}


def add_parsers(verbs: Subparsers) -> None:
    """Add the verbs of this module to the command line."""
    add = verbs.add_parser(
        "add",
        help="add a file, or an inherited descriptor, to an fd set",
        description="Open PATH, or take the inherited descriptor K, and add it to an fd set.",
    )
    add_client_options(add)
    add.add_argument(
        "--fdset", type=number("fd set id"), metavar="N", help="the fd set (default: a new one)"
    )
    add.add_argument(
        "--opaque", type=text, metavar="S", help="a free-form text to find the descriptor by"
    )
    add.add_argument("--mode", choices=_MODES, help="open PATH to read, write or both (default: r)")
    what = add.add_mutually_exclusive_group(required=True)
    what.add_argument("path", nargs="?", metavar="PATH", help="the file to open")
    what.add_argument(
        "--fd",
        type=number("descriptor", most=(1 << 31) - 1),
        metavar="K",
        help="an inherited descriptor",
    )
    add_examples(
        add,
        "qmpfd add disk.img",
        "qmpfd add --mode rw --opaque rdwr:disk.img --fdset 0 disk.img",
        "qmpfd add --fd 5 5<>/dev/net/tun",
    )
    add.set_defaults(run=_add)

    ls = verbs.add_parser("ls", help="list the fd sets", description="List the fd sets.")
    add_client_options(ls)
    ls.add_argument(
        "--long", "-l", action="store_true", help="show what each descriptor is, and whose"
    )
    add_examples(ls, "qmpfd ls", "qmpfd ls --long", "qmpfd ls --json | jq '.[0].fds'")
    ls.set_defaults(run=_ls)

    rm = verbs.add_parser(
        "rm",
        help="remove an fd set, or one descriptor of it",
        description="Remove all descriptors of the fd set N, or just FD, and close them.",
    )
    add_client_options(rm)
    rm.add_argument("which", type=_fdset_and_fd, metavar="N[:FD]", help="what to remove")
    add_examples(rm, "qmpfd rm 0", "qmpfd rm 0:12")
    rm.set_defaults(run=_rm)


def _fdset_and_fd(text: str) -> tuple[int, int | None]:
    fdset_id, colon, fd = text.partition(":")
    return number("fd set id")(fdset_id), number("descriptor")(fd) if colon else None


# -- add ---------------------------------------------------------------------------------------


def _add(arguments: argparse.Namespace) -> int:
    if arguments.fd is not None and arguments.mode is not None:
        raise UsageError("--mode goes with PATH: --fd K is open already")
    if arguments.fd is not None:
        check_open(arguments.fd, f" (as in: qmpfd add --fd {arguments.fd} {arguments.fd}< FILE)")
        info = _add_fd(arguments, arguments.fd)
    else:
        with open_file(arguments.path, _MODES[arguments.mode or "r"]) as fd:
            info = _add_fd(arguments, fd.fileno())
    if arguments.json:
        print_json(info)
    else:
        print(f"fd set {info['fdset-id']}, fd {info['fd']}")
    return DONE


def _add_fd(arguments: argparse.Namespace, fd: int) -> dict[str, Any]:
    members: dict[str, Any] = {}
    if arguments.fdset is not None:
        members["fdset-id"] = arguments.fdset
    if arguments.opaque is not None:
        members["opaque"] = arguments.opaque
    with client_of(arguments) as client:
        info: dict[str, Any] = client.execute("add-fd", members, [fd])
    return info


def open_file(path: str, flags: int) -> Fd:
    """Open *path* without waiting for anybody, as a FIFO would for its other end."""
    try:
        fd = Fd(os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC, 0o666))
    except OSError as exc:
        advice = _OPEN_ADVICE.get(exc.errno or 0)
        shown = path or "''"
        told = f"cannot open {shown}: {exc.strerror}" + (f" ({advice})" if advice else "")
        raise UsageError(told) from None
    except ValueError as exc:  # a null byte
        raise UsageError(f"cannot open {path!r}: {exc}") from None
    fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_NONBLOCK)
    return fd


def check_open(number_: int, advice: str = "") -> None:
    """Raises UsageError, with that advice, if that descriptor is not open here."""
    try:
        fcntl.fcntl(number_, fcntl.F_GETFD)
    except OSError:
        raise UsageError(f"descriptor {number_} is not open here{advice}") from None


# -- ls, rm ------------------------------------------------------------------------------------


def _ls(arguments: argparse.Namespace) -> int:
    if arguments.long:
        return _ls_long(arguments)
    with client_of(arguments) as client:
        sets = client.execute("query-fdsets")
    if arguments.json:
        print_json(sets)
    elif not sets:
        print("no fd sets")
    else:
        rows = [
            (str(fdset["fdset-id"]), str(fd["fd"]), printable(fd.get("opaque", "")))
            for fdset in sets
            for fd in fdset["fds"]
        ]
        print_table(("FDSET", "FD", "OPAQUE"), rows)
    return DONE


def _ls_long(arguments: argparse.Namespace) -> int:
    with client_of(arguments) as client:
        fds = client.execute("query-fds")
    if arguments.json:
        print_json(fds)
    elif not fds:
        print("no fd sets")
    else:
        header = ("FDSET", "FD", "ACCESS", "KIND", "AGE", "KEPT", "PID", "UID", "OPAQUE", "TARGET")
        print_table(header, [_long_row(fd) for fd in fds])
    return DONE


def _long_row(fd: dict[str, Any]) -> tuple[str, ...]:
    kept = [fd["lifetime"]] if fd["lifetime"] != "daemon" else []
    if "expires" in fd:
        kept.append(duration(fd["expires"]))
    if fd["watch-hangup"]:
        kept.append("hangup")
    added_by = fd.get("added-by", {})
    return (
        str(fd["fdset-id"]),
        str(fd["fd"]),
        fd["access"],
        fd["kind"],
        duration(fd["age"]),
        ",".join(kept) or "-",
        str(added_by.get("pid", "-")),
        str(added_by.get("uid", "-")),
        printable(fd.get("opaque", "")) or "-",
        printable(fd["target"]),
    )


def _rm(arguments: argparse.Namespace) -> int:
    fdset_id, fd = arguments.which
    members = {"fdset-id": fdset_id}
    if fd is not None:
        members["fd"] = fd
    with client_of(arguments) as client:
        result = client.execute("remove-fd", members)
    if arguments.json:
        print_json(result)
    else:
        print(f"removed fd set {fdset_id}" + ("" if fd is None else f", fd {fd}"))
    return DONE
