"""Run the command line on a real terminal, of any width and encoding."""

from __future__ import annotations

import os
import subprocess
import sys
import termios
from collections.abc import Mapping, Sequence
from contextlib import suppress

from helpers import PATIENCE, ROOT

#: Program that runs the command line.
_MAIN = "import sys; from qmpfd.cli import main; sys.exit(main(sys.argv[1:]))"

#: Environment variables that change how a program writes to a terminal.
_STRANGE = ("NO_COLOR", "COLUMNS", "TERM", "FORCE_COLOR", "PYTHONIOENCODING", "PYTHONUTF8")


def on_a_terminal(
    words: Sequence[str],
    columns: int = 80,
    *,
    code: str = _MAIN,
    encoding: str = "utf-8",
    env: Mapping[str, str] | None = None,
) -> str:
    """Run a program on a terminal; return its output, with escape sequences.

    Args:
        words: the arguments.
        columns: width of the terminal.
        code: Python code of the program; by default, the command line.
        encoding: encoding of the terminal.
        env: further environment variables.
    """
    master, slave = os.openpty()
    clean = {key: value for key, value in os.environ.items() if key not in _STRANGE}
    try:
        termios.tcsetwinsize(slave, (24, columns))
        process = subprocess.Popen(
            [sys.executable, "-c", code, *words],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=slave,
            stderr=slave,
            env={**clean, "TERM": "xterm", "PYTHONIOENCODING": encoding, **(env or {})},
        )
    finally:
        os.close(slave)
    shown = b""
    with suppress(OSError):  # EIO: the other end is closed everywhere
        while data := os.read(master, 1 << 16):
            shown += data
    os.close(master)
    process.wait(PATIENCE)
    return shown.decode(encoding).replace("\r\n", "\n")
