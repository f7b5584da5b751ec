"""A guided tour of qmpfd, on real descriptors: ``make demo``.

The tour starts a daemon as a child process on a socket in a temporary folder, connects to it with
``qmpfd.connect``, and prints every QMP line sent and received.  The tour checks each of its claims,
also in the daemon's ``/proc/PID/fd``, and fails if one is not true.
"""

from __future__ import annotations

import errno
import os
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import trio
from daemon import Broken, Daemon, become, end_on_sigterm, identity, run, running_daemon
from raw import raw_connect

import qmpfd
from qmpfd.cli.tapping import WIDTH, paint, show, tapped

#: Timeout of the whole tour in seconds; it takes two or three.
_PATIENCE = 60.0


def say(text: str) -> None:
    """Print a paragraph."""
    print(textwrap.fill(" ".join(text.split()), WIDTH), flush=True)


def claim(truth: bool, text: str) -> None:
    """Print *text* if it is true, else raise Broken."""
    if not truth:
        raise Broken(f"this should be true, and is not: {text}")
    mark = paint("1;32", "ok")
    folded = textwrap.wrap(text, WIDTH - 5)
    print(f"  {mark} {folded[0]}", *(f"     {line}" for line in folded[1:]), sep="\n", flush=True)


def note(text: str) -> None:
    """Print an aside."""
    print("  " + paint("2", f"({text})"), flush=True)


class BriefWire:
    """Prints the lines of a connection, except the first *hidden* ones, which never differ."""

    def __init__(self, hidden: int) -> None:
        self._hidden = hidden

    def __call__(self, from_client: bool, line: str, fds: int) -> None:
        """Print a line, unless it is one of the first."""
        if self._hidden:
            self._hidden -= 1
        else:
            show(from_client, line, fds)


#: Number of lines at the start of a connection: greeting, ``qmp_capabilities``, reply.
_HANDSHAKE = 3


@dataclass
class Tour:
    """State that the steps share.

    Args:
        daemon: the daemon.
        folder: folder for files; other users cannot enter it.
        run_folder: folder for sockets, owned by the daemon's user.
        user: user of the daemon and the worker; None for the user of this process.
    """

    daemon: Daemon
    folder: Path
    run_folder: Path
    user: str | None
    fds_at_start: int = 0
    image: Path = field(init=False)

    def __post_init__(self) -> None:
        self.image = self.folder / "disk.img"
        self.fds_at_start = self.daemon.fd_count()

    @asynccontextmanager
    async def client(self, *, handshake: bool = False) -> AsyncGenerator[qmpfd.Client, None]:
        """Connect to the daemon, and print the lines of the connection after its handshake."""
        tap = self.run_folder / "tap.sock"
        if not handshake:
            note("a new connection; greeting and negotiation as above")
        shown = BriefWire(0 if handshake else _HANDSHAKE)
        async with tapped(self.daemon.socket, tap, shown), qmpfd.connect(tap) as client:
            yield client

    def holds(self, fd: int, file: os.stat_result) -> bool:
        """Return whether the daemon's descriptor *fd* refers to *file*."""
        return self.daemon.file_behind(fd) == identity(file)


# -- the steps ---------------------------------------------------------------------------------


async def park(tour: Tour) -> None:
    """One process opens a file and stores its descriptors"""
    say("""This process makes a disk image in a folder that other users cannot enter. It opens the
        image twice, and adds both descriptors to one fd set of the daemon. Each descriptor has
        an opaque text, by which clients can find it; the daemon gives the text no meaning.""")
    tour.image.write_bytes(b"boot sector".ljust(1 << 20, b"\0"))
    async with tour.client(handshake=True) as client:
        with tour.image.open("rb") as file:
            first = await client.add_fd(file, opaque="rdonly:disk.img")
        with tour.image.open("r+b") as file:
            second = await client.add_fd(file, first.fdset_id, opaque="rdwr:disk.img")
    image = tour.image.stat()
    claim(first.fdset_id == second.fdset_id, f"both are in fd set {first.fdset_id}")
    claim(
        tour.holds(first.fd, image) and tour.holds(second.fd, image),
        f"the daemon's descriptors {first.fd} and {second.fd} refer to the image (same inode)",
    )
    modes = tour.daemon.access_of(first.fd), tour.daemon.access_of(second.fd)
    claim(
        modes == (os.O_RDONLY, os.O_RDWR),
        "the first one is open for reading, the second one for reading and writing",
    )


