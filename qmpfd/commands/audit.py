"""The audit trail: a JSON line for each descriptor that comes, goes or is handed out, and for each
refusal.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from msgspec import UNSET, Struct

from ..errors import QMPError
from ..fdsets import Peer, StoredFd
from ..protocol.encode import encode

#: Characters of an opaque text, or of an error's, that a line repeats.
_QUOTED = 1024


class AuditLine(Struct, omit_defaults=True, gc=False):
    """A line.

    Args:
        time: when, in UTC.
        pid: the process that asked for it; absent if the daemon did it by itself.
        uid: the user of that process.
        command: the command; absent where there was none: a time was over, a connection ended.
        set: the fd set.
        fd: the number in the daemon.
        opaque: the opaque text, its first 1,024 characters.
        name: the name, of a descriptor of ``getfd``.
        outcome: ``added``, ``opened``, ``removed``, ``replaced``, ``expired``, ``hangup``,
            ``connection`` (removed with its end), ``ended`` (with the daemon), or the class and
            text of the error.
    """

    time: str
    outcome: str
    pid: int | None = None
    uid: int | None = None
    command: str | None = None
    set: int | None = None
    fd: int | None = None
    opaque: str | None = None
    name: str | None = None


class Audit:
    """Makes the lines of the audit trail, and passes them to *write*, which never blocks."""

    def __init__(self, write: Callable[[bytes], None]) -> None:
        self._write = write
        self._peer: Peer | None = None
        self._command: str | None = None

    def begin(self, peer: Peer, command: str | None) -> None:
        """Attribute the following lines to *peer* and the command, until :meth:`end`."""
        self._peer, self._command = peer, command

    def end(self) -> None:
        """Attribute the following lines to the daemon itself."""
        self._peer = self._command = None

    def record(self, outcome: str, stored: StoredFd) -> None:
        """Record that a descriptor was added, removed or handed out."""
        self._put(outcome, set=stored.fdset.id, fd=stored.fd.number, opaque=stored.opaque)

    def record_named(self, outcome: str, name: str, fd: int) -> None:
        """Record that a descriptor of ``getfd`` was added or removed."""
        self._put(outcome, fd=fd, name=name)

    def refuse(self, error: QMPError, arguments: Struct | None = None) -> None:
        """Record that a command or a connection was refused."""
        members = {"set": "fdset_id", "fd": "fd", "opaque": "opaque", "name": "fdname"}
        given = {key: getattr(arguments, member, None) for key, member in members.items()}
        fields = {key: value for key, value in given.items() if value is not UNSET}
        self._put(f"{error.error_class}: {error.desc}", **fields)

    def _put(self, outcome: str, **fields: Any) -> None:
        seconds, nanoseconds = divmod(time.time_ns(), 1_000_000_000)
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
        quoted: dict[str, Any] = {
            key: _quoted(value) if isinstance(value, str) else value
            for key, value in fields.items()
        }
        line = AuditLine(
            time=f"{stamp}.{nanoseconds // 1000:06}Z",
            outcome=_quoted(outcome),
            pid=None if self._peer is None else self._peer.pid,
            uid=None if self._peer is None else self._peer.uid,
            command=self._command,
            **quoted,
        )
        self._write(encode(line) + b"\n")


def _quoted(text: str) -> str:
    """The beginning of *text*; a surrogate, which JSON cannot carry, is escaped."""
    return text[:_QUOTED].encode("utf-8", "backslashreplace").decode()
