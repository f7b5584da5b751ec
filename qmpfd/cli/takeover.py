"""``serve --takeover``: what a person sees of it."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from ..client.blocking import NoDaemon
from ..kernel.systemd import invocation_id
from ..limits import TAKEOVER_TIMEOUT
from ..server.renumber import Movable
from ..server.saved_state import SavedListener
from ..server.takeover import receiver as fetching

_log = logging.getLogger("qmpfd")


def fetch(path: Path, movable: Iterable[Movable], *, has_parent: bool) -> fetching.ReceivedState:
    """Fetch all that the daemon at *path* has.

    Args:
        path: its socket.
        movable: descriptors that may get other numbers, if these are in the way.
        has_parent: what is kept of it is not with the service manager.

    Raises:
        NoDaemon: nobody serves there, or it does not let go.
        QMPError: it refuses.
    """
    started = time.monotonic()
    try:
        inheritance = fetching.fetch(path, TAKEOVER_TIMEOUT, _progress, movable)
    except ValueError as exc:
        raise NoDaemon(f"the daemon at {path} cannot be taken over: {exc}") from None
    service = invocation_id()
    if service is not None and not has_parent and inheritance.state.store == service:
        inheritance.close()
        raise NoDaemon(
            f"the daemon at {path} is of this very service, and so is what is kept of it: "
            "restart the service instead, and nothing is lost"
        )
    _log.info(
        "fetched %d descriptors of %d fd sets and %d connections in %.2f s",
        len(inheritance.state.stored_numbers),
        len(inheritance.state.sets),
        inheritance.state.connections,
        time.monotonic() - started,
    )
    return inheritance


def still_to_bind(paths: Iterable[Path], listeners: Iterable[SavedListener]) -> list[Path]:
    """Those of *paths* on which the old daemon does not listen.

    Args:
        paths: where to listen.
        listeners: where it does.
    """
    served = [Path(os.fsdecode(each.path)) for each in listeners if each.path is not None]
    return [path for path in paths if not any(_is_same(path, old) for old in served)]


def _is_same(path: Path, other: Path) -> bool:
    try:
        return path.absolute() == other or path.samefile(other)
    except OSError:
        return False


def _progress(come: int, total: int) -> None:
    """A line that grows, on a terminal."""
    if sys.stderr.isatty():
        end = "\n" if come == total else ""
        print(f"\rqmpfd: {come} of {total} descriptors", end=end, file=sys.stderr, flush=True)
