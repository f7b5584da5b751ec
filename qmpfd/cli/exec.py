"""``qmpfd exec``: runs a command with stored descriptors."""

from __future__ import annotations

import argparse
import errno
import os
import signal
from contextlib import ExitStack, suppress
from itertools import count
from shutil import which
from typing import Any

from ..client.blocking import BlockingClient
from ..client.calls import members, one_fd
from ..client.errors import NoDaemon
from ..errors import InvalidParameterValue, QMPError
from ..kernel.fd import Fd, duplicate, open_files_limit, open_numbers
from .exit_codes import UsageError
from .options import CONNECTION, client_of, option
from .output import print_error, printable
from .targets import Target, open_target, target

#: A shell's exit statuses for a program that does not exist, or cannot be run (POSIX, sh, 2.8.2).
_NOT_FOUND, _NOT_EXECUTABLE = 127, 126

#: Explanation of an error of execve(2) for a file that exists and is executable.
_ADVICE = {
    errno.ENOENT: " (its interpreter is missing)",
    errno.ENOEXEC: " (a script needs an interpreter in its first line, such as #!/bin/sh)",
}

#: SD_LISTEN_FDS_START, the number of the first descriptor (sd_listen_fds(3)).
_LISTEN_FDS_START = 3

#: Maximum length of a descriptor's name in bytes, and the name of a descriptor without a name
#: (FDNAME=, sd_notify(3); sd_listen_fds_with_names(3)).
_MOST_NAME_BYTES, _NO_NAME = 255, "unknown"

SUMMARY = "run a command with stored descriptors"
DESCRIPTION = (
    "Run CMD with a duplicate of the newest descriptor that each target names. "
    "SET is the number of an fd set, or @NAME, a descriptor's name. FD is one descriptor of "
    "the set. ACCESS is r, w or rw. AT is the number at which CMD gets the descriptor: =0 is "
    "CMD's standard input; targets without =AT get the numbers from 3 on, in order. CMD gets "
    "these descriptors and the standard streams, and no others."
)
EXAMPLES = [
    "qmpfd exec 0=0 -- cat",
    "qmpfd exec 0:r=0 @out:w=1 -- gzip",
    "qmpfd exec --listen-fds @web -- gunicorn app",
    "qmpfd exec @disk:rw=9 -- ./server --fd 9",
]
EXIT_STATUS = (
    "  that of CMD; if CMD does not run: 1 the daemon refused, 2 usage, 3 no daemon,\n"
    "  126 CMD cannot be executed, 127 CMD is not found"
)
USAGE = (
    "qmpfd exec [-h] [--socket PATH] [--timeout S] [--listen-fds] [--take] [--rewind]\n"
    "                  [--json] SET[/FD][:ACCESS][=AT]... -- CMD..."
)
OPTIONS = [
    *CONNECTION,
    option(
        "--listen-fds",
        "set LISTEN_FDS, LISTEN_PID and LISTEN_FDNAMES for CMD, as systemd does for socket "
        "activation (sd_listen_fds(3))",
    ),
    option("--take", "remove these descriptors from the daemon in the same step"),
    option(
        "--rewind",
        "set the position of files to their start; all duplicates of a descriptor share "
        "one position, so without this a second reader begins where the first one stopped",
    ),
    option("--json", "as of every verb; changes nothing, as all output is that of CMD"),
    option(
        "targets",
        "SET[/FD][:ACCESS][=AT] or @NAME[:ACCESS][=AT]",
        target,
        nargs="*",
        metavar="TARGET",
    ),
]


