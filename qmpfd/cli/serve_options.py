"""The options of ``qmpfd serve``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ..limits import Limits
from .options import number, seconds, socket_path
from .options import text as json_text
from .policy import group_id

_DEFAULTS = Limits()
_connections, _descriptors = number("number of connections", 1), number("number of descriptors", 1)

#: The fields of :class:`Limits`: the type of the option's value, and its help.
_LIMITS: dict[str, tuple[Callable[[str], float], str]] = {
    "max_connections": (_connections, "clients at a time"),
    "max_connections_per_uid": (_connections, "clients of one user at a time"),
    "max_fds": (
        _descriptors,
        (
            "descriptors kept at a time; some of the open files that the process may have, its "
            "hard limit, are never taken"
        ),
    ),
    "max_fds_per_uid": (
        _descriptors,
        (
            "descriptors that clients of one user may have kept at a time; for others than root "
            "and the daemon's own user never more than half of those open files"
        ),
    ),
    "max_request_bytes": (number("number of bytes", 1024, 64 << 20), "bytes of one request"),
    "idle_timeout": (
        seconds,
        "cut off a client that asks nothing for S seconds, unless it watches",
    ),
    "write_timeout": (seconds, "cut off a client that takes no replies for S seconds"),
    "drain_timeout": (seconds, "end within S seconds when told to"),
}
_inherited = number("fd (0 to 2 are the standard streams)", 3, (1 << 31) - 1)


class InheritedFd(NamedTuple):
    """One ``--add-fd``."""

    fd: int
    fdset_id: int
    opaque: str | None


def _inherited_fd(text: str) -> InheritedFd:
    """QEMU's ``-add-fd``: ``fd=N,set=ID[,opaque=S]``, where ``,,`` in S is a comma."""
    values: dict[str, str] = {}
    for part in text.replace(",,", "\0").split(","):
        key, equals, value = part.replace("\0", ",").partition("=")
        if not equals or key not in ("fd", "set", "opaque") or key in values:
            raise argparse.ArgumentTypeError(f"{text!r} is not fd=N,set=ID[,opaque=S]")
        values[key] = value
    for key in ("fd", "set"):
        if key not in values:
            raise argparse.ArgumentTypeError(f"{text!r} lacks {key}=")
    return InheritedFd(
        _inherited(values["fd"]),
        number("set", 0, (1 << 63) - 1)(values["set"]),
        None if "opaque" not in values else json_text(values["opaque"]),
    )


def _octal(text: str) -> int:
    try:
        mode = int(text, 8)
    except ValueError:
        mode = -1
    if not 0 <= mode <= 0o777:
        raise argparse.ArgumentTypeError(f"{text!r} is no mode: octal, 0 to 777")
    return mode


def _group_name(text: str) -> str:
    group_id(text)
    return text


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``serve``."""
    parser.add_argument(
        "--socket",
        type=lambda text: Path(socket_path(text)),
        action="append",
        metavar="PATH",
        help="listen here; may be given more than once (default: $QMPFD_SOCKET, else "
        "$XDG_RUNTIME_DIR/qmpfd.sock, else /run/qmpfd.sock)",
    )
    taking_over = parser.add_mutually_exclusive_group()
    taking_over.add_argument(
        "--takeover",
        action="store_true",
        help="take over from the daemon that serves the (first) socket: all it holds, under the "
        "same numbers, and its connections; nobody notices, and this command line is in force",
    )
    taking_over.add_argument(
        "--replace",
        action="store_true",
        help="start; where a daemon serves the (first) socket already, take over from it",
    )
    parser.add_argument(
        "--supervise",
        action="store_true",
        help="have a small parent that keeps a duplicate of every descriptor and starts the daemon "
        "again when it dies, with all it had; not needed under systemd with "
        "FileDescriptorStoreMax=, which does the same",
    )
    parser.add_argument(
        "--socket-mode",
        type=_octal,
        default=0o600,
        metavar="OCTAL",
        help="permissions of the socket files (default: 600)",
    )
    parser.add_argument(
        "--socket-group",
        type=_group_name,
        metavar="NAME",
        help="group of the socket files (default: the daemon's own)",
    )
    parser.add_argument(
        "--policy",
        type=Path,
        metavar="FILE",
        help="who else may connect, and do what; read again on SIGHUP (default: root and the "
        "daemon's own user alone, with all rights)",
    )
    parser.add_argument(
        "--dialect",
        choices=("spec", "qemu"),
        default="spec",
        help="answer as the commands' specification has it, or as today's QEMU (default: spec)",
    )
    parser.add_argument(
        "--add-fd",
        type=_inherited_fd,
        action="append",
        default=[],
        metavar="fd=N,set=ID[,opaque=S]",
        help="start with the inherited descriptor N in the fd set ID; may be given more than once",
    )
    parser.add_argument(
        "--ready-fd",
        type=_inherited,
        metavar="N",
        help="write a newline to the inherited descriptor N, and close it, once clients can "
        "connect: what s6 expects of a service with a file notification-fd",
    )
    for name, (kind, told) in _LIMITS.items():
        default = getattr(_DEFAULTS, name)
        shown = "never" if default is None else f"{default:.16g}"
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=kind,
            default=default,
            metavar="S" if kind is seconds else "N",
            help=f"{told} (default: {shown})",
        )
    parser.add_argument(
        "--metrics",
        type=Path,
        metavar="PATH",
        help="write counters to this file as OpenMetrics text, every 10 s; what is there and no "
        "ordinary file stays as it is (default: do not)",
    )
    parser.add_argument(
        "--audit",
        type=Path,
        metavar="PATH|-",
        help="append a line of JSON to this file, or write it to standard output, for each "
        "descriptor that is added, removed or handed out, and for each refusal (default: do not)",
    )
    parser.add_argument(
        "--log-format",
        choices=("text", "json"),
        default="text",
        help="how to say it on standard error (default: text)",
    )
    parser.add_argument(
        "--log-level",
        choices=("debug", "info", "warning", "error"),
        default="info",
        help="how much to say there; debug names every command (default: info)",
    )


def limits(arguments: argparse.Namespace) -> Limits:
    """The limits that a command line sets."""
    return Limits(**{name: getattr(arguments, name) for name in _LIMITS})
