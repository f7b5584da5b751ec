"""``serve --takeover``: its conditions, errors and progress."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path

from ..client.blocking import NoDaemon
from ..kernel.binding import identity
from ..kernel.fd import Fd
from ..kernel.renumber import Movable
from ..kernel.systemd import invocation_id
from ..kernel.unix_address import bound_path, is_abstract
from ..server.saved_state import SavedListener
from ..server.takeover import receiver


def prepare(path: Path, movable: Iterable[Movable], *, has_parent: bool) -> receiver.Takeover:
    """Begin a takeover of the daemon at *path*, which goes on serving.

    Args:
        path: its socket.
        movable: descriptors that may be moved out of the way.
        has_parent: whether this process has a parent of ``serve --supervise``, and so does not use
            the service manager's fd store.

    Raises:
        NoDaemon: no daemon serves there, or this process cannot take over from it.
        QMPError: the daemon refuses.
    """
    try:
        takeover = receiver.prepare(path, _progress, movable)
    except (ValueError, MemoryError) as exc:
        reason = str(exc) or "this process is out of memory"  # str(MemoryError()) is empty
        raise NoDaemon(f"the daemon at {path} cannot be taken over: {reason}") from None
    except TimeoutError as exc:  # main() would advise --timeout, which serve does not have
        raise NoDaemon(str(exc)) from None
    state, service = takeover.state, invocation_id()
    why = ""
    if service is not None and not has_parent and state.store == service:
        why = "and its fd store belong to this service: restart the service instead"
    elif state.service not in (None, service) and any(ls.path is None for ls in state.listeners):
        # The service manager would restart that service, with the same socket.
        why = "has its socket from a service manager: restart the service instead"
    if why:
        takeover.close()
        raise NoDaemon(f"the daemon at {path} {why}, and nothing is lost")
    return takeover


def follow_moved(paths: Iterable[Path], listeners: Iterable[SavedListener]) -> None:
    """Where the socket file of one of the *listeners* is at one of *paths*, and not where the old
    daemon bound it (a rename(2), another mount namespace), that path is the listener's from now on.
    """
    for path in map(Path.resolve, paths):
        found = identity(path)
        for each in listeners:
            if each.path is None or found is None or each.file != found:
                continue
            if identity(Path(os.fsdecode(each.path))) != found:
                each.path = os.fsencode(path)


def still_to_bind(
    paths: Iterable[Path], listeners: Iterable[SavedListener], inherited: Iterable[Fd]
) -> list[Path]:
    """Return those of *paths* at which no socket listens that this process has, or gets.

    Args:
        paths: the paths of the command line.
        listeners: the sockets of the predecessor, or of this daemon before a restart.
        inherited: listening sockets that this process has inherited.
    """
    served = [Path(os.fsdecode(each.path)) for each in listeners if each.path is not None]
    served.extend(
        where
        for where in map(Path, filter(None, map(bound_path, inherited)))
        if is_abstract(where) or identity(where) is not None  # else its file is lost
    )
    return [path for path in paths if not any(_is_same(path, old) for old in served)]


def _is_same(path: Path, other: Path) -> bool:
    try:
        return other in (path, path.absolute()) or path.samefile(other)
    except OSError:
        return False


def _progress(come: int, total: int) -> None:
    """Show the progress on a terminal, in one line that is overwritten."""
    if sys.stderr.isatty():
        end = "\n" if come == total else ""
        print(f"\rqmpfd: {come} of {total} descriptors", end=end, file=sys.stderr, flush=True)
