"""The command line: arguments in, exit status out, one line for each error."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from .._version import __version__
from ..errors import QMPError
from ..syncclient import NoDaemon
from . import handout, policy, serve, state, verbs
from .status import NO_DAEMON, REFUSED, USAGE, UsageError


class _Parser(argparse.ArgumentParser):
    """As argparse has it, but with one line for an error."""

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = _Parser(
        prog="qmpfd",
        description="Hold open file descriptors for other programs, over QEMU's QMP.",
        epilog="Exit status: 0 done, 1 the daemon refused, 2 usage, 3 no daemon.",
    )
    parser.add_argument("--version", action="version", version=f"qmpfd {__version__}")
    commands = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    serve.add_parser(commands)
    verbs.add_parsers(commands)
    handout.add_parsers(commands)
    state.add_parser(commands)
    policy.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments; the process's own by default.

    Returns:
        The exit status: 0 done, 1 the daemon refused, 2 usage, 3 no daemon.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    command: list[str] = []
    if words[:1] == ["exec"] and "--" in words:
        # Whatever is behind it is the command's, options and further dashes too.
        cut = words.index("--")
        words, command = words[:cut], words[cut + 1 :]
    arguments = _parser().parse_args(words)
    if command:
        arguments.command = command
    try:
        status: int = arguments.run(arguments)
        sys.stdout.flush()
    except UsageError as exc:
        return _fail(str(exc), USAGE)
    except NoDaemon as exc:
        return _fail(str(exc), NO_DAEMON)
    except QMPError as exc:
        return _fail(f"{exc.error_class}: {exc.desc}", REFUSED)
    except BrokenPipeError:
        # Whoever read our output has seen enough.  What is still buffered has nowhere to go, and
        # the interpreter must not try again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return REFUSED
    except KeyboardInterrupt:
        return 130
    return status


def _fail(message: str, status: int) -> int:
    print(f"qmpfd: {message}", file=sys.stderr)
    return status
