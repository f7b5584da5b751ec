"""``python -m qmpfd`` and the ``qmpfd`` command."""

from __future__ import annotations

import gc
import signal
import sys


def program() -> int:
    """The ``qmpfd`` command: the command line, and then the end of the process."""
    # An interrupt ends the process at once, and without a traceback, while there is nothing to
    # clean up: during the imports, and at the interpreter's end.
    _replace_interrupt_handler(signal.default_int_handler, signal.SIG_DFL)
    from .cli import main

    _replace_interrupt_handler(signal.SIG_DFL, signal.default_int_handler)
    status = main()
    _replace_interrupt_handler(signal.default_int_handler, signal.SIG_DFL)
    # At exit, the interpreter need not look through all that was loaded once more: a tenth of the
    # time of a short verb.
    gc.freeze()
    return status


def _replace_interrupt_handler(old: signal._HANDLER, new: signal._HANDLER) -> None:
    """Have *new* handle SIGINT in place of *old*; an inherited SIG_IGN stays (POSIX, sh, 2.11)."""
    if signal.getsignal(signal.SIGINT) is old:
        signal.signal(signal.SIGINT, new)


if __name__ == "__main__":
    sys.exit(program())
