"""The daemon's log on standard error: for people, for the journal, or as JSON."""

from __future__ import annotations

import logging
import os
import stat
import sys
import time
from typing import Any, TextIO

from ..kernel.streams import write_nowait
from ..protocol.encode import encode
from .output import printable

#: Priorities of syslog(3), which the journal reads from the prefix of a line (sd-daemon(3)).
_PRIORITIES = {
    logging.DEBUG: 7,
    logging.INFO: 6,
    logging.WARNING: 4,
    logging.ERROR: 3,
    logging.CRITICAL: 2,
}

#: Further fields of a log record (the ``extra`` of the server's log calls).
_FIELDS = ("pid", "uid", "command", "fdset_id", "fd", "opaque", "outcome")


def _stamp(record: logging.LogRecord) -> str:
    """Format the time of the record, in UTC."""
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    return f"{stamp}.{int(record.msecs):03}Z"


class _TextFormatter(logging.Formatter):
    """Formats a record as one line of text, and a traceback as further lines.

    Args:
        journal: whether each line begins with its priority, for the journal.
        timed: whether each line begins with the time: the reader of the log adds none.
    """

    def __init__(self, *, journal: bool, timed: bool) -> None:
        super().__init__()
        self._journal = journal
        self._timed = timed

    def format(self, record: logging.LogRecord) -> str:
        start = f"<{_PRIORITIES.get(record.levelno, 6)}>" if self._journal else ""
        if self._timed:
            start += f"{_stamp(record)} "
        lines = [f"{start}qmpfd: {printable(record.getMessage())}"]
        if record.exc_info:
            traceback = self.formatException(record.exc_info).split("\n")
            lines += [f"{start}qmpfd: | {printable(line)}" for line in traceback]
        return "\n".join(lines)


class _JsonFormatter(logging.Formatter):
    """Formats a record as a JSON object on one line."""

    def format(self, record: logging.LogRecord) -> str:
        members: dict[str, Any] = {
            "time": _stamp(record),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
        }
        for field in _FIELDS:
            value = getattr(record, field, None)
            if value is not None:
                members[field.replace("_", "-")] = value
        if record.exc_info:
            members["exception"] = self.formatException(record.exc_info)
        for field, value in members.items():
            if isinstance(value, str):  # may have surrogates: a path need not be UTF-8
                members[field] = value.encode("utf-8", "backslashreplace").decode()
        return encode(members).decode("ascii")


class _Handler(logging.StreamHandler[TextIO]):
    """Writes without blocking: lines for which the pipe has no room are dropped and counted."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._left_out = 0
        self._rest = b""  # the unwritten end of the last line

    def emit(self, record: logging.LogRecord) -> None:
        try:
            number = self.stream.fileno()
        except (OSError, ValueError):  # the stream has no descriptor
            super().emit(record)
            return
        try:
            self._emit(number, record)
        except Exception:  # noqa: BLE001 - the disk is full, the reader gone, no memory: no task ends
            self._left_out += 1

    def _emit(self, number: int, record: logging.LogRecord) -> None:
        if self._rest:
            self._rest = self._rest[write_nowait(number, self._rest) :]
        lines = self.format(record)
        if self._left_out:
            text = f"{self._left_out} log lines are missing here: standard error was full"
            lost = logging.LogRecord(record.name, logging.WARNING, "", 0, text, None, None)
            lines = f"{self.format(lost)}\n{lines}"
        data = f"{lines}\n".encode("utf-8", "backslashreplace")
        taken = 0 if self._rest else write_nowait(number, data)
        if taken:
            self._rest = data[taken:]
            self._left_out = 0
        else:
            self._left_out += 1


def _text_formatter(stream: TextIO) -> _TextFormatter:
    try:
        found = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return _TextFormatter(journal=False, timed=False)
    # The reader of a pipe or socket (s6-log, a container's engine, the journal) adds the time.
    timed = stat.S_ISREG(found.st_mode) or stream.isatty()
    # Compare: a process whose output is redirected inherits the variable too (systemd.exec(5)).
    journal = os.environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"
    return _TextFormatter(journal=journal, timed=timed)


def set_up(form: str, level: str) -> None:
    """Log to standard error in the format *form*: ``text`` or ``json``."""
    handler = _Handler(sys.stderr)
    handler.setFormatter(_JsonFormatter() if form == "json" else _text_formatter(sys.stderr))
    log = logging.getLogger("qmpfd")
    log.handlers[:] = [handler]
    log.setLevel(level.upper())
    log.propagate = False
