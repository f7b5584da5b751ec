"""What a worker asks of its parent: to keep descriptors, to close them, to send them back."""

from __future__ import annotations

import socket
import time
from operator import methodcaller

from .log import Log
from .program import Program
from .store import Store, close
from .worker import Worker

#: Seconds until the log says again that there is no room for a descriptor.
_LOG_INTERVAL = 10.0

#: A line of a message is an assignment.
_split = methodcaller("split", b"=", 1)

#: What a message may be about that is nothing but a change of what is kept; all that is for us, and
#: not for the service manager: the rest of it means nothing to that.
_USUAL = {b"FDSTORE", b"FDSTOREREMOVE", b"FDNAME", b"FDPOLL", b"QMPFD_SYNC", b"QMPFD_CLOSE"}
_OURS = _USUAL | {b"BARRIER", b"MAINPID", b"QMPFD_SOCKETS", b"QMPFD_FETCH", b"QMPFD_SPARE"}


class Mailbox:
    """Does what the messages of a worker say, see :mod:`supervisor`.

    Args:
        log: told where there is no room.
        store: the descriptors that are kept.
        program: gets the spare worker.
    """

    def __init__(self, log: Log, store: Store, program: Program) -> None:
        self._log = log
        self._store = store
        self._program = program
        self._lost_logged_at = -_LOG_INTERVAL

    def handle(
        self, worker: Worker, data: bytes, fds: list[int], truncated: bool
    ) -> tuple[bool, list[bytes] | None]:
        """Do what one message says; what it came with and is not kept is closed.

        Args:
            worker: whose message it is.
            data: the message.
            fds: the descriptors that it came with.
            truncated: there was no room for all of them.

        Returns:
            Whether the worker waits for an answer to it; and the lines that are not for us.
        """
        try:
            lines: dict[bytes, bytes] = dict(map(_split, data.split(b"\n")))
        except ValueError:  # a line is no assignment, and does not count
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
                self._say_lost(worker, names)
        others = None if lines.keys() <= _USUAL else self._handle_others(worker, lines, fds)
        for number in fds:
            close(number)
        sync = lines.get(b"QMPFD_SYNC")
        if sync is not None:
            worker.send(b"SYNCED=" + sync)
        return sync is not None or b"BARRIER" in lines, others

    def _say_lost(self, worker: Worker, names: list[bytes]) -> None:
        """Say that there was no room for these descriptors."""
        now = time.monotonic()
        if names and self._lost_logged_at + _LOG_INTERVAL < now:  # it comes again soon
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
        """Do what is said more rarely; what is kept of *fds* is taken out."""
        spare = lines.get(b"QMPFD_SPARE", b"")
        if spare.isdigit() and len(fds) == 1:
            self._program.take_spare(int(spare), socket.socket(fileno=fds.pop()))
        if b"QMPFD_FETCH" in lines:
            kept = self._store.fds
            names = [name for name in lines[b"QMPFD_FETCH"].split(b":") if name in kept]
            worker.send(b"FETCHED=" + b":".join(names), [kept[name] for name in names])
        if b"QMPFD_SOCKETS" in lines:
            self._store.files = lines[b"QMPFD_SOCKETS"].split()
        return [b"%b=%b" % item for item in lines.items() if item[0] not in _OURS]
