"""A spare worker: a process that waits until the parent of ``serve --supervise`` needs a worker.

Every worker was a spare worker before.  The parent executes the first one, and starts it as the
worker at once.  Before a worker starts to serve, it forks the next spare worker (fork(2)), which
becomes the parent's child when the worker dies (prctl(2), PR_SET_CHILD_SUBREAPER).

A waiting spare worker has no stored descriptors and no client's connection, only a socket to the
parent.  It has imported a worker's modules: that saves the start of an interpreter and the imports,
most of the time of a restart.  It reads the policy, and checks paths, only after START.
"""

from __future__ import annotations

import gc
import os
import select
import signal
import socket
from collections.abc import Iterable

from ..kernel.fd import Fd, close_all, poll
from ..kernel.systemd import Notifier

#: Seconds that a spare worker waits for START before its imports: the worker that has forked it
#: serves its clients first.
_IMPORT_DELAY = 1.0

#: Name of a spare worker that has imported its modules, in ps(1) (proc(5), comm).
_NAME = "qmpfd-spare"


def wait(parent: Notifier, passed: Iterable[Fd]) -> tuple[Notifier, list[str]]:
    """Wait until the parent sends START; then fork the next spare worker, which waits in turn.

    Args:
        parent: connection to the parent; owned from here on.
        passed: inherited descriptors for this worker only; closed in the next one.

    Returns:
        The connection of this process to the parent, and the names of the descriptors that the
        parent keeps.
    """
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # a worker survives SIGHUP as well
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps a spare worker that dies
    # Move this end to a low number: when this process dies, the kernel closes it early, and the
    # parent gets EOF even if the close of another descriptor hangs.
    parent.move_to(os.dup(parent.fileno()))
    own_name = ""
    while True:
        # The first worker imports later: the import of Trio opens a descriptor, which must not get
        # a restored one's number.
        if not own_name and not poll(parent, select.POLLIN, _IMPORT_DELAY):
            _import_all()
            gc.collect()
            gc.freeze()  # a later collection would write to these objects, and copy pages
            own_name = _name_process(_NAME)
        names = _wait_for_start(parent)
        theirs = _fork(parent)
        if theirs is None:
            break
        close_all(passed)
        parent.close()
        parent = Notifier(socket.socket(fileno=theirs.detach()), True)
    if own_name:
        _name_process(own_name)
    gc.disable()  # until the daemon serves: restored objects are not garbage
    return parent, names


def _import_all() -> None:
    """Import the modules that a worker needs."""
    from ..commands import schema  # noqa: F401 - imported to be loaded
    from ..server import startup  # noqa: F401 - likewise
    from ..server.fdstore import fetch  # noqa: F401 - likewise
    from . import daemon, takeover  # noqa: F401 - likewise


def _wait_for_start(parent: Notifier) -> list[str]:
    """Wait until the parent sends START; return the names that it has sent before."""
    names: list[str] = []
    while True:
        text, _ = parent.receive_fds(None)
        kind, _, value = text.partition("=")
        if kind == "NAMES":
            names += value.split(":")
        elif kind == "START":
            return names
        elif not text:
            os._exit(0)  # the parent has closed the connection; there is nothing to clean up


def _fork(parent: Notifier) -> Fd | None:
    """Fork the next spare worker, and pass its socket to the parent, which alone has it from then
    on: the spare worker ends when the parent does.  Return that worker's end, in it; else None.
    """
    try:
        sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with sock, theirs:
            pid = os.fork()
            if pid == 0:
                return Fd(theirs.detach())
            parent.send(f"QMPFD_SPARE={pid}", [sock])
    except OSError:  # out of memory, processes or descriptors: the parent starts one later
        pass
    return None


def _name_process(name: str) -> str:
    """Change this process's name in ps(1); return the previous name, or "" if /proc is missing."""
    try:
        with open("/proc/self/comm", "r+", encoding="utf-8") as comm:
            previous = comm.read().strip()
            comm.write(name)
    except OSError:
        return ""
    return previous
