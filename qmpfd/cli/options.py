"""Options common to several verbs, and the types of option values."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

from ..client.blocking import BlockingClient, NoDaemon
from ..limits import INT64_MAX
from .output import terminal_width

NumberT = TypeVar("NumberT", int, float)


#: Adds an option or an argument to a parser, or to a group of a parser.
Option: TypeAlias = "Callable[[argparse._ActionsContainer], object]"


def option(
    usage: str, help_text: str, kind: Callable[[str], Any] | None = None, **settings: Any
) -> Option:
    """Define an option or an argument of a verb.

    Args:
        usage: its names and its value, as in ``-n --number N``; for a switch or an argument, the
            name only.
        help_text: its help text.
        kind: converts the value.
        settings: further arguments of ``add_argument``.
    """
    *names, last = usage.split()
    if names and not last.startswith("-"):
        settings["metavar"] = last
    else:
        names.append(last)
    if kind is not None:
        settings["type"] = kind
    elif not settings:
        settings["action"] = "store_true"
    return lambda parser: parser.add_argument(*names, help=help_text, **settings)


def one_of(*options: Option, required: bool = False) -> Option:
    """Define options that exclude each other; if *required*, one of them must be given."""

    def add(parser: argparse._ActionsContainer) -> None:
        group = parser.add_mutually_exclusive_group(required=required)
        for each in options:
            each(group)

    return add


class Formatter(argparse.HelpFormatter):
    """Help formatter that does not refill text of several lines: the examples of a verb."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=terminal_width() - 2)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if "\n" in text else super()._fill_text(text, width, indent)

    def add_argument(self, action: argparse.Action) -> None:
        super().add_argument(action)
        if isinstance(action, argparse._SubParsersAction):
            # Make room for the longest verb: argparse ignores that verbs are indented.
            self._action_max_length += self._indent_increment


def default_socket() -> str:
    """Return the path ``$QMPFD_SOCKET``, else one in $XDG_RUNTIME_DIR, else /run/qmpfd.sock."""
    if named := os.environ.get("QMPFD_SOCKET"):
        return named
    if runtime := os.environ.get("XDG_RUNTIME_DIR"):
        return os.path.join(runtime, "qmpfd.sock")
    return _SYSTEM_SOCKET


#: Default socket of a daemon that runs as a system service.
_SYSTEM_SOCKET = "/run/qmpfd.sock"


def client_of(arguments: argparse.Namespace) -> BlockingClient:
    """Connect to the daemon that a verb's options name.

    Raises:
        NoDaemon: no daemon answers there.
        QMPError: the daemon refuses this user's connection.
    """
    path = arguments.socket or default_socket()
    try:
        return BlockingClient(path, arguments.timeout)
    except FileNotFoundError as exc:
        # In a login session $XDG_RUNTIME_DIR is always set, so the default is the user's daemon.
        if arguments.socket or path == _SYSTEM_SOCKET or not os.path.exists(_SYSTEM_SOCKET):
            raise
        why = f"no daemon at {path}; there is one at {_SYSTEM_SOCKET} (--socket {_SYSTEM_SOCKET})"
        raise NoDaemon(why) from exc


#: Seconds between two attempts to connect to a daemon.
RETRY = 0.05


def client_within(arguments: argparse.Namespace, patience: float) -> BlockingClient:
    """As :func:`client_of`; retries for *patience* seconds while no daemon answers."""
    deadline = time.monotonic() + patience
    while True:
        try:
            return client_of(arguments)
        except NoDaemon:
            if time.monotonic() >= deadline:
                raise
        time.sleep(RETRY)


#: Characters of a number; *float* and *int* accept blanks, ``1_0`` and other digits as well.
_NUMERIC = frozenset("0123456789.+-eE")


def bounded(
    convert: Callable[[str], NumberT], least: NumberT, most: NumberT, wrong: str
) -> Callable[[str], NumberT]:
    """Make the type of an option that takes a number.

    Args:
        convert: converts the text to a number, or raises ValueError.
        least: the lowest valid number.
        most: the highest valid number.
        wrong: text of the error, behind the given value.
    """

    def parse(text: str) -> NumberT:
        try:
            if _NUMERIC.issuperset(text) and least <= (value := convert(text)) <= most:
                return value
        except ValueError:
            pass
        raise argparse.ArgumentTypeError(f"{text!r}{wrong}")

    return parse


def number(name: str, least: int = 0, most: int = INT64_MAX) -> Callable[[str], int]:
    """Make the type of an option that takes a whole number, called *name* in errors."""
    bounds = f"{least} or more" if most == INT64_MAX else f"{least} to {most}"
    return bounded(_decimal, least, most, f": the {name} is a whole number, {bounds}")


def _decimal(text: str) -> int:
    """Convert decimal digits to a number; *int* would accept a sign as well."""
    if not text.isdecimal():
        raise ValueError
    return int(text)


def text(value: str) -> str:
    """Check the value of an option that is sent as a JSON string: it must be UTF-8."""
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise argparse.ArgumentTypeError(f"{value!r} is not UTF-8") from None
    return value


def socket_path(text: str) -> str:
    """Check the value of an option that names a socket; "" often is a shell's unset variable."""
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError(f"{text!r} is not the path of a socket")
    return text


#: Type of an option that takes a time; the maximum fits poll(2), which takes milliseconds as int.
seconds = bounded(
    float, sys.float_info.min, 1e6, " is not a time: a number of seconds above 0, up to 1000000"
)


#: Options of all verbs that connect to a daemon.
CONNECTION = [
    option(
        "--socket PATH",
        "the daemon's socket (default: $QMPFD_SOCKET, else $XDG_RUNTIME_DIR/qmpfd.sock, "
        "else /run/qmpfd.sock)",
        socket_path,
    ),
    option(
        "--timeout S",
        "wait for the daemon for at most S seconds (default: 10)",
        seconds,
        default=10.0,
    ),
]
JSON = option("--json", "print one JSON value instead of text")
