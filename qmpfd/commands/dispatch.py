"""Carries out requests: from the table to an outcome, the result or the error of a command."""

from __future__ import annotations

import logging

import outcome
from msgspec import UNSET

from ..errors import GenericError, QMPError
from ..fd import Fd
from ..protocol import Request, Vocabulary
from . import control, fds, own
from .context import Context
from .table import Command, Table

_log = logging.getLogger("qmpfd")

TABLE = Table({**control.table.commands, **fds.table.commands, **own.table.commands})
VOCABULARY = Vocabulary(TABLE.specs())
_COMMANDS: dict[type[Request], Command] = {
    request: TABLE.commands[name] for request, name in VOCABULARY.names.items()
}


def execute(context: Context, request: Request, passed: list[Fd]) -> outcome.Outcome[object]:
    """Carry out *request*; its result or its QMPError.

    Args:
        context: the connection that it came from.
        request: what to do.
        passed: the descriptors that came with it; what the command does not keep is garbage.
    """
    command = _COMMANDS[type(request)]
    arguments = request.arguments
    context.fds = passed
    if command.about_store:
        context.about_store = True
    result: outcome.Outcome[object] = outcome.capture(
        command.run, context, command.nothing if arguments is UNSET else arguments
    )
    context.daemon.stats.commands[command.name] += 1
    if passed:
        context.connection.garbage += passed
    if type(result) is outcome.Error and not isinstance(result.error, QMPError):
        # A fault of ours: told to the client as such, and to whoever runs the daemon in full.
        _log.error("%s failed", command.name, exc_info=result.error)
        return outcome.Error(GenericError(f"internal error in '{command.name}'"))
    return result
