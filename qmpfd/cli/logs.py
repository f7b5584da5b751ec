"""What the daemon says on standard error: for people, for the journal, or for programs."""

from __future__ import annotations

import logging
import os
import select
import sys
import time
from typing import Any, TextIO

from ..protocol.encode import encode

#: syslog(3)'s priorities, as the journal reads them from the beginning of a line (sd-daemon(3)).
_PRIORITIES = {
    logging.DEBUG: 7,
    logging.INFO: 6,
    logging.WARNING: 4,
    logging.ERROR: 3,
    logging.CRITICAL: 2,
}

#: What a record can say besides its message, see the server's log calls.
_FIELDS = ("pid", "uid", "command", "fdset_id", "fd", "outcome")


class _TextFormatter(logging.Formatter):
    """One line for people; with the priority in front where the journal reads along."""

    def __init__(self, journal: bool) -> None:
        super().__init__("qmpfd: %(message)s")
        self._journal = journal

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return f"<{_PRIORITIES.get(record.levelno, 6)}>{text}" if self._journal else text


class _JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        told: dict[str, Any] = {
            "time": f"{stamp}.{int(record.msecs):03}Z",
            "level": record.levelname.lower(),
            "message": record.getMessage(),
        }
        for field in _FIELDS:
            value = getattr(record, field, None)
            if value is not None:
                told[field.replace("_", "-")] = value
        if record.exc_info:
            told["exception"] = self.formatException(record.exc_info)
        return encode(told).decode("ascii")


class _Handler(logging.StreamHandler[TextIO]):
    """Writes where nobody may be reading: rather than wait, it leaves lines out, and says so."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._left_out = 0

    def _ready(self) -> bool:
        """Whether a line can be written without waiting.  A pipe that is ready has room for
        PIPE_BUF bytes (pipe(7)).
        """
        try:  # not poll, which fails where no descriptors are allowed any more
            return bool(select.select([], [self.stream], [], 0)[1])
        except (OSError, ValueError):  # no descriptor behind it
            return True

    def emit(self, record: logging.LogRecord) -> None:
        if not self._ready():
            self._left_out += 1
            return
        if self._left_out:
            lost = logging.LogRecord(
                record.name,
                logging.WARNING,
                "",
                0,
                "%d lines were left out: nobody took them",
                (self._left_out,),
                None,
            )
            self._left_out = 0
            super().emit(lost)
        super().emit(record)


def set_up(form: str, level: str) -> None:
    """Log to standard error.

    Args:
        form: ``text`` or ``json``.
        level: ``debug``, ``info``, ``warning`` or ``error``.
    """
    handler = _Handler(sys.stderr)
    if form == "json":
        handler.setFormatter(_JsonFormatter())
    else:
        handler.setFormatter(_TextFormatter("JOURNAL_STREAM" in os.environ))
    log = logging.getLogger("qmpfd")
    log.handlers[:] = [handler]
    log.setLevel(level.upper())
    log.propagate = False
