"""``serve --takeover``: what a person sees of it."""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path

from ..limits import TAKEOVER_TIMEOUT
from ..server import fetch as fetching
from ..syncclient import NoDaemon

_log = logging.getLogger("qmpfd")


def fetch(path: Path) -> fetching.Inheritance:
    """Fetch all that the daemon at *path* has.

    Raises:
        NoDaemon: nobody serves there, or it does not let go.
        QMPError: it refuses.
    """
    started = time.monotonic()
    try:
        inheritance = fetching.fetch(path, TAKEOVER_TIMEOUT, _progress)
    except ValueError as exc:
        raise NoDaemon(f"the daemon at {path} cannot be taken over: {exc}") from None
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
