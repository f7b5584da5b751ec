"""Executes requests: looks up the command in the table, and returns its result or error."""

from __future__ import annotations

import logging

from msgspec import UNSET
from outcome import Error, Outcome, Value

from ..errors import GenericError, QMPError
from ..kernel.fd import Fd
from ..protocol.request_decoder import Request, RequestDecoder
from . import control, fds
from . import extensions as own
from .context import Context
from .table import Command, Table
from .types import NOTHING

_log = logging.getLogger("qmpfd")

TABLE: Table[Context] = Table(
    {**control.table.commands, **fds.table.commands, **own.table.commands}
)
DECODER = RequestDecoder(TABLE.commands)
_COMMANDS: dict[type[Request], Command[Context]] = {
    request: TABLE.commands[name] for request, name in DECODER.names.items()
}


#: Outcome of a command without a result.  It is shared: it must not be unwrapped, which works once.
_DONE: Outcome[object] = Value(NOTHING)


def execute(context: Context, request: Request, received: list[Fd]) -> Outcome[object]:
    """Execute *request*; return its result or its QMPError.

    Args:
        context: the context of the connection.
        request: the request.
        received: its descriptors; those that the command does not store are closed.
    """
    command = _COMMANDS[type(request)]
    arguments = request.arguments
    if arguments is UNSET:
        arguments = command.nothing
    context.fds = received
    if command.touches_store:
        context.touched_store = True
    audit = context.shared.audit
    if audit is not None:
        audit.begin(context.peer, command.name)
    result: Outcome[object]
    try:
        returned = command.run(context, arguments)
    except QMPError as exc:
        result = Error(exc)
    except Exception as exc:  # noqa: BLE001 - a bug in one command must not end the daemon
        # The client gets an error without details; the log has the traceback.
        _log.error("%s failed", command.name, exc_info=exc)
        result = Error(GenericError(f"internal error in '{command.name}'"))
    else:
        result = _DONE if returned is None else Value(returned)
    if audit is not None:
        audit.end()
    context.shared.stats.commands[command.name] += 1
    if received:
        context.connection.fds_to_close += received
    return result
