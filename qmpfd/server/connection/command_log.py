"""Counts and audits errors, and logs each command with its outcome at level debug."""

from __future__ import annotations

import logging

from outcome import Error, Outcome, Value

from ...commands import DECODER, OpenedFd, SharedState
from ...errors import QMPError
from ...fdsets import Peer
from ...protocol.request_decoder import Request

_log = logging.getLogger("qmpfd")

#: Characters of an opaque text in a log line; and of it, or of an error that quotes the request, in
#: a log record.
_QUOTED, _RECORDED = 64, 1024


def note(
    shared: SharedState, peer: Peer, request: Request | Error | None, result: Outcome[object]
) -> None:
    """Count and audit *result* if it is an error, and log the command at level debug.

    Args:
        shared: the error counters and the audit trail.
        peer: the client.
        request: the request; an error if the client's message is no valid request, and None if the
            request is not known any more.
        result: the outcome of the command.
    """
    name, arguments = None, None
    if isinstance(request, Request):
        name, arguments = DECODER.names[type(request)], request.arguments
    if isinstance(result, Error):
        assert isinstance(result.error, QMPError)
        shared.stats.errors[result.error.error_class] += 1
        if shared.audit is not None:
            shared.audit.refuse(peer, name, result.error, arguments)
    if not _log.isEnabledFor(logging.DEBUG):
        return
    outcome = str(result.error)[:_RECORDED] if isinstance(result, Error) else "done"
    value = result.value if isinstance(result, Value) else None
    handed_out = value if isinstance(value, OpenedFd) else None
    opaque = None if handed_out is None else handed_out.opaque
    extra = {
        "pid": peer.pid,
        "uid": peer.uid,
        "command": name,
        "fdset_id": _first_int("fdset_id", value, arguments),
        "fd": _first_int("fd", value, arguments),
        "opaque": opaque and opaque[:_RECORDED],
        "outcome": outcome,
    }
    which = "" if handed_out is None else _which(handed_out)
    line = "pid %d, uid %d: %s%s: %s"
    _log.debug(line, *peer[:2], name or "bad request", which, outcome, extra=extra)


def _which(opened: OpenedFd) -> str:
    """The descriptor that was handed out, escaped so that its text cannot forge a log line."""
    text = "" if opened.opaque is None else f" opaque={opened.opaque[:_QUOTED]!a}"
    return f" fdset-id={opened.fdset_id} fd={opened.fd}{text}"


def _first_int(member: str, *structs: object) -> int | None:
    """Return the first integer member called *member* of *structs*; None if there is none."""
    values = (getattr(struct, member, None) for struct in structs)
    return next((value for value in values if isinstance(value, int)), None)
