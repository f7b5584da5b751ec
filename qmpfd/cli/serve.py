"""``qmpfd serve``: the daemon as a process."""

from __future__ import annotations

import argparse
import errno
import os
import resource
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from ..client.blocking import NoDaemon
from ..errors import QMPError
from ..kernel.fd import Fd, close_all
from ..kernel.systemd import InheritedFd as Passed
from ..kernel.systemd import take_listen_fds, take_parent, take_store_size
from ..kernel.unix_address import listens
from ..limits import MAX_REQUEST_BYTES, Limits
from . import supervise as keeping
from .exit_codes import DONE, UsageError
from .options import add_examples, default_socket, number, seconds, socket_path
from .options import text as json_text
from .policy import group_id, read_policy

if TYPE_CHECKING:
    from ..server.renumber import Movable
    from .options import Subparsers

_DEFAULTS = Limits()

#: What to do where a socket cannot be made.
_ADVICE = {
    errno.EADDRINUSE: "qmpfd status shows it; --replace takes over from it; ",
    errno.ENOENT: "make its folder first; ",
}


def add_parsers(verbs: Subparsers) -> None:
    """Add ``serve`` to the command line."""
    parser = verbs.add_parser(
        "serve",
        help="run the daemon",
        description="Hold file descriptors for the clients of a Unix socket, over QMP. "
        "SIGTERM and SIGINT end it once what was asked is answered; a second one at once.",
    )
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
        type=group_id,
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
        type=number("fd (0 to 2 are the standard streams)", 3, (1 << 31) - 1),
        metavar="N",
        help="write a newline to the inherited descriptor N, and close it, once clients can "
        "connect: what s6 expects of a service with a file notification-fd",
    )
    parser.add_argument(
        "--max-connections",
        type=number("number of connections", 1),
        default=_DEFAULTS.max_connections,
        metavar="N",
        help=f"clients at a time (default: {_DEFAULTS.max_connections})",
    )
    parser.add_argument(
        "--max-connections-per-uid",
        type=number("number of connections", 1),
        default=_DEFAULTS.max_connections_per_uid,
        metavar="N",
        help=f"clients of one user at a time (default: {_DEFAULTS.max_connections_per_uid})",
    )
    parser.add_argument(
        "--max-fds",
        type=number("number of descriptors", 1),
        default=_DEFAULTS.max_fds,
        metavar="N",
        help="descriptors kept at a time; some of the open files that the process may have, its "
        f"hard limit, are never taken (default: {_DEFAULTS.max_fds})",
    )
    parser.add_argument(
        "--max-fds-per-uid",
        type=number("number of descriptors", 1),
        default=_DEFAULTS.max_fds_per_uid,
        metavar="N",
        help="descriptors that clients of one user may have kept at a time; for others than root "
        "and the daemon's own user never more than half of those open files "
        f"(default: {_DEFAULTS.max_fds_per_uid})",
    )
    parser.add_argument(
        "--max-request-bytes",
        type=number("number of bytes", 1024, 64 << 20),
        default=MAX_REQUEST_BYTES,
        metavar="N",
        help=f"bytes of one request (default: {MAX_REQUEST_BYTES})",
    )
    parser.add_argument(
        "--idle-timeout",
        type=seconds,
        metavar="S",
        help="cut off a client that asks nothing for S seconds, unless it watches (default: never)",
    )
    parser.add_argument(
        "--write-timeout",
        type=seconds,
        default=_DEFAULTS.write_timeout,
        metavar="S",
        help="cut off a client that takes no replies for S seconds "
        f"(default: {_DEFAULTS.write_timeout:g})",
    )
    parser.add_argument(
        "--drain-timeout",
        type=seconds,
        default=_DEFAULTS.drain_timeout,
        metavar="S",
        help=f"end within S seconds when told to (default: {_DEFAULTS.drain_timeout:g})",
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
    add_examples(
        parser,
        "qmpfd serve",
        "qmpfd serve --socket /run/qmpfd.sock --policy /etc/qmpfd.toml",
        "qmpfd serve --supervise",
        "qmpfd serve --dialect qemu --add-fd fd=3,set=0,opaque=disk 3<>disk.img",
        status="  0 ended as told, 2 it cannot start; with --takeover: 1 the old daemon refused,\n"
        "  3 there is none to take over from",
    )
    parser.set_defaults(run=_serve)


#: A descriptor to start with, the fd set that it goes into (None: a new one), and its opaque text.
_Initial: TypeAlias = "tuple[Fd, int | None, str | None]"


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
        number("fd (0 to 2 are the standard streams)", 3, (1 << 31) - 1)(values["fd"]),
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


def _take_inherited(
    options: list[InheritedFd],
) -> tuple[list[_Initial], list[int]]:
    """Duplicates of the descriptors that the options name, whose originals are closed; and the
    numbers that were not passed to this process.
    """
    taken: list[_Initial] = []
    missing = []
    for option in options:
        if _was_inherited(option.fd):
            taken.append((Fd(os.dup(option.fd)), option.fdset_id, option.opaque))
        else:
            missing.append(option.fd)
    for number_ in {option.fd for option in options} - set(missing):
        Fd(number_).close()
    return taken, missing


def _sort_passed(passed: list[Passed]) -> tuple[list[Passed], list[_Initial]]:
    """What a service manager has passed: sockets to listen on; and what goes into fd sets of its
    own, each under its name (``OpenFile=``, or a ``.socket`` unit of another kind).
    """
    listeners = [given for given in passed if listens(given.fd)]
    others = [(given.fd, None, given.name) for given in passed if not listens(given.fd)]
    return listeners, [*others]


def _was_inherited(number_: int) -> bool:
    """Whether a descriptor is there that this process has not opened itself (PEP 446)."""
    try:
        return os.get_inheritable(number_)
    except OSError:
        return False


def leaf_exceptions(group: BaseExceptionGroup[BaseException]) -> Iterator[BaseException]:
    """The exceptions in *group*, and in the groups in it."""
    for exc in group.exceptions:
        if isinstance(exc, BaseExceptionGroup):
            yield from leaf_exceptions(exc)
        else:
            yield exc


def _fill_standard_streams() -> None:
    """Have something at 0 to 2, so that no socket is there, and what is said goes into it."""
    filling = True
    while filling:
        fd = Fd(os.open(os.devnull, os.O_RDWR))
        filling = fd.fileno() <= 2
        if filling:
            fd.detach()
        else:
            fd.close()


def _inherited_strays() -> list[Fd]:
    """Inherited descriptors that nothing here knows, such as a shell's of the script that started
    us: they may get other numbers.  Not if the command line has a path like /dev/fd/9.
    """
    if any("/fd/" in word for word in sys.argv):
        return []
    try:
        numbers = [int(name) for name in os.listdir("/proc/self/fd")]
    except OSError:
        return []
    return [Fd(number_) for number_ in numbers if number_ > 2 and _was_inherited(number_)]


def raise_open_files_limit() -> None:
    """Allow ourselves as many descriptors as we may: they are what this process is for."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _serve(arguments: argparse.Namespace) -> int:
    _fill_standard_streams()
    # With ``stty tostop``, it would stop a background job that logs to its terminal.
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    parent, store_size = take_parent(), take_store_size()
    if arguments.supervise and parent is None and not keeping.has_store(store_size):
        numbers = {option.fd for option in arguments.add_fd}
        if arguments.ready_fd is not None:
            numbers.add(arguments.ready_fd)
        keeping.become_supervisor(
            arguments.log_format, arguments.log_level, numbers, arguments.drain_timeout
        )
    from . import logs, takeover

    logs.set_up(arguments.log_format, arguments.log_level)
    inherited = take_listen_fds()
    raise_open_files_limit()
    # All stored descriptors get their numbers before anything is imported that opens others.
    initial, missing = _take_inherited(arguments.add_fd)
    movable: list[Movable] = [fd for fd, _, _ in initial]
    ready = None
    if arguments.ready_fd is not None and _was_inherited(arguments.ready_fd):
        ready = Fd(os.dup(arguments.ready_fd))
        Fd(arguments.ready_fd).close()
        movable.append(ready)
    elif arguments.ready_fd is not None and parent is None:
        raise UsageError(
            f"--ready-fd: descriptor {arguments.ready_fd} was not passed to this process"
        )
    if parent is not None:
        movable.append(parent)
    strays = _inherited_strays()
    movable += strays
    recovered = keeping.recover(inherited, movable)
    if recovered.handed_over and parent is not None:
        with recovered:
            close_all(fd for fd, _, _ in initial)
            return DONE  # a successor has it all; this was started because it was not told so
    if recovered.has_state:  # they are part of it
        close_all(fd for fd, _, _ in initial)
        initial = []
    elif missing:
        raise UsageError(f"--add-fd: descriptor {missing[0]} was not passed to this process")
    listen_fds, passed = _sort_passed(recovered.sockets)
    if recovered.has_state:
        close_all(fd for fd, _, _ in passed)  # likewise
    else:
        initial += passed
    limits = Limits(
        max_connections=arguments.max_connections,
        max_connections_per_uid=arguments.max_connections_per_uid,
        max_fds=arguments.max_fds,
        max_fds_per_uid=arguments.max_fds_per_uid,
        idle_timeout=arguments.idle_timeout,
        max_request_bytes=arguments.max_request_bytes,
        write_timeout=arguments.write_timeout,
        drain_timeout=arguments.drain_timeout,
    )
    paths = arguments.socket or ([] if listen_fds else [Path(default_socket())])
    policy = None if arguments.policy is None else read_policy(arguments.policy)
    predecessor = None
    there = recovered.state.listeners
    if arguments.takeover and not paths:
        raise UsageError("--takeover needs --socket: which daemon is to be taken over")
    takes_over = arguments.takeover or (arguments.replace and takeover.is_served(paths[:1]))
    if takes_over and not recovered.has_state:
        reached, *paths = paths
        movable += [*recovered.stale_fds, *(given.fd for given in listen_fds)]
        movable += [fd for fd, _, _ in initial if fd not in movable]
        predecessor = takeover.prepare(reached, movable, has_parent=parent is not None)
        there = predecessor.state.listeners
    for stray in strays:
        stray.detach()
    paths = takeover.still_to_bind(paths, there)
    from . import daemon

    audit = None if arguments.audit is None else _open_audit(arguments.audit)
    kept = keeping.connect(parent, store_size)
    failures: list[BaseException] = []
    try:
        daemon.run(
            paths,
            dialect=arguments.dialect,
            limits=limits,
            policy_path=arguments.policy,
            policy=policy,
            metrics_path=arguments.metrics,
            audit=audit,
            socket_group=arguments.socket_group,
            socket_mode=arguments.socket_mode,
            initial_fds=initial,
            listen_fds=listen_fds,
            takeover=predecessor,
            recovered=recovered,
            keeping=kept,
            ready_fd=ready,
            parent=parent,
        )
    except* (OSError, NoDaemon, QMPError) as group:  # a nursery's: there is one cause, the first
        failures = list(leaf_exceptions(group))
    finally:
        if audit is not None:
            audit.close()
        if kept is not None and parent is None:
            kept.notifier.close()
    for failure in failures:
        if isinstance(failure, NoDaemon) or not isinstance(failure, OSError):
            raise failure  # the old daemon has kept what was to be taken over
        where = f"{failure.filename}: " if failure.filename else ""
        advice = _ADVICE.get(failure.errno or 0, "")
        raise UsageError(
            f"{where}{failure.strerror or failure} ({advice}--socket listens elsewhere)"
        )
    return DONE


def _open_audit(path: Path) -> Fd:
    from ..server.audit import open_audit

    try:
        return open_audit(path)
    except (OSError, ValueError) as exc:
        raise UsageError(f"--audit: {path}: {getattr(exc, 'strerror', None) or exc}") from None
