"""Inherited descriptors and recovered state of ``qmpfd serve``.

Restored descriptors get their numbers here, before the import of modules that open others.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from ..kernel.fd import Fd, close_all, duplicate, open_numbers
from ..kernel.systemd import InheritedFd, Notifier, take_listen_fds
from ..kernel.unix_address import listens
from . import supervise
from .exit_codes import UsageError
from .serve_options import InitialFd
from .spare import wait

if TYPE_CHECKING:
    from ..kernel.renumber import Movable
    from ..server.fdstore.recover import Recovered

#: An initial descriptor, the id of its fd set (None: a new one), and its opaque text.
Initial: TypeAlias = "tuple[Fd, int | None, str | None]"


def _take_inherited(
    options: list[InitialFd], ready_fd: int | None, originals: dict[int, Fd]
) -> tuple[list[Initial], Fd | None, list[int]]:
    """Duplicate the descriptors of ``--add-fd`` and ``--ready-fd``, and close the originals.

    Returns:
        The initial descriptors, the one of ``--ready-fd`` or None, and the numbers of ``--add-fd``
        that this process has not inherited.
    """
    taken: list[Initial] = [
        (duplicate(option.fd), option.fdset_id, option.opaque)
        for option in options
        if option.fd in originals
    ]
    ready = duplicate(originals[ready_fd]) if ready_fd in originals else None
    close_all(originals.values())
    return taken, ready, [option.fd for option in options if option.fd not in originals]


def _was_inherited(number: int) -> bool:
    """Return whether *number* was inherited: Python opens with close-on-exec (PEP 446)."""
    try:
        return os.get_inheritable(number)
    except OSError:
        return False


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


class Origin(NamedTuple):
    """Inherited descriptors and recovered state of this process.

    Args:
        parent: connection to the parent of ``--supervise``, or None.
        recovered: the state of a daemon that has crashed; may be empty.
        initial: descriptors to store before the first client is served; none where the recovered
            state has them already.
        sockets: the service manager's sockets to serve clients on.
        ready: the descriptor of ``--ready-fd``, or None.
        movable: descriptors that a takeover may move to other numbers.
    """

    parent: Notifier | None
    recovered: Recovered
    initial: list[Initial]
    sockets: list[InheritedFd]
    ready: Fd | None
    movable: list[Movable]


def inherit(arguments: argparse.Namespace, parent: Notifier | None) -> Origin | None:
    """Sort the inherited descriptors, and recover the state of a daemon that has crashed.

    Args:
        arguments: the command line.
        parent: connection to the parent of ``--supervise``, or None.

    Returns:
        None if a successor has taken over everything, but the parent did not know and restarted
        this worker.

    Raises:
        UsageError: a descriptor was not inherited, or the state cannot be read.
    """
    passed = take_listen_fds()
    number = arguments.ready_fd
    wanted = {option.fd for option in arguments.add_fd} | {number} - {None}
    originals = {each: Fd(each) for each in wanted if _was_inherited(each)}
    names: list[str] = []
    if parent is not None:
        parent, names = wait(parent, [*originals.values(), *(each.fd for each in passed)])
        originals = {each: fd for each, fd in originals.items() if not fd.closed}
        passed = [each for each in passed if not each.fd.closed]
    initial, ready, missing = _take_inherited(arguments.add_fd, number, originals)
    if ready is None and number is not None and parent is None:  # a restarted worker has none
        raise UsageError(f"--ready-fd: descriptor {number} was not passed to this process")
    movable: list[Movable] = [fd for fd, _, _ in initial]
    movable += [given for given in (ready, parent) if given is not None]
    movable += _inherited_strays()
    recovered = supervise.recover(passed, movable, parent, names)
    if recovered.handed_over and parent is not None:
        recovered.close()
        close_all(fd for fd, _, _ in initial)
        return None
    if missing and not recovered.has_state:
        raise UsageError(f"--add-fd: this process has not inherited descriptor {missing[0]}")
    sockets = [each for each in recovered.sockets if listens(each.fd)]
    # Others (OpenFile=, or a .socket unit of another kind) are stored in an fd set each.
    initial += ((each.fd, None, each.name) for each in recovered.sockets if each not in sockets)
    if recovered.has_state:  # that state has the initial descriptors already
        close_all(fd for fd, _, _ in initial)
        initial = []
        # The parent passes sockets again if the worker has died after it had stored some of them.
        stored = {os.fstat(fd.fileno()).st_ino for fd in recovered.others}
        close_all(each.fd for each in sockets if os.fstat(each.fd.fileno()).st_ino in stored)
        sockets = [each for each in sockets if not each.fd.closed]
    movable += [*recovered.stale_fds, *(each.fd for each in sockets)]
    movable += [fd for fd, _, _ in initial if fd not in movable]
    return Origin(parent, recovered, initial, sockets, ready, movable)
