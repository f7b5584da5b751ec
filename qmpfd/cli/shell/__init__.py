"""``qmpfd shell``: sends QMP commands that are typed, or read from a script."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Iterable, Iterator
from contextlib import closing

from ...client.blocking import NoDaemon
from ..exit_codes import DONE, REFUSED
from ..options import CONNECTION, JSON, default_socket, option
from ..output import print_error, printable
from ..status import server_name
from .prompt import lines
from .session import ERRORS, Session, message
from .syntax import unfinished

SUMMARY = "send QMP commands, typed or from a script"
DESCRIPTION = (
    "Send QMP commands to the daemon, or to a QEMU. A command is its name and "
    "arguments as name=value, or a JSON object, which may have several lines. < FILE or --fd "
    "N passes a descriptor. On a terminal, the shell has history, help and completion. "
    "Otherwise it reads commands from standard input, one a line; a line that begins with # is "
    "a comment."
)
EXAMPLES = [
    "qmpfd shell",
    "qmpfd shell --socket /run/vm1/qmp.sock",
    "qmpfd shell -c 'add-fd opaque=log >> /var/log/vm1.log' -c query-fdsets",
    "qmpfd shell --json < commands",
]
EXIT_STATUS = (
    "  0 done, 1 the server refused a command (the others are run all the same),\n"
    "  2 usage, 3 no daemon, or the daemon closed the connection"
)
OPTIONS = [
    *CONNECTION,
    JSON,
    option(
        "-c COMMAND",
        "run this command and exit; may be given more than once",
        dest="commands",
        action="append",
    ),
]


def run(arguments: argparse.Namespace) -> int:
    person = not arguments.commands and sys.stdin.isatty() and sys.stdout.isatty()
    with closing(Session(arguments, for_a_person=person)) as session:
        version = session.connect().get("version")
        if arguments.commands:
            return _script(session, enumerate(arguments.commands, 1), "command")
        if not person:
            return _script(session, _from_stdin(), "line")
        where = printable(arguments.socket or default_socket())
        print(f"{server_name(version)} at {where}; help lists the commands, Ctrl-D leaves")
        _interactive(session)
        return DONE


def _script(session: Session, commands: Iterable[tuple[int, str]], unit: str) -> int:
    """Run all commands, even after one has failed, until NoDaemon; return the exit status."""
    status = DONE
    for number, text in commands:
        try:
            if not session.run(text):
                break
        except ERRORS as exc:
            print_error(f"qmpfd: {unit} {number}: {message(exc)}")
            status = REFUSED
    return status


def _from_stdin() -> Iterator[tuple[int, str]]:
    """Iterate over the commands on standard input, each with the number of its first line."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # the client refuses what is not UTF-8
    first, text = 0, ""
    for number, line in enumerate(sys.stdin, 1):
        first = first if text else number
        # Only a line with a closing brace can end a JSON object: parse only then.
        may_end = "}" in line or not text
        text += line
        if may_end and not unfinished(text):
            yield first, text
            text = ""
    if text:
        yield first, text


def _interactive(session: Session) -> None:
    def confirm(question: str) -> bool:
        return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")

    session.confirm = confirm
    for text in lines(session):
        try:
            if not session.run(text):
                return
        except (*ERRORS, NoDaemon) as exc:
            print(message(exc), flush=True)
        except (KeyboardInterrupt, EOFError):
            print("interrupted", flush=True)
