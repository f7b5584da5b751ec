"""The verbs that hand descriptors on, or watch them: exec, push, watch."""

from __future__ import annotations

import argparse
import errno
import fcntl
import os
import resource
import signal
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from ..client.blocking import BlockingClient
from ..client.calls import one_fd
from ..kernel.fd import Fd, close_all
from .exit_codes import DONE, UsageError
from .options import add_client_options, add_examples, client_of, number, socket_path
from .output import print_json, printable

if TYPE_CHECKING:
    from .options import Subparsers

_ACCESS = {"r": "rdonly", "w": "wronly", "rw": "rdwr"}

#: What a shell answers for a program that is not there, or cannot be run (POSIX, sh, 2.8.2).
_NOT_FOUND, _NOT_EXECUTABLE = 127, 126


def add_parsers(verbs: Subparsers) -> None:
    """Add the verbs of this module to the command line."""
    execute = verbs.add_parser(
        "exec",
        help="run a command with descriptors out of the fd sets",
        usage="qmpfd exec [-h] [--socket PATH] [--timeout S]\n"
        "                  N[:ACCESS][=FD]... -- CMD...",
        description="Run CMD with the newest descriptor of each fd set N, or the newest with that "
        "access mode (r, w or rw), at the number FD: from 3 on, in order, where none is given; "
        "=0 makes it CMD's standard input. CMD gets no other descriptors than these and the "
        "standard streams; its exit status is the command's.",
    )
    add_client_options(execute)
    execute.add_argument("fdsets", nargs="*", metavar="N[:ACCESS][=FD]", help="what to open")
    add_examples(
        execute,
        "qmpfd exec 0 -- cat /dev/fd/3",
        "qmpfd exec 0:r=0 1:w=1 -- gzip",
        "qmpfd exec 0:rw=9 -- ./server --fd 9",
        status="  CMD's own; else 1 the daemon refused, 2 usage, 3 no daemon,\n"
        "  126 CMD cannot be run, 127 there is no CMD",
    )
    execute.set_defaults(run=_exec, command=[])

    push = verbs.add_parser(
        "push",
        help="copy an fd set into another QMP server",
        description="Copy the fd set N into another QMP server: another qmpfd, or a real QEMU. "
        "One up to version 9.0 closes what it does not use when its last QMP client leaves: keep "
        "another one connected.",
    )
    add_client_options(push)
    push.add_argument("fdset", type=number("fd set id"), metavar="N", help="the fd set to copy")
    push.add_argument(
        "--to",
        type=socket_path,
        required=True,
        metavar="QMP_SOCKET",
        help="the other server's socket",
    )
    push.add_argument(
        "--fdset",
        dest="to_fdset",
        type=number("fd set id"),
        metavar="M",
        help="the fd set there (default: a new one)",
    )
    add_examples(
        push,
        "qmpfd push 0 --to /run/vm1/qmp.sock",
        "qmpfd push 0 --to /run/vm1/qmp.sock --fdset 3",
        status="  0 done, 1 one of the two refused, 2 usage, 3 one of the two is not there",
    )
    push.set_defaults(run=_push)

    watch = verbs.add_parser(
        "watch",
        help="show descriptors as they come and go",
        description="Show what is added and removed, as it happens, until interrupted. "
        "With --json, each event is one line.",
    )
    add_client_options(watch)
    add_examples(
        watch,
        "qmpfd watch",
        "qmpfd watch --json | jq --unbuffered .data",
        status="  1 the daemon refused, 2 usage, 3 no daemon, or it has ended, 130 interrupted",
    )
    watch.set_defaults(run=_watch)


# -- exec --------------------------------------------------------------------------------------


class Wanted(NamedTuple):
    """One ``N[:ACCESS][=FD]``."""

    fdset_id: int
    access: str | None
    at: int | None


def _wanted(text: str) -> Wanted:
    which, equals, at = text.partition("=")
    fdset_id, colon, access = which.partition(":")
    if colon and access not in (*_ACCESS, *_ACCESS.values()):
        raise UsageError(f"{text!r}: the access mode is r, w or rw")
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 1
    try:
        return Wanted(
            number("fd set id")(fdset_id),
            _ACCESS.get(access, access) if colon else None,
            number("descriptor", 0, most)(at) if equals else None,
        )
    except argparse.ArgumentTypeError as exc:
        raise UsageError(str(exc)) from None