async def share(tour: Tour) -> None:
    """Another process, which may not open the file, uses the descriptors"""
    image = tour.image.open("rb")
    if tour.user is None:
        tour.image.unlink()
        say("""The image is unlinked now, so that no process can open it. (If root runs the tour,
            it shows a process without permission instead.) The first connection is closed; the
            fd set stays. A second process connects.""")
    else:
        say(f"""The daemon runs as the user {tour.user}, and serves this user and root. The first
            connection is closed; the fd set stays. A second process, of the user {tour.user} too,
            tries to open the image, and then asks the daemon.""")
    who = [] if tour.user is None else [tour.user]
    command = [
        sys.executable,
        __file__,
        "--worker",
        *map(str, (tour.daemon.socket, tour.image)),
        *who,
    ]
    with image:
        worker = await trio.run_process(command, check=False)
        if worker.returncode != 0:
            raise Broken("the second process could not do its work")
        claim(
            image.read(16) == b"written by other",
            "the first process finds in the image what the second one wrote",
        )


async def work(
    connect: Callable[[Path], AbstractAsyncContextManager[qmpfd.Client]], socket: Path, image: Path
) -> None:
    """Run the second process: open, read, write and remove descriptors of the set."""
    note(f"the second process: pid {os.getpid()}, uid {os.getuid()}")
    try:
        image.open("rb").close()
    except OSError as exc:
        claim(True, f'open("{image.name}"): {exc.strerror}')
    else:
        raise Broken(f"uid {os.getuid()} can open {image}")
    tap = socket.with_name("worker.sock")
    note("its own connection; greeting and negotiation as above")
    async with tapped(socket, tap, BriefWire(_HANDSHAKE)), connect(tap) as client:
        [fdset] = await client.query_fdsets()
        by_opaque = {fd.opaque: fd.fd for fd in fdset.fds}
        claim(
            list(by_opaque) == ["rdonly:disk.img", "rdwr:disk.img"],
            "it sees the fd set, oldest descriptor first",
        )
        with await client.open_fdset(fdset.fdset_id, access="rdonly") as fd:
            claim(
                os.pread(fd.fileno(), 11, 0) == b"boot sector",
                "it can read through the duplicate that it received",
            )
            try:
                os.pwrite(fd.fileno(), b"?", 0)
            except OSError as exc:
                claim(exc.errno == errno.EBADF, "it cannot write through it (EBADF)")
            else:
                raise Broken("a descriptor opened read-only can be written to")
        with await client.open_fdset(fdset.fdset_id, access="rdwr") as fd:
            os.pwrite(fd.fileno(), b"written by other", 0)
        claim(True, "it can write through a duplicate of the other descriptor")
        await _expect(qmpfd.FdNotFound, lambda: client.open_fdset(fdset.fdset_id, "wronly"))
        await client.remove_fd(fdset.fdset_id, by_opaque["rdonly:disk.img"])
        [fdset] = await client.query_fdsets()
        claim(
            [fd.opaque for fd in fdset.fds] == ["rdwr:disk.img"],
            "it can remove a descriptor from the set",
        )


async def remove(tour: Tour) -> None:
    """A removed descriptor is closed before the reply"""
    say("""The daemon gets the only descriptor of the write end of a pipe. While it is open, the
        read end has nothing to read. When the daemon closes it, the read end reports the end
        of the file.""")
    reader, writer = os.pipe()
    with open(reader, "rb", buffering=0) as pipe:
        os.set_blocking(reader, False)
        async with tour.client() as client:
            with open(writer, "wb", buffering=0) as end:
                info = await client.add_fd(end, opaque="log")
            claim(
                pipe.read() is None,
                "the read end has no data and no end of file: the daemon holds the write end",
            )
            await client.remove_fd(info.fdset_id, info.fd)
            claim(
                pipe.read() == b"",
                "the read end reports the end of the file: the daemon closed it before it replied",
            )


