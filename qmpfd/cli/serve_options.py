"""The options of ``qmpfd serve``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ..limits import Limits
from .check_policy import file_path, group_id
from .options import Option, bounded, number, one_of, option, seconds, socket_path
from .options import text as json_text

_DEFAULTS = Limits()._asdict()
_connections, _descriptors = number("number of connections", 1), number("number of descriptors", 1)
_inherited = number("fd (0 to 2 are the standard streams)", 3, (1 << 31) - 1)


class InitialFd(NamedTuple):
    """Value of one ``--add-fd``."""

    fd: int
    fdset_id: int
    opaque: str | None


def _inherited_fd(text: str) -> InitialFd:
    """Parse a value of ``--add-fd`` as QEMU does: ``fd=N,set=ID[,opaque=S]``, ``,,`` is a comma."""
    values: dict[str, str] = {}
    for part in text.replace(",,", "\0").split(","):
        key, equals, value = part.replace("\0", ",").partition("=")
        if not equals or key not in ("fd", "set", "opaque") or key in values:
            raise argparse.ArgumentTypeError(f"{text!r} is not fd=N,set=ID[,opaque=S]")
        values[key] = value
    for key in ("fd", "set"):
        if key not in values:
            raise argparse.ArgumentTypeError(f"{text!r} lacks {key}=")
    return InitialFd(
        _inherited(values["fd"]),
        number("set", 0, (1 << 63) - 1)(values["set"]),
        None if "opaque" not in values else json_text(values["opaque"]),
    )


def _limit(usage: str, help_text: str, kind: Callable[[str], float]) -> Option:
    """Define an option for a field of :class:`Limits`."""
    default = _DEFAULTS[usage.partition(" ")[0].removeprefix("--").replace("-", "_")]
    shown = "never" if default is None else f"{default:.16g}"
    return option(usage, f"{help_text} (default: {shown})", kind, default=default)


OPTIONS = [
    option(
        "--socket PATH",
        "listen on this socket; may be given more than once (default: $QMPFD_SOCKET, else "
        "$XDG_RUNTIME_DIR/qmpfd.sock, else /run/qmpfd.sock)",
        lambda text: Path(socket_path(text)),
        action="append",
    ),
    one_of(
        option(
            "--takeover",
            "take over from the daemon that serves the (first) socket: its fd sets, with the "
            "same numbers, its sockets and its connections; no client loses a request or a "
            "reply; this command line replaces the old one",
        ),
        option(
            "--replace", "as --takeover if a daemon serves the (first) socket; otherwise, start"
        ),
    ),
    option(
        "--supervise",
        "run the daemon under a small parent process, which has a duplicate of each stored "
        "descriptor and restarts the daemon with all of them after a crash; not needed under "
        "systemd with FileDescriptorStoreMax=, which does the same",
    ),
    option(
        "--socket-mode OCTAL",
        "permissions of the socket files (default: 600)",
        bounded(lambda text: int(text, 8), 0, 0o777, " is not a mode: octal, 0 to 777"),
        default=0o600,
    ),
    option(
        "--socket-group NAME", "group of the socket files (default: the daemon's own)", group_id
    ),
    option(
        "--policy FILE",
        "the policy file: which other users may connect, and their rights; SIGHUP reads it "
        "again (default: only root and the daemon's own user may connect)",
        file_path,
    ),
    option(
        "--dialect",
        "what the daemon follows where they differ: the published specification of QEMU's "
        "commands, or today's QEMU (default: spec)",
        choices=("spec", "qemu"),
        default="spec",
    ),
    option(
        "--add-fd fd=N,set=ID[,opaque=S]",
        "add the inherited descriptor N to fd set ID before the first client is served; "
        "may be given more than once",
        _inherited_fd,
        action="append",
        default=[],
    ),
    option(
        "--ready-fd N",
        "when clients can connect, write a newline to the inherited descriptor N and close "
        "it; s6 waits for this if the service has a file notification-fd",
        _inherited,
    ),
    _limit(
        "--max-connections N",
        "connections at a time; a sixteenth is left for root and the daemon's own user",
        _connections,
    ),
    _limit("--max-connections-per-uid N", "connections of one user at a time", _connections),
    _limit(
        "--max-fds N",
        "stored descriptors at a time; a sixteenth is left for root and the daemon's own user, and "
        "some of the process's open files (the hard limit of ulimit -n) for connections",
        _descriptors,
    ),
    _limit(
        "--max-fds-per-uid N",
        "stored descriptors of one user at a time; for users other than root and the daemon's "
        "own, never more than half of these open files",
        _descriptors,
    ),
    _limit(
        "--max-request-bytes N",
        "the size of one request at most, in bytes",
        number("number of bytes", 1024, 64 << 20),
    ),
    _limit(
        "--idle-timeout S",
        "disconnect a client that sends no request for S seconds, unless it watches fd sets",
        seconds,
    ),
    _limit("--write-timeout S", "disconnect a client that reads no reply for S seconds", seconds),
    _limit("--drain-timeout S", "after SIGTERM, stop within S seconds", seconds),
    option(
        "--metrics PATH",
        "write metrics to PATH every 10 s, as OpenMetrics text; PATH must be new or a "
        "regular file (default: no metrics)",
        file_path,
    ),
    option(
        "--audit PATH|-",
        "append a JSON line to PATH (-: standard output) for each descriptor that is "
        "added, removed or sent to a client, and for each refusal (default: no audit trail)",
        file_path,
    ),
    option(
        "--log-format",
        "format of the log on standard error (default: text)",
        choices=("text", "json"),
        default="text",
    ),
    option(
        "--log-level",
        "log level; debug logs every command (default: info)",
        choices=("debug", "info", "warning", "error"),
        default="info",
    ),
]


def limits(arguments: argparse.Namespace) -> Limits:
    """Return the limits that a command line sets."""
    return Limits(*(getattr(arguments, name) for name in Limits._fields))
