"""Handles the messages of a worker: stores its descriptors, closes them, sends them back."""

from __future__ import annotations

import socket
import time
from operator import methodcaller

from .log import Log
from .program import Program
from .store import Store, close
from .worker import Worker

#: Minimum seconds between two log lines that say that there is no room for a descriptor.
_LOG_INTERVAL = 10.0

#: Splits a line of a message, which is an assignment.
_split = methodcaller("split", b"=", 1)

#: Variables of a message that only changes the store; and all variables that are for the parent and
#: are not forwarded to its service manager.
_USUAL = {b"FDSTORE", b"FDSTOREREMOVE", b"FDNAME", b"FDPOLL", b"QMPFD_SYNC", b"QMPFD_CLOSE"}
_OURS = _USUAL | {b"BARRIER", b"MAINPID", b"QMPFD_SOCKETS", b"QMPFD_FETCH", b"QMPFD_SPARE"}


class Mailbox:
    """Handles the messages of a worker, see :mod:`supervisor`.

    Args:
        log: the parent's log.
        store: the stored descriptors.
        program: keeps the spare worker.
    """

    def __init__(self, log: Log, store: Store, program: Program) -> None:
        self._log = log
        self._store = store
        self._program = program
        self._lost_logged_at = -_LOG_INTERVAL

    def handle(
        self, worker: Worker, data: bytes, fds: list[int], truncated: bool
    ) -> tuple[bool, list[bytes] | None]:
        """Handle one message; close those of its descriptors that are not stored.

        Args:
            worker: the worker that has sent it.
            data: the message.
            fds: its descriptors.
            truncated: whether some descriptors were lost, as the parent is out of descriptors.

        Returns:
            Whether the worker waits for an answer; and the lines for the parent's service manager.
        """
        try:
            lines: dict[bytes, bytes] = dict(map(_split, data.split(b"\n")))
        except ValueError:  # ignore a line that is not an assignment
            lines = dict(_split(line) for line in data.split(b"\n") if b"=" in line)
        names = lines.get(b"FDNAME", b"").split(b":")
        if lines.get(b"FDSTOREREMOVE") == b"1":
            lane = lines.get(b"QMPFD_CLOSE")
            for name in names:
                self._store.remove(name, lane)
        if lines.get(b"FDSTORE") == b"1" and (len(names) in (1, len(fds)) or truncated):
            for name, number in zip(names, fds, strict=False):
                self._store.add(name, number)
            names, fds = names[len(fds) :], fds[len(names) :]
            if truncated:
                self._report_lost(worker, names)
        others = None if lines.keys() <= _USUAL else self._handle_others(worker, lines, fds)
        for number in fds:
            close(number)
        sync = lines.get(b"QMPFD_SYNC")
        if sync is not None:
            worker.send(b"SYNCED=" + sync)
        return sync is not None or b"BARRIER" in lines, others

    def _report_lost(self, worker: Worker, names: list[bytes]) -> None:
        """Log that there was no room for these descriptors, and send LOST for each."""
        now = time.monotonic()
        if names and self._lost_logged_at + _LOG_INTERVAL < now:  # the worker retries often
            self._lost_logged_at = now
            self._log.log(
                "error",
                "out of file descriptors: a stored descriptor was not kept safe; its client waits "
                "until it is",
            )
        for name in names:
            worker.send(b"LOST=" + name)

    def _handle_others(
        self, worker: Worker, lines: dict[bytes, bytes], fds: list[int]
    ) -> list[bytes]:
        """Handle the rarer lines; take a spare worker's socket out of *fds*.  Return the lines for
        the parent's service manager.
        """
        spare = lines.get(b"QMPFD_SPARE", b"")
        if spare.isdigit() and len(fds) == 1:
            self._program.take_spare(Worker(int(spare), socket.socket(fileno=fds.pop())))
        if b"QMPFD_FETCH" in lines:
            stored = self._store.fds
            names = [name for name in lines[b"QMPFD_FETCH"].split(b":") if name in stored]
            worker.send(b"FETCHED=" + b":".join(names), [stored[name] for name in names])
        if b"QMPFD_SOCKETS" in lines:
            self._store.files = lines[b"QMPFD_SOCKETS"].split()
        return [b"%b=%b" % item for item in lines.items() if item[0] not in _OURS]
