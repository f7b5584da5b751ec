"""The options of ``qmpfd serve``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ..limits import Limits
from .options import bounded, number, seconds, socket_path
from .options import text as json_text
from .policy import group_id

_DEFAULTS = Limits()
_connections, _descriptors = number("number of connections", 1), number("number of descriptors", 1)

#: The fields of :class:`Limits`: the type of the option's value, and its help.
_LIMITS: dict[str, tuple[Callable[[str], float], str]] = {
    "max_connections": (_connections, "connections at a time"),
    "max_connections_per_uid": (_connections, "connections of one user at a time"),
    "max_fds": (
        _descriptors,
        (
            "stored descriptors at a time; some of the process's open files (the hard limit of "
            "ulimit -n) stay free for connections"
        ),
    ),
    "max_fds_per_uid": (
        _descriptors,
        (
            "stored descriptors of one user at a time; for users other than root and the daemon's "
            "own, never more than half of these open files"
        ),
    ),
    "max_request_bytes": (
        number("number of bytes", 1024, 64 << 20),
        "the size of one request at most, in bytes",
    ),
    "idle_timeout": (
        seconds,
        "disconnect a client that sends no request for S seconds, unless it watches fd sets",
    ),
    "write_timeout": (seconds, "disconnect a client that reads no reply for S seconds"),
    "drain_timeout": (seconds, "after SIGTERM, stop within S seconds"),
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


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``serve``."""
    parser.add_argument(
        "--socket",
        type=lambda text: Path(socket_path(text)),
        action="append",
        metavar="PATH",
        help="listen on this socket; may be given more than once (default: $QMPFD_SOCKET, else "
        "$XDG_RUNTIME_DIR/qmpfd.sock, else /run/qmpfd.sock)",
    )
    taking_over = parser.add_mutually_exclusive_group()
    taking_over.add_argument(
        "--takeover",
        action="store_true",
        help="take over from the daemon that serves the (first) socket: its fd sets, with the "
        "same numbers, its sockets and its connections; no client loses a request or a reply; "
        "this command line replaces the old one",
    )
    taking_over.add_argument(
        "--replace",
        action="store_true",
        help="as --takeover if a daemon serves the (first) socket; otherwise, start",
    )
    parser.add_argument(
        "--supervise",
        action="store_true",
        help="run the daemon under a small parent process, which has a duplicate of each stored "
        "descriptor and restarts the daemon with all of them after a crash; not needed under "
        "systemd with FileDescriptorStoreMax=, which does the same",
    )
    parser.add_argument(
        "--socket-mode",
        type=bounded(lambda text: int(text, 8), 0, 0o777, " is not a mode: octal, 0 to 777"),
        default=0o600,
        metavar="OCTAL",
        help="permissions of the socket files (default: 600)",
    )
    parser.add_argument(
        "--socket-group",
        type=group_id,
        metavar="NAME",
        help="group of the socket files (default: the daemon's own)",
    )
    parser.add_argument(
        "--policy",
        type=Path,
        metavar="FILE",
        help="the policy file: which other users may connect, and their rights; SIGHUP reads it "
        "again (default: only root and the daemon's own user may connect)",
    )
    parser.add_argument(
        "--dialect",
        choices=("spec", "qemu"),
        default="spec",
        help="what the daemon follows where they differ: the published specification of QEMU's "
        "commands, or today's QEMU (default: spec)",
    )
    parser.add_argument(
        "--add-fd",
        type=_inherited_fd,
        action="append",
        default=[],
        metavar="fd=N,set=ID[,opaque=S]",
        help="add the inherited descriptor N to fd set ID before the first client is served; "
        "may be given more than once",
    )
    parser.add_argument(
        "--ready-fd",
        type=_inherited,
        metavar="N",
        help="when clients can connect, write a newline to the inherited descriptor N and close "
        "it; s6 waits for this if the service has a file notification-fd",
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
        help="write metrics to PATH every 10 s, as OpenMetrics text; PATH must be new or a "
        "regular file (default: no metrics)",
    )
    parser.add_argument(
        "--audit",
        type=Path,
        metavar="PATH|-",
        help="append a JSON line to PATH (-: standard output) for each descriptor that is "
        "added, removed or sent to a client, and for each refusal (default: no audit trail)",
    )
    parser.add_argument(
        "--log-format",
        choices=("text", "json"),
        default="text",
        help="format of the log on standard error (default: text)",
    )
    parser.add_argument(
        "--log-level",
        choices=("debug", "info", "warning", "error"),
        default="info",
        help="log level; debug logs every command (default: info)",
    )


def limits(arguments: argparse.Namespace) -> Limits:
    """The limits that a command line sets."""
    return Limits(**{name: getattr(arguments, name) for name in _LIMITS})
