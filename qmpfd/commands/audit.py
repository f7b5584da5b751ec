"""The audit trail: a JSON line for each descriptor that comes, goes or is handed out, and for each
refusal.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from ..errors import QMPError
from ..fdsets import Peer, StoredFd
from ..protocol.encode import encode

#: Characters of an opaque text, or of an error's, that a line repeats.
_QUOTED = 1024


class Audit:
    """Makes the lines of the audit trail, and passes them to *write*, which never blocks.

    A line has the members

    - ``time``: when, in UTC.
    - ``outcome``: ``added``, ``opened``, ``removed``, ``replaced``, ``expired``, ``hangup``,
      ``connection`` (removed with its end), ``ended`` (with the daemon), or the class and text of
      the error.
    - ``pid``, ``uid``: the process that asked for it, and its user; absent if the daemon did it by
      itself.
    - ``command``: absent where there was none: a time was over, a connection ended, a request was
      no valid one.
    - ``set``, ``fd``: the fd set, and the number in the daemon.
    - ``opaque``: the opaque text, its first 1,024 characters.
    - ``name``: the name, of a descriptor of ``getfd``.
    """

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

    def refuse(
        self, peer: Peer, command: str | None, error: QMPError, arguments: object = None
    ) -> None:
        """Record that a command of *peer*, or its connection, was refused."""
        self.begin(peer, command)
        members = {"set": "fdset_id", "fd": "fd", "opaque": "opaque", "name": "fdname"}
        given = {key: getattr(arguments, member, None) for key, member in members.items()}
        fields = {key: value for key, value in given.items() if value is not None}
        self._put(f"{error.error_class}: {error.desc}", **fields)
        self.end()

    def _put(self, outcome: str, **fields: Any) -> None:
        seconds, nanoseconds = divmod(time.time_ns(), 1_000_000_000)
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
        peer = self._peer
        line = {
            "time": f"{stamp}.{nanoseconds // 1000:06}Z",
            "outcome": outcome,
            "pid": None if peer is None else peer.pid,
            "uid": None if peer is None else peer.uid,
            "command": self._command,
            **fields,
        }
        text = {
            key: _quoted(value) if isinstance(value, str) else value
            for key, value in line.items()
            if value is not None
        }
        self._write(encode(text) + b"\n")


def _quoted(text: str) -> str:
    """The beginning of *text*; a surrogate, which JSON cannot carry, is escaped."""
    return text[:_QUOTED].encode("utf-8", "backslashreplace").decode()
