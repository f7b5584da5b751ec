"""Options that several verbs share, and the types of their values."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ..syncclient import SyncClient

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]


def default_socket() -> Path:
    """Where the daemon is: ``$QMPFD_SOCKET``, else the user's runtime directory, else /run."""
    if named := os.environ.get("QMPFD_SOCKET"):
        return Path(named)
    if runtime := os.environ.get("XDG_RUNTIME_DIR"):
        return Path(runtime, "qmpfd.sock")
    return Path("/run/qmpfd.sock")


def client_of(arguments: argparse.Namespace) -> SyncClient:
    """The daemon that a verb's options name."""
    return SyncClient(arguments.socket or default_socket(), arguments.timeout)


def number(name: str, least: int = 0, most: int | None = None) -> Callable[[str], int]:
    """The type of an option that takes a whole number, called *name* in errors."""

    def parse(text: str) -> int:
        try:
            value = int(text, 10)
        except ValueError:
            value = least - 1
        if value < least or (most is not None and value > most):
            bounds = f"{least} or more" if most is None else f"{least} to {most}"
            raise argparse.ArgumentTypeError(f"{text!r} is no {name}: a whole number, {bounds}")
        return value

    return parse


def seconds(text: str) -> float:
    """The type of an option that takes a time: a positive number of seconds."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no time: a number of seconds above 0")
    return value


def add_client_options(parser: argparse.ArgumentParser) -> None:
    """``--socket``, ``--timeout`` and ``--json``, which every verb but ``serve`` has."""
    parser.add_argument(
        "--socket",
        type=Path,
        metavar="PATH",
        help="the daemon's socket (default: $QMPFD_SOCKET, else $XDG_RUNTIME_DIR/qmpfd.sock, "
        "else /run/qmpfd.sock)",
    )
    parser.add_argument(
        "--timeout",
        type=seconds,
        default=10.0,
        metavar="S",
        help="give up on a silent daemon after S seconds (default: 10)",
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON value instead of text for people"
    )
