"""Options that several verbs share, and the types of their values."""

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
    usage: str, told: str, kind: Callable[[str], Any] | None = None, **settings: Any
) -> Option:
    """An option or an argument of a verb.

    Args:
        usage: its names and its value, as in ``-n --number N``; the name alone of a switch, or of
            an argument.
        told: its help.
        kind: reads the value.
        settings: whatever else argparse is to know.
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
    return lambda parser: parser.add_argument(*names, help=told, **settings)


def one_of(*options: Option, required: bool = False) -> Option:
    """Options of which a command line has one at most; just one if one is *required*."""

    def add(parser: argparse._ActionsContainer) -> None:
        group = parser.add_mutually_exclusive_group(required=required)
        for each in options:
            each(group)

    return add


class Formatter(argparse.HelpFormatter):
    """Leaves text of several lines as it is: the examples at the end of a help."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=terminal_width() - 2)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if "\n" in text else super()._fill_text(text, width, indent)

    def add_argument(self, action: argparse.Action) -> None:
        super().add_argument(action)
        if isinstance(action, argparse._SubParsersAction):
            # Room for the longest verb: argparse forgets that verbs are indented.
            self._action_max_length += self._indent_increment


def default_socket() -> str:
    """Where the daemon is: ``$QMPFD_SOCKET``, else the user's runtime directory, else /run."""
    if named := os.environ.get("QMPFD_SOCKET"):
        return named
    if runtime := os.environ.get("XDG_RUNTIME_DIR"):
        return os.path.join(runtime, "qmpfd.sock")
    return _SYSTEM_SOCKET


#: Where a daemon of the whole system serves.
_SYSTEM_SOCKET = "/run/qmpfd.sock"


def client_of(arguments: argparse.Namespace) -> BlockingClient:
    """The daemon that a verb's options name.

    Raises:
        NoDaemon: nobody answers there.
        QMPError: the daemon refuses this user's connection.
    """
    path = arguments.socket or default_socket()
    try:
        return BlockingClient(path, arguments.timeout)
    except FileNotFoundError as exc:
        # The user's own is looked for first, and a login session always has a folder for it.
        if arguments.socket or path == _SYSTEM_SOCKET or not os.path.exists(_SYSTEM_SOCKET):
            raise
        why = f"no daemon at {path}; there is one at {_SYSTEM_SOCKET} (--socket {_SYSTEM_SOCKET})"
        raise NoDaemon(why) from exc


#: Seconds between two tries to reach a daemon that does not serve yet.
_RETRY = 0.05


def client_within(arguments: argparse.Namespace, patience: float) -> BlockingClient:
    """As :func:`client_of`; retries for *patience* seconds while no daemon answers."""
    deadline = time.monotonic() + patience
    while True:
        try:
            return client_of(arguments)
        except NoDaemon:
            if time.monotonic() >= deadline:
                raise
        time.sleep(_RETRY)


def bounded(
    convert: Callable[[str], NumberT], least: NumberT, most: NumberT, wrong: str
) -> Callable[[str], NumberT]:
    """The type of an option that takes a number.

    Args:
        convert: reads it; may raise ValueError.
        least: the lowest that it may be.
        most: the highest.
        wrong: what an error says behind the text that was given.
    """

    def parse(text: str) -> NumberT:
        try:
            value = convert(text)
            if least <= value <= most:
                return value
        except ValueError:
            pass
        raise argparse.ArgumentTypeError(f"{text!r}{wrong}")

    return parse


def number(name: str, least: int = 0, most: int = INT64_MAX) -> Callable[[str], int]:
    """The type of an option that takes a whole number, called *name* in errors."""
    bounds = f"{least} or more" if most == INT64_MAX else f"{least} to {most}"
    return bounded(int, least, most, f": the {name} is a whole number, {bounds}")


def text(value: str) -> str:
    """The type of an option that goes to the daemon as a JSON string."""
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise argparse.ArgumentTypeError(f"{value!r} is not UTF-8") from None
    return value


def socket_path(text: str) -> str:
    """The type of an option that names a socket: an empty one is a shell's unset variable."""
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError(f"{text!r} is not the path of a socket")
    return text


#: The type of an option that takes a time; poll(2) takes milliseconds, as a C int.
seconds = bounded(
    float, sys.float_info.min, 1e6, " is not a time: a number of seconds above 0, up to 1000000"
)


#: What all verbs share that connect to a daemon.
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
