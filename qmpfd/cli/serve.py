"""``qmpfd serve``: the daemon as a process."""

from __future__ import annotations

import argparse
import errno
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ..client.blocking import NoDaemon
from ..errors import QMPError
from ..kernel.fd import Fd
from ..kernel.process import raise_open_files_limit
from ..kernel.systemd import take_parent, take_store_size
from ..kernel.unix_address import is_served
from ..supervisor.signals import FORWARDED, set_up_signals
from . import serve_options, supervise
from .check_policy import read_policy
from .exit_codes import UsageError, cause
from .inheritance import Origin, inherit
from .options import default_socket
from .serve_options import limits

if TYPE_CHECKING:
    from ..server.takeover.receiver import Takeover

#: Advice for a socket that cannot be bound, by errno.
_ADVICE = {
    errno.EADDRINUSE: "qmpfd status shows the daemon; --replace takes over from it; ",
    errno.ENOENT: "make the directory first; ",
}

SUMMARY = "run the daemon"
DESCRIPTION = (
    "Run the daemon: store file descriptors for the clients of a Unix socket, "
    "which speak QMP. SIGTERM and SIGINT stop the daemon after it has answered the requests "
    "that it has received; a second one stops it at once."
)
EXAMPLES = [
    "qmpfd serve",
    "qmpfd serve --socket /run/qmpfd.sock --policy /etc/qmpfd.toml",
    "qmpfd serve --supervise",
    "qmpfd serve --dialect qemu --add-fd fd=3,set=0,opaque=disk 3<>disk.img",
]
EXIT_STATUS = (
    "  0 stopped by a signal or by quit, 2 the daemon cannot start; with --takeover:\n"
    "  1 the old daemon refused, 3 there is no daemon to take over from"
)
OPTIONS = serve_options.OPTIONS


def _is_served(path: Path) -> bool:
    """Return whether to take over at *path*; after an OSError the takeover itself says why not."""
    try:
        return is_served(path)
    except OSError:
        return True


def _fill_standard_streams() -> None:
    """Open /dev/null at closed standard streams: no socket may get the number 0, 1 or 2.

    Raises:
        UsageError: /dev/null cannot be opened.  Restarts and takeovers need it as well.
    """
    try:
        while (fd := Fd(os.open(os.devnull, os.O_RDWR))).fileno() <= 2:
            fd.detach()
    except OSError as exc:
        raise UsageError(f"{os.devnull}: {exc.strerror}") from None
    fd.close()


def run(arguments: argparse.Namespace) -> None:
    _fill_standard_streams()
    set_up_signals(FORWARDED)
    parent, store_size = take_parent(), take_store_size()
    if arguments.supervise and parent is None and not supervise.has_store(store_size):
        supervise.become_supervisor(arguments)
    from . import logs

    logs.set_up(arguments.log_format, arguments.log_level)
    raise_open_files_limit()  # this process stores descriptors
    origin = inherit(arguments, parent)
    if origin is not None:
        _serve(arguments, origin, store_size)


def _serve(arguments: argparse.Namespace, origin: Origin, store_size: int) -> None:
    """Run the daemon until it ends."""
    from . import takeover

    passed = any(each.path is None for each in origin.recovered.state.listeners)
    paths = arguments.socket or ([] if origin.sockets or passed else [Path(default_socket())])
    policy = None if arguments.policy is None else read_policy(arguments.policy)
    inherited = [*origin.recovered.others, *(each.fd for each in origin.sockets)]
    if not arguments.takeover:  # a predecessor may listen with a duplicate of an inherited socket
        paths = takeover.still_to_bind(paths, (), inherited)
    predecessor = _prepare_takeover(arguments, origin, paths)
    state = origin.recovered.state
    if predecessor is not None:
        state, paths = predecessor.state, paths[1:]
    paths = takeover.still_to_bind(paths, state.listeners, inherited)
    # Only now: the import of Trio opens a descriptor, which must not get a restored one's number.
    from ..kernel.binding import Permissions
    from ..server.server import DaemonServer
    from ..server.startup import run_daemon
    from . import daemon

    audit = None if arguments.audit is None else _open_audit(arguments.audit)
    fd_store = supervise.connect(origin.parent, store_size)
    server = partial(
        DaemonServer, arguments.dialect, limits(arguments), policy, arguments.metrics, fd_store
    )
    serve = partial(
        run_daemon,
        server,
        paths,
        Permissions(arguments.socket_mode, arguments.socket_group),
        audit,
        origin.initial,
        [each.fd for each in origin.sockets],
        takeover=predecessor,
        recovered=origin.recovered,
    )
    names = [*map(str, paths), *(f"the inherited socket '{each.name}'" for each in origin.sockets)]
    with ExitStack() as stack:
        stack.enter_context(_one_cause())
        if audit is not None:
            stack.callback(audit.close)
        if fd_store is not None and origin.parent is None:
            stack.callback(fd_store.notifier.close)
        daemon.run(
            serve,
            predecessor,
            names,
            [listener.name for listener in state.listeners],
            policy_path=arguments.policy,
            ready_fd=origin.ready,
            parent=origin.parent,
        )


def _prepare_takeover(
    arguments: argparse.Namespace, origin: Origin, paths: list[Path]
) -> Takeover | None:
    """Begin a takeover at the first of *paths*, if the command line asks for one; else None.

    A restarted worker begins none: it has the state that a takeover has brought.
    """
    from . import takeover

    if arguments.takeover and not paths:
        raise UsageError(
            "--takeover needs --socket PATH: the socket of the daemon to take over from"
        )
    takes_over = arguments.takeover or (arguments.replace and any(map(_is_served, paths[:1])))
    if not takes_over or origin.recovered.has_state:
        return None
    has_parent = origin.parent is not None
    predecessor = takeover.prepare(paths[0], origin.movable, has_parent=has_parent)
    takeover.follow_moved(paths, predecessor.state.listeners)
    return predecessor


@contextmanager
def _one_cause() -> Iterator[None]:
    """Raise the first exception of nested nurseries, the cause, in place of their groups."""
    failure: BaseException | None = None
    try:
        yield
    except* (OSError, NoDaemon, QMPError, MemoryError, KeyboardInterrupt) as group:
        failure = cause(group)
    if failure is not None:
        raise _as_usage_error(failure)


def _as_usage_error(failure: BaseException) -> BaseException:
    """Convert an OSError to a UsageError; return others, as of a failed takeover, unchanged."""
    if not isinstance(failure, OSError) or isinstance(failure, NoDaemon):
        return failure
    reason = failure.strerror or failure
    if failure.filename is None:  # the error does not concern a socket
        return UsageError(f"the daemon cannot start: {reason}")
    advice = _ADVICE.get(failure.errno or 0, "")
    return UsageError(f"{failure.filename}: {reason} ({advice}--socket PATH names another one)")


def _open_audit(path: Path) -> Fd:
    from ..server.audit import open_audit

    try:
        return open_audit(path)
    except (OSError, ValueError) as exc:
        raise UsageError(f"--audit: {path}: {getattr(exc, 'strerror', None) or exc}") from None