async def number(tour: Tour) -> None:
    """Several requests at the same time, and the ids of fd sets"""
    say("""Three tasks of one client add a file each, at the same time over one connection.
        Each descriptor goes to the command that it was sent with. A new set gets the lowest
        free id. Sets are listed by descending id.""")
    infos: dict[str, qmpfd.AddfdInfo] = {}
    files: dict[str, os.stat_result] = {}

    async def add(name: str) -> None:
        with tempfile.TemporaryFile(dir=tour.folder) as file:
            files[name] = os.fstat(file.fileno())
            infos[name] = await client.add_fd(file, opaque=name)

    async with tour.client() as client:
        async with trio.open_nursery() as nursery:
            for name in ("red", "green", "blue"):
                nursery.start_soon(add, name)
        claim(
            all(tour.holds(infos[name].fd, files[name]) for name in files),
            "each of the three descriptors refers to the file that its task sent (same inode)",
        )
        ids = sorted(info.fdset_id for info in infos.values())
        claim(ids == [1, 2, 3], "set 0 has the disk image, so the new sets have the ids 1, 2 and 3")
        await client.remove_fd(2)
        with open(os.devnull, "rb") as null:
            info = await client.add_fd(null, opaque="null")
        claim(info.fdset_id == 2, "the set 2 was removed, and the next new set got its id")
        sets = await client.query_fdsets()
        claim(
            [fdset.fdset_id for fdset in sets] == [3, 2, 1, 0],
            "the sets are listed by descending id",
        )


async def refuse(tour: Tour) -> None:
    """Errors"""
    say("""A command that fails gets one error reply. The Python client raises an exception that is
        named after the class of the error. A descriptor that was sent with the command is
        closed.""")
    async with tour.client() as client:
        before = tour.daemon.fd_count()
        with open(os.devnull, "rb") as null:
            await _expect(qmpfd.FdNotSupplied, lambda: client.execute("add-fd"))
            await _expect(qmpfd.InvalidParameterValue, lambda: client.add_fd(null, fdset_id=99))
            await _expect(qmpfd.FdNotFound, lambda: client.remove_fd(99))
            await _expect(qmpfd.CommandNotFound, lambda: client.execute("open-sesame"))
        claim(tour.daemon.fd_count() == before, "the daemon has as many descriptors open as before")
    say("""Text that is not JSON gets an error reply too, and the connection continues. This
        part uses a plain socket, because the client library sends JSON only.""")
    tap = tour.run_folder / "tap.sock"
    async with (
        tapped(tour.daemon.socket, tap, BriefWire(1)),
        raw_connect(tap) as client,
    ):
        await client.read()  # the greeting
        await client.send(b'{"execute": "qmp_capabilities",}\n')
        claim("error" in await client.read(), "the comma before the brace is a syntax error")
        await client.send(b"{'execute': 'qmp_capabilities', 'id': 'it\\'s me'}\n")
        claim(
            await client.read() == {"return": {}, "id": "it's me"},
            "the next request is valid; QEMU's dialect of JSON permits single quotes",
        )


async def _expect(kind: type[qmpfd.QMPError], call: Callable[[], Awaitable[object]]) -> None:
    try:
        await call()
    except qmpfd.QMPError as exc:
        claim(type(exc) is kind, f"raised qmpfd.{type(exc).__name__}")
    else:
        raise Broken(f"{kind.__name__} was expected, but the command succeeded")


async def shell(tour: Tour) -> None:
    """The same from the shell"""
    notes = tour.folder / "notes"
    notes.write_text("remember the milk\n")
    output = await _qmpfd(tour, "add", "--fdset", "0", "--opaque", "notes", str(notes))
    claim(
        output.startswith("fd set 0, fd "), "add stored the descriptor in the set of the disk image"
    )
    number = output.split()[-1]
    output = await _qmpfd(tour, "ls")
    claim("notes" in output, "ls lists it")
    output = await _qmpfd(tour, "exec", "0:r=0", "--", "cat")
    claim(output == "remember the milk\n", "exec ran cat with the descriptor as its standard input")
    await _qmpfd(tour, "rm", f"0/{number}")
    output = await _qmpfd(tour, "ls", "--json")
    claim("notes" not in output, "rm removed it; --json prints JSON for programs")


