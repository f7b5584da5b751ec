"""Audit trail: one JSON line per descriptor added, removed or handed out, and per refusal."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from ..errors import QMPError
from ..fdsets import Peer, StoredFd
from ..protocol.encode import encode

#: Maximum characters of an opaque text or error text in a line.
_QUOTED = 1024


class Audit:
    """Formats the lines of the audit trail, and passes them to *write*, which never blocks.

    A line has the members

    - ``time``: time of the event, in UTC.
    - ``outcome``: ``added``, ``opened``, ``removed``, ``replaced``, ``expired``, ``hangup``,
      ``connection`` (removed at its end), ``ended`` (removed at the daemon's end), or the class and
      text of the error.
    - ``pid``, ``uid``: the client's process and user; absent if the daemon acted by itself.
    - ``command``: the command; absent after an expiry or the end of a connection, and for an
      invalid request.
    - ``set``, ``fd``: the fd set, and the descriptor's number in the daemon.
    - ``opaque``: the first 1,024 characters of the opaque text.
    - ``name``: the name of a descriptor of ``getfd``.
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
    """Return the beginning of *text*, with surrogates escaped, which JSON cannot express."""
    return text[:_QUOTED].encode("utf-8", "backslashreplace").decode()
