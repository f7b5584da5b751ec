"""A spare worker: a process that has imported a worker's modules, and waits.

When the worker dies, the spare worker takes its place under the parent of ``serve --supervise``:
that saves the start of an interpreter and its imports, most of the time of a restart.  A waiting
spare worker has no stored descriptors and no client's connection, only a socket to the parent.  It
reads the policy, and checks paths, only after START.

The worker starts the first spare worker.  Before a spare worker starts to serve, it forks the next
one (fork(2)), which becomes the parent's child when the worker dies (prctl(2),
PR_SET_CHILD_SUBREAPER).
"""

from __future__ import annotations

import gc
import os
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import NamedTuple, NoReturn

from ..kernel.fd import Fd, close_all, open_numbers, pipe, poll
from ..kernel.systemd import PARENT_VARIABLE, InheritedFd, Notifier

#: Environment variable that makes a process a spare worker.
_VARIABLE = "QMPFD_SPARE"

#: Maximum wait for execve(2) in seconds, during which no client is served: a close in the new
#: process may hang, of a file of a FUSE mount that does not answer.
_EXEC_TIMEOUT = 0.05

#: Name of a waiting spare worker in ps(1) (proc(5), comm).
_NAME = "qmpfd-spare"

#: Message of a spare worker that has imported everything.
READY = b"SPARE"


class Spare(NamedTuple):
    """Handle of a spare worker, in the process that has started it.

    Args:
        pid: the spare worker, a child process.
        sock: the parent's end of the socket to it.
    """

    pid: int
    sock: Fd


class Start(NamedTuple):
    """Start of a spare worker as the worker: the messages of the parent.

    Args:
        parent: connection to the parent.
        sockets: the service manager's sockets, with their names.
        names: names of the descriptors that the parent keeps.
        successor: the next spare worker, or None.
    """

    parent: Notifier
    sockets: list[InheritedFd]
    names: list[str]
    successor: Spare | None


def is_spare() -> bool:
    """Return whether this process is a spare worker, and remove the environment variable."""
    return bool(os.environ.pop(_VARIABLE, ""))


def spawn(store_size: int) -> Spare:
    """Start this program again, as a spare worker.  It sends READY over *sock* after its imports.

    Args:
        store_size: number of descriptors that the parent keeps at most.

    Raises:
        OSError: this process is out of descriptors, or no process can be started.
    """
    with ExitStack() as stack:
        sock, theirs = map(stack.enter_context, _socket_pair())
        number = theirs.fileno()
        ours = {PARENT_VARIABLE: str(number), "FDSTORE": str(store_size), _VARIABLE: "1"}
        # POSIX_SPAWN_DUP2 of a number to itself clears close-on-exec.  posix_spawn(3), not fork(2):
        # the child closes the stored descriptors at execve(2), and the parent does not wait.
        actions = [(os.POSIX_SPAWN_DUP2, number, number)]
        command = [sys.executable, *sys.orig_argv[1:]]
        executed, writer = map(stack.enter_context, pipe())
        writer.move_to(max(open_numbers()) + 1)
        pid = os.posix_spawn(sys.executable, command, {**os.environ, **ours}, file_actions=actions)
        close_all([writer, theirs])
        # posix_spawn(3) returns before execve(2) has closed descriptors with close-on-exec, lowest
        # number first.  Until then, a descriptor removed and closed here is still open there.
        poll(executed, timeout=_EXEC_TIMEOUT)
        executed.close()
        stack.pop_all()
    return Spare(pid, sock)


def _socket_pair() -> tuple[Fd, Fd]:
    """Create a socket pair; return the parent's end, and the spare worker's."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    return Fd(ours.detach()), Fd(theirs.detach())


def wait(parent: Notifier, prepare: Callable[[], object]) -> Start:
    """Wait as a spare worker until the parent sends START.

    Args:
        parent: connection to the parent.
        prepare: imports the modules that a worker needs.
    """
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # a worker survives SIGHUP as well
    # Move this end to a low number: when this process dies, the kernel closes it early, and the
    # parent gets EOF even if the close of another descriptor hangs.
    parent.move_to(os.dup(parent.fileno()))
    prepare()
    gc.collect()
    gc.freeze()  # a later collection would write to these objects, and copy pages after fork(2)
    try:
        parent.send(READY.decode())
    except OSError:  # the worker has died
        _end()
    while True:
        sockets, names = _wait_for_start(parent)
        successor, theirs = _fork()
        if theirs is None:
            break
        close_all(each.fd for each in sockets)
        parent.close()
        parent = Notifier(socket.socket(fileno=theirs.detach()), True)
    gc.disable()  # until the daemon serves: restored objects are not garbage
    os.environ["WATCHDOG_PID"] = str(os.getpid())
    return Start(parent, sockets, names, successor)


def _fork() -> tuple[Spare | None, Fd | None]:
    """Fork the next spare worker; return its handle, or None, and in the child its socket."""
    with ExitStack() as stack:
        try:
            sock, theirs = map(stack.enter_context, _socket_pair())
            pid = os.fork()
        except OSError:  # SpareKeeper starts one later
            return None, None
        stack.pop_all()
    if pid:
        theirs.close()
        return Spare(pid, sock), None
    sock.close()
    return None, theirs


def _wait_for_start(parent: Notifier) -> tuple[list[InheritedFd], list[str]]:
    """Wait until the parent sends START; return the sockets and names that it has sent before."""
    sockets: list[InheritedFd] = []
    names: list[str] = []
    own_name = ""
    while True:
        text, fds = parent.receive_fds(None)
        kind, _, value = text.partition("=")
        if kind == "SOCKETS":
            sockets += map(InheritedFd, fds, value.split(":"))
            continue
        close_all(fds)
        if kind == "NAMES":
            names += value.split(":")
        elif kind == "WAIT":
            own_name = _name_process(_NAME)
        elif kind == "START":
            if own_name:
                _name_process(own_name)
            return sockets, names
        elif not text:
            _end()


def _end() -> NoReturn:
    """Exit: the parent has closed the connection.  A spare worker needs no clean-up."""
    os._exit(0)


def _name_process(name: str) -> str:
    """Change this process's name in ps(1); return the previous name, or "" if /proc is missing."""
    try:
        with open("/proc/self/comm", "r+", encoding="utf-8") as comm:
            previous = comm.read().strip()
            comm.write(name)
    except OSError:
        return ""
    return previous
