"""The connection of ``qmpfd shell``: sends commands, shows replies and events."""

from __future__ import annotations

import argparse
import errno
import json
import os
import select
import threading
import time
from cmd import Cmd
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

from ...client.blocking import BlockingClient, NoDaemon
from ...errors import QMPError
from ...kernel.fd import Fd
from ...protocol.client import QMPEvent
from ..exit_codes import UsageError
from ..opening import check_open, open_file
from ..options import client_of
from ..output import print_result, printable, terminal_width
from ..watch import event_members
from .schema import Schema
from .syntax import Typed, parse


class Session:
    """A connection to a QMP server: the main thread sends commands, another one shows events.

    Args:
        arguments: the verb's options.
        for_a_person: whether to connect again after the server has closed the connection.  A
            script must not go on without the state that belonged to the lost connection.
    """

    def __init__(self, arguments: argparse.Namespace, *, for_a_person: bool) -> None:
        self._arguments = arguments
        self._as_json: bool = arguments.json  # print one JSON value a line instead of text
        self._for_a_person = for_a_person
        #: Guards the connection and the output: the thread shows events while a line is typed.
        self._lock = threading.Lock()
        self._client: BlockingClient | None = None
        self._schema: Schema | None = None
        self._listener: threading.Thread | None = None
        self._wake: Fd | None = None
        self._handed_out: list[Fd] = []
        #: Prints a line from the thread while the user types another.
        self.show: Callable[[str], None] = _print
        #: Asks the user to confirm a command that ends the server.
        self.confirm: Callable[[str], bool] = lambda _: True

    # -- the connection ------------------------------------------------------------------------

    def _open(self) -> BlockingClient:
        """Return the connection, made on first use.  The caller holds the lock.

        Raises:
            NoDaemon: no server answers.
            QMPError: the server refuses the connection.
        """
        if self._listener is not None and not self._listener.is_alive() and self._for_a_person:
            self._disconnect()
        if self._client is None:
            self._client = client_of(self._arguments)
            self._wake = Fd(os.eventfd(0, os.EFD_CLOEXEC))
            listener = threading.Thread(
                target=self._listen, args=[self._client, self._wake], name="events", daemon=True
            )
            try:
                listener.start()
            except RuntimeError as exc:
                raise OSError(errno.EAGAIN, f"{exc} (ulimit -u)") from None
            self._listener = listener
        return self._client

    def _listen(self, client: BlockingClient, wake: Fd) -> None:
        """Show events as they come, until the connection ends, the output fails or *wake* is
        written to.
        """
        poll = select.poll()
        poll.register(client, select.POLLIN)
        poll.register(wake, select.POLLIN)
        while wake.fileno() not in dict(poll.poll()):
            with self._lock:
                try:
                    events = client.take_events()
                except (NoDaemon, QMPError) as exc:
                    if self._for_a_person:
                        self.show(f"qmpfd: {message(exc)}")
                    return
                try:
                    for event in events:
                        self.show(self._event_line(event))
                except OSError:  # the output of the next command fails too, and ends the verb
                    return

    def close(self) -> None:
        """Close the connection, and the descriptors received in replies."""
        self._disconnect()
        while self._handed_out:
            self._handed_out.pop().close()

    def _disconnect(self) -> None:
        client, wake, listener = self._client, self._wake, self._listener
        self._client = self._wake = self._listener = None
        if client is None or wake is None or listener is None:
            return
        os.eventfd_write(wake.fileno(), 1)
        listener.join()
        wake.close()
        client.close()

    def connect(self) -> Mapping[str, Any]:
        """Connect; return the server's greeting.

        Raises:
            NoDaemon, QMPError: no server answers, or it refuses the connection.
        """
        with self._lock:
            return self._open().greeting

    @property
    def schema(self) -> Schema:
        """The server's own description of its commands, queried on first use."""
        if self._schema is None:
            with self._lock:
                try:
                    self._schema = Schema(self._open().execute("query-qmp-schema"))
                except QMPError:  # the server lacks the command, or the policy forbids it
                    self._schema = Schema()
        return self._schema

    # -- commands ------------------------------------------------------------------------------

    def run(self, text: str) -> bool:
        """Execute a line, unless it is empty or a comment; return whether the shell goes on.

        Raises:
            UsageError, ValueError: the line is invalid.
            QMPError: the server refused the command.
            NoDaemon: the server does not answer.
        """
        words = text.split()
        if not words or words[0].startswith("#"):
            return True
        if words[0] == "exit":
            return False
        if words[0] == "help":
            self._help(words[1:])
            return True
        typed = parse(text, self._convert)
        if typed.command == "quit" and not self.confirm("This stops the server. Continue?"):
            return True
        try:
            self._ask(typed)
        except NoDaemon:
            self._disconnect()
            raise
        return True

    def _convert(self, command: str, name: str, text: str) -> Any:
        return self.schema.convert(command, name, text)  # the schema is queried here, on first use

    def _ask(self, typed: Typed) -> None:
        with ExitStack() as stack:
            fds: list[int] = []
            for each in typed.passed:
                if each.path:
                    fds.append(stack.enter_context(open_file(each.path, each.flags)).fileno())
                else:
                    check_open(each.number)
                    fds.append(each.number)
            with self._lock:
                client = self._open()
                try:
                    value, passed = client.request(typed.command, typed.arguments, fds)
                except QMPError as exc:
                    self._show_error(exc, typed)
                    raise
                self._handed_out += passed
                self._show_reply(value, passed, typed)
                try:
                    events = client.take_events()
                except NoDaemon:  # this command has its reply: the next one reports the error
                    return
                for event in events:
                    _print(self._event_line(event))

    def _show_reply(self, value: Any, passed: list[Fd], typed: Typed) -> None:
        numbers = [fd.fileno() for fd in passed]
        if self._as_json:
            reply = {"return": value, **typed.id}
            print_result({**reply, "fds": numbers} if numbers else reply)
            return
        print_result(readable(value))
        for number in numbers:
            _print(f"(open here as descriptor {number}: --fd {number} passes it on)")

    def _show_error(self, error: QMPError, typed: Typed) -> None:
        if self._as_json:
            members = {"class": error.error_class, "desc": error.desc}
            print_result({"error": members, **typed.id})

    def _event_line(self, event: QMPEvent) -> str:
        if self._as_json:
            return json.dumps(event_members(event))
        at = time.strftime("%H:%M:%S", time.localtime(event.seconds))
        return printable(f"{at} {event.name} {json.dumps(event.data, ensure_ascii=False)}")

    def _help(self, names: list[str]) -> None:
        known = self.schema.commands()
        if not names:
            if not known:
                _print("this server has no query-qmp-schema: it does not describe its commands")
            Cmd().columnize([*map(printable, known)], terminal_width())
            _print(
                "\nhelp COMMAND shows its arguments. A command is its name and name=value, or JSON;"
                "\n< FILE or --fd N passes a descriptor. exit, or Ctrl-D, leaves."
            )
            return
        for name in names:
            if name not in known:
                raise UsageError(f"the server has no command {name!r} (help lists its commands)")
            _print("\n".join(map(printable, self.schema.help(name).split("\n"))))


def readable(value: Any) -> str:
    """Format a reply as JSON: on one line if it fits, else indented on several."""
    line = json.dumps(value, ensure_ascii=False)
    if len(line) <= terminal_width():
        return printable(line)
    lines = json.dumps(value, ensure_ascii=False, indent=2).split("\n")
    return "\n".join(map(printable, lines))


def message(error: Exception) -> str:
    """Format an error in one line."""
    if isinstance(error, QMPError):
        return printable(f"{error.error_class}: {error.desc}")
    return printable(str(error))


#: Errors of one command, after which the shell goes on.
ERRORS = (UsageError, ValueError, QMPError)


def _print(text: str) -> None:
    print(text, flush=True)
