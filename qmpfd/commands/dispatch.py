"""Executes requests: finds the command in the table, and returns its result or its error."""

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
DECODER = RequestDecoder(TABLE.specs())
_COMMANDS: dict[type[Request], Command[Context]] = {
    request: TABLE.commands[name] for request, name in DECODER.names.items()
}


#: The outcome of most commands.  Shared, and so only read: an Outcome can be unwrapped once.
_DONE: Outcome[object] = Value(NOTHING)


def execute(context: Context, request: Request, received: list[Fd]) -> Outcome[object]:
    """Execute *request*, and return its result or its QMPError.

    Args:
        context: the connection that it came from.
        request: what to do.
        received: the descriptors that came with it; what the command does not keep is closed.
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
    except Exception as exc:  # noqa: BLE001 - whatever it is, one command failed and no more
        # A fault of ours: told to the client as such, and to whoever runs the daemon in full.
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
