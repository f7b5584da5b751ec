"""``qmpfd serve``: the daemon as a process."""

from __future__ import annotations

import argparse
import errno
import os
import resource
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from ..client.blocking import NoDaemon
from ..errors import QMPError
from ..kernel.fd import Fd, close_all, open_numbers
from ..kernel.systemd import take_listen_fds, take_parent, take_store_size
from ..kernel.unix_address import is_served, listens
from ..supervisor.signals import FORWARDED, set_up_signals
from . import serve_options, supervise
from .check_policy import read_policy
from .exit_codes import UsageError
from .options import default_socket
from .serve_options import InheritedFd, limits
from .spare import is_spare, wait

if TYPE_CHECKING:
    from ..server.renumber import Movable

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


#: An initial descriptor, the id of its fd set (None: a new one), and its opaque text.
_Initial: TypeAlias = "tuple[Fd, int | None, str | None]"


def _take_inherited(
    options: list[InheritedFd], ready_fd: int | None
) -> tuple[list[_Initial], Fd | None, list[int]]:
    """Duplicate the descriptors of ``--add-fd`` and ``--ready-fd``, and close the originals.

    Returns:
        The initial descriptors, the one of ``--ready-fd`` or None, and the numbers of ``--add-fd``
        that this process has not inherited.
    """
    numbers = [option.fd for option in options]
    wanted = {*numbers, *([] if ready_fd is None else [ready_fd])}
    originals = {number: Fd(number) for number in wanted if _was_inherited(number)}
    taken: list[_Initial] = [
        (Fd(os.dup(option.fd)), option.fdset_id, option.opaque)
        for option in options
        if option.fd in originals
    ]
    ready = Fd(os.dup(ready_fd)) if ready_fd in originals else None
    close_all(originals.values())
    return taken, ready, [number for number in numbers if number not in originals]


def _was_inherited(number: int) -> bool:
    """Return whether *number* was inherited: Python opens with close-on-exec (PEP 446)."""
    try:
        return os.get_inheritable(number)
    except OSError:
        return False


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


class _Stray(Fd):
    """An inherited descriptor of unknown purpose: it may be moved to another number, but is never
    closed.
    """

    __slots__ = ()

    def __del__(self) -> None:
        """Leave the descriptor open."""


def _inherited_strays() -> list[_Stray]:
    """Return inherited descriptors of unknown purpose, such as a shell script's; none if the
    command line has a path like /dev/fd/9, as that descriptor must keep its number.
    """
    if any("/fd/" in word for word in sys.argv):
        return []
    return [_Stray(number) for number in open_numbers() if number > 2 and _was_inherited(number)]


def _import_all() -> None:
    """Import the modules that a spare worker needs when it takes the worker's place."""
    from ..commands import schema  # noqa: F401 - imported to be loaded
    from ..server import startup  # noqa: F401 - likewise
    from ..server.fdstore import fetch  # noqa: F401 - likewise
    from . import daemon, takeover  # noqa: F401 - likewise


def run(arguments: argparse.Namespace) -> None:
    _fill_standard_streams()
    set_up_signals(FORWARDED)
    parent, store_size = take_parent(), take_store_size()
    if arguments.supervise and parent is None and not supervise.has_store(store_size):
        supervise.become_supervisor(arguments)
    from . import logs, takeover

    logs.set_up(arguments.log_format, arguments.log_level)
    # Raise the soft limit to the hard limit: this process stores descriptors.
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    start = None
    if is_spare() and parent is not None:
        start = wait(parent, _import_all)
        parent = start.parent
    inherited = take_listen_fds() if start is None else start.sockets
    # Restored descriptors get their numbers before the import of modules that open others.
    initial, ready, missing = _take_inherited(arguments.add_fd, arguments.ready_fd)
    number = arguments.ready_fd
    if ready is None and number is not None and parent is None:  # a restarted worker has none
        raise UsageError(f"--ready-fd: descriptor {number} was not passed to this process")
    movable: list[Movable] = [fd for fd, _, _ in initial]
    movable += [given for given in (ready, parent) if given is not None]
    movable += _inherited_strays()
    recovered = supervise.recover(inherited, movable, start)
    if recovered.handed_over and parent is not None:
        recovered.close()
        close_all(fd for fd, _, _ in initial)
        return  # a successor owns everything, but the parent did not know and restarted us
    if missing and not recovered.has_state:
        raise UsageError(f"--add-fd: this process has not inherited descriptor {missing[0]}")
    listen_fds = [given for given in recovered.sockets if listens(given.fd)]
    # Others (OpenFile=, or a .socket unit of another kind) are stored in an fd set each.
    initial += (
        (given.fd, None, given.name) for given in recovered.sockets if given not in listen_fds
    )
    if recovered.has_state:  # the recovered state has the initial descriptors already
        close_all(fd for fd, _, _ in initial)
        initial = []
    paths = arguments.socket or ([] if listen_fds else [Path(default_socket())])
    policy = None if arguments.policy is None else read_policy(arguments.policy)
    predecessor = None
    listeners = recovered.state.listeners
    if arguments.takeover and not paths:
        raise UsageError(
            "--takeover needs --socket PATH: the socket of the daemon to take over from"
        )
    takes_over = arguments.takeover or (arguments.replace and any(map(_is_served, paths[:1])))
    if takes_over and not recovered.has_state:
        reached, *paths = paths
        movable += [*recovered.stale_fds, *(given.fd for given in listen_fds)]
        movable += [fd for fd, _, _ in initial if fd not in movable]
        predecessor = takeover.prepare(reached, movable, has_parent=parent is not None)
        listeners = predecessor.state.listeners
        takeover.follow_moved([reached, *paths], listeners)
    paths = takeover.still_to_bind(paths, listeners)
    from ..server.listen.binding import Permissions
    from ..server.server import DaemonServer
    from ..server.startup import run_daemon
    from . import daemon

    audit = None if arguments.audit is None else _open_audit(arguments.audit)
    fd_store = supervise.connect(parent, store_size)
    serve = partial(
        run_daemon,
        partial(
            DaemonServer, arguments.dialect, limits(arguments), policy, arguments.metrics, fd_store
        ),
        paths,
        Permissions(arguments.socket_mode, arguments.socket_group),
        audit,
        initial,
        [given.fd for given in listen_fds],
        takeover=predecessor,
        recovered=recovered,
    )
    names = [*map(str, paths), *(f"the inherited socket '{given.name}'" for given in listen_fds)]
    failure: BaseException | None = None
    try:
        daemon.run(
            serve,
            predecessor,
            names,
            [listener.name for listener in listeners],
            policy_path=arguments.policy,
            ready_fd=ready,
            parent=parent,
            store_size=store_size,
            successor=None if start is None else start.successor,
        )
    except* (OSError, NoDaemon, QMPError, MemoryError, KeyboardInterrupt) as group:
        failure = group  # of nested nurseries: the first exception is the cause
        while isinstance(failure, BaseExceptionGroup):
            failure = failure.exceptions[0]
    finally:
        if audit is not None:
            audit.close()
        if fd_store is not None and parent is None:
            fd_store.notifier.close()
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
