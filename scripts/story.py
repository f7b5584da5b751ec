"""What the three stories share: saying what happens, and checking that it is so."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path

import trio
from daemon import Broken, run

#: Seconds for a whole story, which takes one or two.
_PATIENCE = 60.0

#: Our own command line, of the same version as the daemon.
QMPFD = (sys.executable, "-m", "qmpfd")


def say(text: str) -> None:
    """Tell what happens next."""
    print(" ".join(text.split()), flush=True)


def check(truth: bool, text: str) -> None:
    """Tell what was found true, or end the story."""
    if not truth:
        raise Broken(f"this should be true, and is not: {text}")
    print(f"  ok: {text}", flush=True)


def tell(story: Callable[[Path], Awaitable[None]]) -> int:
    """Run a story in a folder of its own, where others may pass through; its exit status."""

    async def main() -> int:
        with tempfile.TemporaryDirectory(prefix="qmpfd-story-") as name:
            Path(name).chmod(0o711)
            with trio.move_on_after(_PATIENCE) as patience:
                await story(Path(name))
            if patience.cancelled_caught:
                raise Broken(f"the story is not over after {_PATIENCE:g} seconds")
        return 0

    return run(main)
