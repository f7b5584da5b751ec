"""Functions that the three stories share: print and check what happens."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path

import trio
from daemon import Broken, run

#: Timeout of a story in seconds; a story takes one or two.
_PATIENCE = 60.0

#: Start of a ``qmpfd`` command line, of the same version as the daemon.
QMPFD = (sys.executable, "-m", "qmpfd")


def say(text: str) -> None:
    """Print a sentence of the story."""
    print(" ".join(text.split()), flush=True)


def check(truth: bool, text: str) -> None:
    """Print *text* if it is true, else raise Broken."""
    if not truth:
        raise Broken(f"this should be true, and is not: {text}")
    print(f"  ok: {text}", flush=True)


def run_story(story: Callable[[Path], Awaitable[None]]) -> int:
    """Run a story in a temporary folder of mode 711; return the exit status."""

    async def main() -> int:
        with tempfile.TemporaryDirectory(prefix="qmpfd-story-") as name:
            Path(name).chmod(0o711)
            with trio.move_on_after(_PATIENCE) as patience:
                await story(Path(name))
            if patience.cancelled_caught:
                raise Broken(f"the story is not over after {_PATIENCE:g} seconds")
        return 0

    return run(main)
