"""``serve --supervise`` and the service manager's fd store: the start and restart of a daemon."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, NoReturn

from ..kernel.fd import open_files_limit
from ..kernel.process import adopt_orphans, hard_limit
from ..kernel.systemd import InheritedFd, Notifier
from ..limits import RESERVED_PLACES
from ..supervisor.signals import FORWARDED
from .exit_codes import UsageError

if TYPE_CHECKING:
    from ..kernel.renumber import Movable
    from ..server.fdstore.mirror import FdStoreConfig
    from ..server.fdstore.recover import Recovered

_log = logging.getLogger("qmpfd")

#: Minimum of RLIMIT_NOFILE with which the parent and its worker can store descriptors.
_LEAST_FILES = 128

#: Program of the parent when the package is in a zipapp: a directory in it cannot be run.
_IN_A_ZIP = """\
import sys
sys.path.append(sys.argv.pop(1))
from supervisor.main import main
sys.exit(main(sys.argv[1:]))
"""


def has_store(size: int) -> bool:
    """Return whether the service manager has an fd store for this process."""
    return size > 0 and bool(os.environ.get("NOTIFY_SOCKET"))


def become_supervisor(arguments: argparse.Namespace) -> NoReturn:
    """Execute the parent program, which starts this command line again as its worker.

    Args:
        arguments: the arguments of ``serve``.

    Raises:
        UsageError: RLIMIT_NOFILE is too low.
    """
    limit = hard_limit()  # both processes raise theirs to it
    if limit < _LEAST_FILES:
        raise UsageError(
            f"--supervise needs a limit of {_LEAST_FILES} open files at least, not {limit} "
            "(ulimit -n)"
        )
    spec = find_spec("qmpfd.supervisor")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    folder = spec.submodule_search_locations[0]
    program = [folder] if os.path.isdir(folder) else ["-c", _IN_A_ZIP, os.path.dirname(folder)]
    # -I -S: import only the program's own files and the standard library.
    executable = sys.executable or "/proc/self/exe"  # "" if argv[0] names no program
    python = [executable, "-I", "-S", "-W", "ignore", *program]
    if sys.dont_write_bytecode:  # -I ignores $PYTHONDONTWRITEBYTECODE
        python.insert(1, "-B")
    for stream in range(3):  # /dev/null opened here would be closed, and its number reused
        os.set_inheritable(stream, True)
    adopt_orphans()  # a spare worker becomes the parent's child when its worker dies
    passed = {option.fd for option in arguments.add_fd} | {arguments.ready_fd} - {None}
    options = [arguments.log_format, arguments.log_level, str(arguments.drain_timeout)]
    options.append(",".join(map(str, passed)))
    # Pending until the parent has handlers: Ctrl-C would end its interpreter with a traceback.
    signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)
    os.execv(executable, [*python, *options, executable, *sys.orig_argv[1:]])


def recover(
    inherited: Sequence[InheritedFd],
    others: Sequence[Movable],
    parent: Notifier | None,
    names: Sequence[str],
) -> Recovered:
    """Recover state and descriptors of a daemon that has crashed, if there are any.

    Args:
        inherited: the descriptors of the service manager; owned from here on.
        others: more descriptors that may be moved out of the way.
        parent: connection to the parent, or None.
        names: names of the descriptors that the parent keeps.

    Raises:
        UsageError: the state cannot be read, or the descriptors cannot be received.
    """
    from ..server.fdstore import recover as recovering

    try:
        history = None
        if parent is not None:
            from ..server.fdstore.fetch import fetch

            fetched, history = fetch(parent, names, [*others, *(each.fd for each in inherited)])
            inherited = [*inherited, *fetched]
        recovered = recovering.recover(inherited, others, history)
    except ValueError as exc:
        raise UsageError(str(exc)) from None
    except OSError as exc:
        raise UsageError(f"the parent's descriptors cannot be had: {exc.strerror or exc}") from None
    if recovered.has_state:
        _log.info(
            "restored %d descriptors of %d fd sets",
            len(recovered.state.fds),
            len({fd.fdset_id for fd in recovered.state.fds}),
        )
    return recovered


def connect(parent: Notifier | None, size: int) -> FdStoreConfig | None:
    """Return the fd store for the second copy: the parent's or systemd's; None if there is none.

    Args:
        parent: connection to the parent of ``serve --supervise``, or None.
        size: number of descriptors that the fd store keeps at most.
    """
    from ..kernel.file_descriptions import Descriptions
    from ..server.fdstore.mirror import FdStoreConfig

    if parent is not None:
        if size <= RESERVED_PLACES:
            raise UsageError(
                f"--supervise: inherited descriptors are too many of the {open_files_limit()} open "
                "files that the limit allows (ulimit -n)"
            )
        return FdStoreConfig(parent, size, None)
    if not has_store(size):
        return None
    descriptions, notifier, why = None, None, ""
    try:
        descriptions = Descriptions()
    except OSError as exc:
        why = f"kcmp(2): {exc.strerror}"
    else:
        if size <= RESERVED_PLACES:
            why = f"FileDescriptorStoreMax={size} is too small"
        elif (notifier := Notifier.connect()) is None:
            why = "$NOTIFY_SOCKET cannot be reached"
    if notifier is None:
        _log.warning("the fd store of the service manager is not used: %s", why)
        return None
    return FdStoreConfig(notifier, size, descriptions)
