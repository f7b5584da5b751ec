"""``serve --takeover``: what a person sees of it."""

from __future__ import annotations

import logging
import os
import sys
import time
from pathlib import Path

from ..limits import TAKEOVER_TIMEOUT
from ..server import fetch as fetching
from ..syncclient import NoDaemon
from ..systemd import Notifier

_log = logging.getLogger("qmpfd")


def fetch(path: Path, parent: Notifier | None) -> fetching.Inheritance:
    """Fetch all that the daemon at *path* has.

    Args:
        path: its socket.
        parent: whose socket may have to make way for a descriptor that needs its number.

    Raises:
        NoDaemon: nobody serves there, or it does not let go.
        QMPError: it refuses.
    """
    started = time.monotonic()
    try:
        inheritance = fetching.fetch(path, TAKEOVER_TIMEOUT, _progress, parent)
    except ValueError as exc:
        raise NoDaemon(f"the daemon at {path} cannot be taken over: {exc}") from None
    service = os.environ.get("INVOCATION_ID")
    if service is not None and parent is None and inheritance.state.store == service:
        inheritance.close()
        raise NoDaemon(
            f"the daemon at {path} is of this very service, and so is what is kept of it: "
            "restart the service instead, and nothing is lost"
        )
    _log.info(
        "fetched %d descriptors of %d fd sets and %d connections in %.2f s",
        len(inheritance.state.stored_numbers),
        len(inheritance.state.sets),
        len(inheritance.state.sessions),
        time.monotonic() - started,
    )
    return inheritance


def _progress(come: int, total: int) -> None:
    """A line that grows, on a terminal."""
    if sys.stderr.isatty():
        end = "\n" if come == total else ""
        print(f"\rqmpfd: {come} of {total} descriptors", end=end, file=sys.stderr, flush=True)