def run(arguments: argparse.Namespace) -> int:
    targets: list[Target] = arguments.targets
    command: list[str] = arguments.command
    if not targets or not command:
        raise UsageError("exec takes TARGET... -- CMD... (see qmpfd exec --help)")
    places = _places(targets, arguments.listen_fds)
    infos: list[dict[str, Any]] = []
    fds: list[Fd] = []
    with ExitStack() as stack:
        with client_of(arguments) as client:
            for each in targets:
                info, passed = open_target(client, each)
                fds.append(stack.enter_context(one_fd(info, passed)))
                infos.append(info)
            if arguments.take and which(command[0]):  # remove nothing if CMD cannot run
                taken: list[tuple[dict[str, Any], Fd]] = []
                stack.callback(_give_back, arguments, taken)  # not called if execve(2) succeeds
                _take(client, infos, fds, taken)
        # After the connection is closed: its descriptor number may be one of *places*.
        if arguments.rewind:
            for fd in fds:
                with suppress(OSError):  # a pipe or a socket has no file offset
                    os.lseek(fd.fileno(), 0, os.SEEK_SET)
        _put_in_place(fds, places)
        for name in ("LISTEN_FDS", "LISTEN_PID", "LISTEN_PIDFDID", "LISTEN_FDNAMES"):
            os.environ.pop(name, None)  # they describe descriptors that CMD does not get
        if arguments.listen_fds:
            _announce(infos, places)
        for ignored in (signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(ignored, signal.SIG_DFL)  # Python ignores them; execve(2) preserves that
        return _replace_by(command)


def _places(targets: list[Target], listen_fds: bool) -> list[int]:
    """Return the number at which CMD gets each descriptor; with LISTEN_FDS from 3 on, in a row."""
    taken = [each.at for each in targets if each.at is not None]
    most = open_files_limit()
    if len(set(taken)) < len(taken):
        raise UsageError("two targets have the same number =AT")
    if listen_fds and any(at >= _LISTEN_FDS_START for at in taken):
        raise UsageError(
            "--listen-fds numbers the descriptors from 3 on: =AT may be 0, 1 or 2 only"
        )
    free = (number for number in count(_LISTEN_FDS_START) if number not in taken)
    places = [next(free) if each.at is None else each.at for each in targets]
    if max(places) >= most:
        raise UsageError(
            f"={max(places)}: a descriptor's number is from 0 to {most - 1} here (ulimit -n)"
        )
    return places


def _take(
    client: BlockingClient,
    infos: list[dict[str, Any]],
    fds: list[Fd],
    taken: list[tuple[dict[str, Any], Fd]],
) -> None:
    """Take the opened descriptors out of the daemon's store, and append them to *taken*.

    Each is opened again, and removed in the same step: if another client has replaced it since by
    one with the same numbers and name, CMD gets that one.
    """
    # Two targets may name the same descriptor.
    opened: dict[tuple[int, int], list[Fd]] = {}
    for info, fd in zip(infos, fds, strict=True):
        opened.setdefault((info["fdset-id"], info["fd"]), []).append(fd)
    for info in infos:
        duplicates = opened.pop((info["fdset-id"], info["fd"]), None)
        if duplicates is not None:
            with one_fd(*client.request("open-fdset", {**info, "remove": True})) as fd:
                for each in duplicates:
                    os.dup2(fd.fileno(), each.fileno(), inheritable=False)
            taken.append((info, duplicates[0]))


def _give_back(arguments: argparse.Namespace, taken: list[tuple[dict[str, Any], Fd]]) -> None:
    """Store the taken descriptors again, because not all could be taken or CMD cannot run."""
    if not taken:
        return
    try:
        with client_of(arguments) as client:
            for info, fd in taken:
                name = members(opaque=info.get("opaque"))
                try:
                    client.execute("add-fd", {"fdset-id": info["fdset-id"], **name}, [fd])
                except InvalidParameterValue:  # its fd set has been removed
                    client.execute("add-fd", name, [fd])
    except (QMPError, NoDaemon) as exc:
        print_error(f"qmpfd: not all that was taken can be stored again: {printable(str(exc))}")


def _announce(infos: list[dict[str, Any]], places: list[int]) -> None:
    """Set the variables of sd_listen_fds(3) for CMD."""
    names = [
        _fd_name(info.get("opaque"))
        for info, place in zip(infos, places, strict=True)
        if place >= _LISTEN_FDS_START
    ]
    os.environ["LISTEN_FDS"] = str(len(names))
    os.environ["LISTEN_PID"] = str(os.getpid())  # execve(2) preserves the pid
    os.environ["LISTEN_FDNAMES"] = ":".join(names)


def _fd_name(opaque: str | None) -> str:
    """Return a name valid in LISTEN_FDNAMES: ASCII without control characters and colons."""
    name = "".join(c if " " <= c <= "~" and c != ":" else "_" for c in opaque or "")
    return name[:_MOST_NAME_BYTES] or _NO_NAME


def _replace_by(command: list[str]) -> int:
    """Replace this process by the command (execvp(3)); return an exit status if that fails."""
    try:
        if not command[0]:  # os.execvp would raise ValueError
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        os.execvp(command[0], command)
    except OSError as exc:
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # without a reader, the status stays the same
        with suppress(OSError):
            advice = _ADVICE.get(exc.errno or 0, "") if which(command[0]) else ""
            line = f"qmpfd: cannot run {printable(command[0])}: {exc.strerror}{advice}\n"
            os.write(2, line.encode())
        return _NOT_FOUND if isinstance(exc, FileNotFoundError) else _NOT_EXECUTABLE


def _put_in_place(fds: list[Fd], places: list[int]) -> None:
    """Move each descriptor to its number, and set close-on-exec on all others but the standard
    streams.
    """
    for fd in fds:
        # Not to 0 to 2, the standard streams: an error message would be written into it.
        aside = duplicate(fd, 3, places)
        fd.close()
        fd.adopt(aside)
    for fd, place in zip(fds, places, strict=True):
        os.dup2(fd.fileno(), place, inheritable=True)
    for number in open_numbers():
        if number > 2 and number not in places:
            # Not closed: this process still uses some of them until execve(2).
            os.set_inheritable(number, False)