def _exec(arguments: argparse.Namespace) -> int:
    wanted = [_wanted(text) for text in arguments.fdsets]
    command: list[str] = arguments.command
    if not wanted or not command:
        raise UsageError("exec takes N[:ACCESS][=FD]... -- CMD... (see qmpfd exec --help)")
    places = _places(wanted)
    with client_of(arguments) as client:
        opened: list[Fd] = []
        try:
            for each in wanted:
                opened.append(_open_fdset(client, each))  # noqa: PERF401 - closed if one fails
        except BaseException:
            close_all(opened)
            raise
    # The connection is closed by now: its number may be one of the places.
    try:
        _put_in_place(opened, places)
        for ignored in (signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(ignored, signal.SIG_DFL)  # Python ignores them, the command would too
        return _replace_by(command)
    finally:
        close_all(opened)


def _replace_by(command: list[str]) -> int:
    """Become the command; the exit status where that is not possible."""
    try:
        if not command[0]:  # a ValueError to Python
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        os.execvp(command[0], command)
    except OSError as exc:
        with suppress(OSError):
            os.write(2, f"qmpfd: cannot run {printable(command[0])}: {exc.strerror}\n".encode())
        return _NOT_FOUND if isinstance(exc, FileNotFoundError) else _NOT_EXECUTABLE


def _places(wanted: list[Wanted]) -> list[int]:
    """The number at which each descriptor is to be."""
    taken = {each.at for each in wanted if each.at is not None}
    if len(taken) < sum(each.at is not None for each in wanted):
        raise UsageError("two descriptors cannot have the same number")
    free = (candidate for candidate in range(3, 1 << 20) if candidate not in taken)
    return [next(free) if each.at is None else each.at for each in wanted]


def _open_fdset(client: BlockingClient, wanted: Wanted) -> Fd:
    members: dict[str, Any] = {"fdset-id": wanted.fdset_id}
    if wanted.access is not None:
        members["access"] = wanted.access
    return one_fd(client.request("open-fdset", members)[1])


def _put_in_place(opened: list[Fd], places: list[int]) -> None:
    """Move each descriptor to its number, and close all others but the standard streams, whose
    heirs the command would otherwise be.
    """
    for number_, fd in enumerate(opened):
        opened[number_] = _aside(fd, places)
        fd.close()
    for fd, place in zip(opened, places, strict=True):
        os.dup2(fd.fileno(), place, inheritable=True)
    for number_ in map(int, os.listdir("/proc/self/fd")):
        if number_ > 2 and number_ not in places:
            # Not closed but marked: some of them are still in use here until the very end.
            try:
                os.set_inheritable(number_, False)
            except OSError:  # the listing's own
                continue


def _aside(fd: Fd, places: list[int]) -> Fd:
    """A duplicate of *fd* out of the way: at no place, and at no standard stream's either, where
    an error message would go into it.
    """
    least = 3
    while True:
        moved = Fd(fcntl.fcntl(fd.fileno(), fcntl.F_DUPFD_CLOEXEC, least))
        if moved.fileno() not in places:
            return moved
        least = moved.fileno() + 1
        moved.close()


# -- push --------------------------------------------------------------------------------------


def _push(arguments: argparse.Namespace) -> int:
    fdset_id: int = arguments.fdset
    to_fdset: int | None = arguments.to_fdset
    added = []
    with client_of(arguments) as source, BlockingClient(arguments.to, arguments.timeout) as sink:
        sets = source.execute("query-fdsets")
        fds_here = [fd for each in sets if each["fdset-id"] == fdset_id for fd in each["fds"]]
        if not fds_here:
            source.execute("open-fdset", {"fdset-id": fdset_id})  # says that there is no such set
        for stored in fds_here:
            opened, fds = source.request("open-fdset", {"fdset-id": fdset_id, "fd": stored["fd"]})
            members = {key: opened[key] for key in ("opaque",) if key in opened}
            if to_fdset is not None:
                members["fdset-id"] = to_fdset
            try:
                info = sink.execute("add-fd", members, fds)
            finally:
                close_all(fds)
            to_fdset = info["fdset-id"]
            added.append({**members, **info})
    if arguments.json:
        fds_there = [{k: v for k, v in each.items() if k != "fdset-id"} for each in added]
        print_json({"fdset-id": to_fdset, "fds": fds_there})
    else:
        numbers = ", ".join(str(each["fd"]) for each in added)
        print(f"fd set {to_fdset} of {arguments.to}: fd {numbers}")
    return DONE


# -- watch -------------------------------------------------------------------------------------

_WORDS = {"FD_ADDED": "added", "FD_REMOVED": "removed"}


def _watch(arguments: argparse.Namespace) -> int:
    with client_of(arguments) as client:
        client.execute("watch-fdsets", {"enable": True})
        for event in client.events():
            if arguments.json:
                print_json({"event": event.name, "data": event.data, "timestamp": event.seconds})
            else:
                when = time.strftime("%H:%M:%S", time.localtime(event.seconds))
                print(f"{when}  {_told(event.name, event.data)}", flush=True)
    return DONE


def _told(name: str, data: dict[str, Any]) -> str:
    """An event in words."""
    if name not in _WORDS:
        return f"{name} {data}"
    text = f"{_WORDS[name]:<8} fd set {data['fdset-id']}, fd {data['fd']}"
    if "opaque" in data:
        text += f"  {printable(data['opaque'])}"
    if data.get("reason", "removed") != "removed":
        text += f"  ({data['reason']})"
    return text