async def _qmpfd(tour: Tour, *arguments: str) -> str:
    """Run the ``qmpfd`` command, print command and output, and return the output."""
    shown = shlex.join(["qmpfd", *arguments]).replace(f"{tour.folder}/", "")
    print("  " + paint("36", f"$ {shown}"), flush=True)
    done = await trio.run_process(
        [sys.executable, "-m", "qmpfd", *arguments],
        env={**os.environ, "QMPFD_SOCKET": str(tour.daemon.socket)},
        capture_stdout=True,
        capture_stderr=True,
        check=False,
    )
    output = (done.stdout + done.stderr).decode()
    for line in output.splitlines():
        for part in textwrap.wrap(line, WIDTH - 2, break_on_hyphens=False):
            print("  " + paint("32", part), flush=True)
    if done.returncode:
        raise Broken(f"qmpfd {arguments[0]} ended with status {done.returncode}")
    return output


async def leave(tour: Tour) -> None:
    """The daemon stops, and leaves nothing behind"""
    say("""When all sets are removed and all clients are gone, the daemon has the descriptors with
        which it started. On SIGTERM it exits, and removes its socket file.""")
    async with tour.client() as client:
        for fdset in await client.query_fdsets():
            await client.remove_fd(fdset.fdset_id)
    claim(
        await tour.daemon.settles_at(tour.fds_at_start),
        f"{tour.fds_at_start} descriptors were open at its start, {tour.daemon.fd_count()} are now",
    )


#: The steps in order; the first line of a step's docstring is its title.
STEPS = (park, share, remove, number, refuse, shell, leave)


# -- around them -------------------------------------------------------------------------------


async def _other_user(folder: Path) -> str | None:
    """Return an unprivileged user who owns *folder* from now on; None if there is no such user.

    None: this process is not root, may not call setuid(2), or the user cannot reach *folder*.  The
    user is not ``nobody``: the kernel uses that uid for users whom it cannot map too
    (/proc/sys/kernel/overflowuid), so qmpfd never takes it for the daemon's own.
    """
    user = "daemon"
    if os.geteuid() != 0:
        return None
    try:
        shutil.chown(folder, user)
        become = "import os, sys; os.setuid(os.stat(sys.argv[1]).st_uid); os.listdir(sys.argv[1])"
        await trio.run_process(
            [sys.executable, "-c", become, str(folder)], stderr=subprocess.DEVNULL
        )
    except (LookupError, OSError, subprocess.CalledProcessError):
        os.chown(folder, os.geteuid(), os.getegid())
        return None
    return user


async def tour(folder: Path) -> None:
    """Run all the steps in an empty *folder*."""
    folder.chmod(0o711)  # the daemon's user must reach its own folder below
    private, run_folder = folder / "private", folder / "run"
    private.mkdir(mode=0o700)
    run_folder.mkdir(mode=0o700)
    user = await _other_user(run_folder)
    socket = run_folder / "qmpfd.sock"
    async with running_daemon(socket, user=user) as daemon:
        mode = stat.filemode(socket.stat().st_mode)
        who = socket.owner()
        say(f"""qmpfd {qmpfd.__version__} runs as pid {daemon.pid}, user {who}; its socket is
            {mode} {who}. Lines of clients are marked ->, and lines of the daemon <-.""")
        shared = Tour(daemon, private, run_folder, user)
        for count, step in enumerate(STEPS, 1):
            title = (step.__doc__ or "").splitlines()[0]
            print("\n" + paint("1", f"{count}. {title}"))
            await step(shared)
    claim(True, "the daemon exited with status 0, and its socket file is gone")


async def main() -> int:
    """Run the tour, or its second process; return the exit status."""
    status = 128 + signal.SIGTERM
    async with trio.open_nursery() as nursery:
        nursery.start_soon(end_on_sigterm, nursery.cancel_scope)
        with trio.move_on_after(_PATIENCE) as patience:
            if sys.argv[1:2] == ["--worker"]:
                connect = qmpfd.connect  # imported now: *user* may be unable to read the package
                for user in sys.argv[4:]:
                    become(user)
                await work(connect, Path(sys.argv[2]), Path(sys.argv[3]))
            else:
                with tempfile.TemporaryDirectory(prefix="qmpfd-demo-") as name:
                    await tour(Path(name))
        if patience.cancelled_caught:
            raise Broken(f"the tour did not end within {_PATIENCE:g} seconds")
        status = 0
        nursery.cancel_scope.cancel()
    return status


if __name__ == "__main__":
    sys.exit(run(main))
