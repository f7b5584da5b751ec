"""A spare worker: a process that has imported all that a worker needs, and waits.

When the worker dies, the parent of ``serve --supervise`` has the spare worker take its place: that
saves the start of an interpreter and its imports, most of the time of a restart.  Until then the
spare worker has no stored descriptor and no client's connection, but a socket to the parent.  The
policy is read, and paths are looked at, after that.

The worker starts the first spare worker.  Each forks another one (fork(2)) when it is needed, which
becomes the parent's child when the worker dies (prctl(2), PR_SET_CHILD_SUBREAPER).
"""

from __future__ import annotations

import gc
import os
import select
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import NamedTuple, NoReturn

from ..kernel.fd import Fd, close_all, pipe
from ..kernel.systemd import PARENT_VARIABLE, InheritedFd, Notifier

#: The variable that tells a process to be a spare worker.
_VARIABLE = "QMPFD_SPARE"

#: Milliseconds that are waited at most, as nobody is served meanwhile: the close of a file may hang
#: there, of a FUSE mount that does not answer.
_EXEC_TIMEOUT = 50

#: What ps(1) calls it (proc(5), comm).
_NAME = "qmpfd-spare"

#: What a spare worker says when it has imported everything.
READY = b"SPARE"


class Spare(NamedTuple):
    """A spare worker, as the process sees it that has started it.

    Args:
        pid: its process, a child.
        sock: the parent's end of the socket to it.
    """

    pid: int
    sock: Fd


class Start(NamedTuple):
    """What a spare worker is told when it is needed.

    Args:
        parent: the connection to the parent.
        sockets: the service manager's, with their names.
        names: those of the descriptors that the parent keeps.
        successor: the next spare worker, if there is one.
    """

    parent: Notifier
    sockets: list[InheritedFd]
    names: list[str]
    successor: Spare | None


def is_spare() -> bool:
    """Whether this process is to be a spare worker; asked once."""
    return bool(os.environ.pop(_VARIABLE, ""))


def spawn(store_size: int) -> Spare:
    """Start a spare worker: this program once more.  It says READY at *sock* when it is one.

    Args:
        store_size: how many descriptors the parent keeps.

    Raises:
        OSError: that is not possible now.
    """
    with ExitStack() as stack:
        sock, theirs = map(stack.enter_context, _socket_pair())
        number = theirs.fileno()
        ours = {PARENT_VARIABLE: str(number), "FDSTORE": str(store_size), _VARIABLE: "1"}
        # A dup2(2) of a number to itself has the new process inherit it.  No fork(2) in a process
        # with other people's descriptors: posix_spawn(3) does not wait until they are closed there.
        actions = [(os.POSIX_SPAWN_DUP2, number, number)]
        command = [sys.executable, *sys.orig_argv[1:]]
        executed, writer = map(stack.enter_context, pipe())
        writer.move_to(max(map(int, os.listdir("/proc/self/fd"))) + 1)
        pid = os.posix_spawn(sys.executable, command, {**os.environ, **ours}, file_actions=actions)
        close_all([writer, theirs])
        _wait_hangup(executed)
        executed.close()
        stack.pop_all()
    return Spare(pid, sock)


def _wait_hangup(executed: Fd) -> None:
    """Wait until a new process has executed the program.  It continues this one before it closes
    what it has inherited (execve(2), close-on-exec), the lowest number first: until then, what is
    removed and closed here is open there.
    """
    poll = select.poll()
    poll.register(executed, 0)
    poll.poll(_EXEC_TIMEOUT)


def _socket_pair() -> tuple[Fd, Fd]:
    """The parent's end of a socket, and the one for a spare worker."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    return Fd(ours.detach()), Fd(theirs.detach())


def wait(parent: Notifier, prepare: Callable[[], object]) -> Start:
    """Be a spare worker until it is needed.

    Args:
        parent: the connection to the parent.
        prepare: imports what a worker needs.
    """
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # a worker lives through it
    # A low number: this end is closed early then when this process dies, and the parent hears of it
    # even where another close hangs.
    parent.move_to(os.dup(parent.fileno()))
    prepare()
    gc.collect()
    gc.freeze()  # so that nothing of it is copied when it is forked
    try:
        parent.send(READY.decode())
    except OSError:  # the worker has died meanwhile
        _end()
    while True:
        sockets, names = _wait_for_start(parent)
        successor, theirs = _fork()
        if theirs is None:
            break
        close_all(each.fd for each in sockets)
        parent.close()
        parent = Notifier(socket.socket(fileno=theirs.detach()), True)
    gc.disable()  # until it serves: what is restored stays
    os.environ["WATCHDOG_PID"] = str(os.getpid())
    return Start(parent, sockets, names, successor)


def _fork() -> tuple[Spare | None, Fd | None]:
    """Leave a spare worker behind: that, None if it cannot be done now.  There, its socket."""
    with ExitStack() as stack:
        try:
            sock, theirs = map(stack.enter_context, _socket_pair())
            pid = os.fork()
        except OSError:  # another one is started later
            return None, None
        stack.pop_all()
    if pid:
        theirs.close()
        return Spare(pid, sock), None
    sock.close()
    return None, theirs


def _wait_for_start(parent: Notifier) -> tuple[list[InheritedFd], list[str]]:
    """Wait until the parent says START: the sockets and names that it told before that."""
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
    """End: the parent does not need this process any more.  Nothing here is to be cleaned up."""
    os._exit(0)


def _name_process(name: str) -> str:
    """Change what ps(1) calls this process; what it was called, empty if it is called so still."""
    try:
        with open("/proc/self/comm", "r+", encoding="utf-8") as comm:
            previous = comm.read().strip()
            comm.write(name)
    except OSError:
        return ""
    return previous
