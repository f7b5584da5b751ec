"""``serve --supervise``, and the service manager's store: what a restart needs."""

from __future__ import annotations

import argparse
import logging
import os
import resource
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from typing import TYPE_CHECKING, NoReturn

from ..kernel.fd import open_files_limit
from ..kernel.systemd import InheritedFd, Notifier
from ..limits import KEEPER_SPARE
from .exit_codes import UsageError

if TYPE_CHECKING:
    from ..server.fdstore.mirror import FdStoreConfig
    from ..server.fdstore.recover import Recovered
    from ..server.renumber import Movable
    from .spare import Start

_log = logging.getLogger("qmpfd")

_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h

#: Descriptors that the parent and its worker need to store any.
_LEAST_FILES = 128

#: The program that starts the parent where the package is in a zipapp, whose folders cannot be run.
_IN_A_ZIP = """\
import sys
sys.path.append(sys.argv.pop(1))
from supervisor.main import main
sys.exit(main(sys.argv[1:]))
"""


def has_store(size: int) -> bool:
    """Whether the service manager keeps descriptors for us."""
    return size > 0 and bool(os.environ.get("NOTIFY_SOCKET"))


def become_supervisor(arguments: argparse.Namespace) -> NoReturn:
    """Become the small parent; it starts this command line again, as its worker.

    Args:
        arguments: those of ``serve``.

    Raises:
        UsageError: too few descriptors are allowed.
    """
    _, limit = resource.getrlimit(resource.RLIMIT_NOFILE)  # both processes raise theirs to it
    if limit < _LEAST_FILES:
        raise _too_few(limit)
    spec = find_spec("qmpfd.supervisor")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    folder = spec.submodule_search_locations[0]
    program = [folder] if os.path.isdir(folder) else ["-c", _IN_A_ZIP, os.path.dirname(folder)]
    # Without the environment's and the site's modules: nothing but its own files and the library.
    python = [sys.executable, "-I", "-S", "-W", "ignore", *program]
    if sys.dont_write_bytecode:  # -I does not look at the environment, which says so as a rule
        python.insert(1, "-B")
    for stream in range(3):  # one that had to be filled would be closed, and something else there
        os.set_inheritable(stream, True)
    _adopt_orphans()
    passed = {option.fd for option in arguments.add_fd} | {arguments.ready_fd} - {None}
    options = [f"--drain-timeout={arguments.drain_timeout}", arguments.log_format]
    options += [arguments.log_level, ",".join(map(str, passed))]
    os.execv(sys.executable, [*python, *options, sys.executable, *sys.orig_argv[1:]])


def _too_few(limit: int) -> UsageError:
    return UsageError(
        f"--supervise needs a limit of {_LEAST_FILES} open files at least, not {limit} (ulimit -n)"
    )


def _adopt_orphans() -> None:
    """Have the spare worker become a child of this process when the worker dies that has started
    it.  Without that, no spare worker can be used.  This outlasts an execve(2).
    """
    with suppress(ImportError, OSError, AttributeError):
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def recover(
    inherited: Sequence[InheritedFd], others: Sequence[Movable], start: Start | None
) -> Recovered:
    """Sort out what this process was started with.

    Args:
        inherited: what came with $LISTEN_FDS; owned from here on.
        others: more descriptors that may get other numbers.
        start: what a spare worker was told.

    Raises:
        UsageError: what has come back cannot be used.
    """
    from ..server.fdstore import recover as recovering

    try:
        if start is None:
            recovered = recovering.recover(inherited, others)
        else:
            from ..server.fdstore.fetch import fetch

            own = [] if start.successor is None else [start.successor.sock]
            movable = [*others, *own, *(each.fd for each in inherited)]
            fetched, history = fetch(start.parent, start.names, movable)
            recovered = recovering.recover([*inherited, *fetched], [*others, *own], history)
    except ValueError as exc:
        raise UsageError(str(exc)) from None
    except OSError as exc:  # the parent starts another one, which inherits what it keeps
        raise UsageError(f"the parent's descriptors cannot be had: {exc.strerror or exc}") from None
    if recovered.has_state:
        _log.info(
            "restored %d descriptors of %d fd sets",
            len(recovered.state.fds),
            len({fd.fdset_id for fd in recovered.state.fds}),
        )
    return recovered


def connect(parent: Notifier | None, size: int) -> FdStoreConfig | None:
    """The keeper of the second copy of the store: our parent or systemd; None if there is none.

    Args:
        parent: our own, if there is one.
        size: how many descriptors are kept.
    """
    from ..kernel.file_descriptions import Descriptions
    from ..server.fdstore.mirror import FdStoreConfig

    if parent is not None:
        if size <= KEEPER_SPARE:
            raise _too_few(open_files_limit())
        return FdStoreConfig(parent, size, None)
    if not has_store(size):
        return None
    descriptions, notifier, why = None, None, ""
    try:
        descriptions = Descriptions()
    except OSError as exc:
        why = f"kcmp(2): {exc.strerror}"
    else:
        if size <= KEEPER_SPARE:
            why = f"FileDescriptorStoreMax={size} is too small"
        elif (notifier := Notifier.connect()) is None:
            why = "$NOTIFY_SOCKET cannot be reached"
    if notifier is None:
        _log.warning("the fd store of the service manager is not used: %s", why)
        return None
    return FdStoreConfig(notifier, size, descriptions)
