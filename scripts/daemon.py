"""A qmpfd daemon as a process of its own, for the other scripts here.

    python scripts/daemon.py USER [ARGUMENT]...

is ``qmpfd serve ARGUMENT...`` as USER, also where USER may not read this Python.
"""

from __future__ import annotations

import os
import pwd
import signal
import subprocess
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import trio

import qmpfd

#: Seconds for what takes milliseconds when all is well: to start, to end.
PATIENCE = 10.0


class Broken(Exception):
    """The daemon does not do what it promises."""


@dataclass
class DaemonProcess:
    """A running daemon: where it listens, and what it holds open."""

    socket: Path
    pid: int
    process: trio.Process | None = None  # None: somebody else started it
    log: bytearray = field(default_factory=bytearray)

    def fd_count(self) -> int:
        """How many descriptors it has open."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    async def settles_at(self, count: int) -> bool:
        """Whether it has just *count* descriptors open, or will soon: that a client has gone, it
        hears in its own time.
        """
        for _ in range(int(PATIENCE / 0.01)):
            if self.fd_count() == count:
                return True
            await trio.sleep(0.01)
        return False

    def file_behind(self, fd: int) -> tuple[int, int] | None:
        """Which file its descriptor *fd* is, by device and inode; None if it is not open."""
        try:
            return identity(os.stat(f"/proc/{self.pid}/fd/{fd}"))
        except FileNotFoundError:
            return None

    def access_of(self, fd: int) -> int:
        """The access mode of its descriptor *fd*: O_RDONLY, O_WRONLY or O_RDWR."""
        with open(f"/proc/{self.pid}/fdinfo/{fd}") as info:
            flags = next(line for line in info if line.startswith("flags:"))
        return int(flags.split()[1], 8) & os.O_ACCMODE

    def said(self) -> str:
        """What it wrote to its standard error."""
        return self.log.decode(errors="replace").strip() or "(it said nothing)"


def identity(found: os.stat_result) -> tuple[int, int]:
    """A file's device and inode: no two files that exist share both."""
    return found.st_dev, found.st_ino


@asynccontextmanager
async def running_daemon(
    socket: Path, *options: str, user: str | None = None
) -> AsyncGenerator[DaemonProcess, None]:
    """Start a daemon that listens on *socket*; at the end, ask it to go, and see that it does.

    Args:
        socket: where it listens.
        options: further options of ``qmpfd serve``.
        user: whom it runs as; whoever runs this if None.

    Raises:
        Broken: it does not start, or does not end as it should.
    """
    start = ["-m", "qmpfd", "serve"] if user is None else [__file__, user]
    command = [sys.executable, *start, f"--socket={socket}", *options]
    process = await trio.lowlevel.open_process(
        command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    daemon = DaemonProcess(socket, process.pid, process)
    try:
        async with trio.open_nursery() as nursery:
            listening = trio.Event()
            nursery.start_soon(_read_log, daemon, listening)
            with trio.move_on_after(PATIENCE) as waiting:
                await listening.wait()
            if waiting.cancelled_caught or process.poll() is not None:
                raise Broken(f"the daemon does not start: {daemon.said()}")
            yield daemon
            process.terminate()
            with trio.move_on_after(PATIENCE):
                await process.wait()
            if process.returncode != 0:
                how = "does not end" if process.returncode is None else "ends with an error"
                raise Broken(f"the daemon {how} on SIGTERM: {daemon.said()}")
            if socket.exists():
                raise Broken("the daemon is gone, but its socket file is not")
    finally:
        if process.poll() is None:
            process.kill()
            with trio.move_on_after(PATIENCE, shield=True):
                await process.wait()


async def _read_log(daemon: DaemonProcess, listening: trio.Event) -> None:
    """Keep what the daemon says, and note when it says that clients may come, or is gone."""
    assert daemon.process is not None
    assert daemon.process.stderr is not None
    async with daemon.process.stderr as log:
        async for chunk in log:
            daemon.log += chunk
            if b"listening on" in daemon.log:
                listening.set()
    listening.set()


async def end_on_sigterm(scope: trio.CancelScope) -> None:
    """Cancel *scope* when this process is told to end, so that it cleans up as it goes."""
    with trio.open_signal_receiver(signal.SIGTERM) as signals:
        async for _ in signals:
            scope.cancel()


def become(user: str) -> None:
    """Give up all rights that *user* does not have, for good."""
    entry = pwd.getpwnam(user)
    os.setgroups([])
    os.setgid(entry.pw_gid)
    os.setuid(entry.pw_uid)


def run(main: Callable[[], Awaitable[int]]) -> int:
    """Run a script's main function; its exit status, with one line for each expected failure."""
    try:
        return trio.run(main)
    except (Exception, BaseExceptionGroup, KeyboardInterrupt) as exc:
        failures = list(leaves(exc))
        if all(isinstance(failure, KeyboardInterrupt) for failure in failures):
            return 128 + signal.SIGINT
        expected = (Broken, qmpfd.QMPError, qmpfd.ProtocolError, trio.BrokenResourceError, OSError)
        if not all(isinstance(failure, expected) for failure in failures):
            raise
    for text in dict.fromkeys(f"{type(failure).__name__}: {failure}" for failure in failures):
        print(f"FAILED: {text}", file=sys.stderr)
    return 1


def leaves(exc: BaseException) -> Iterator[BaseException]:
    """The exceptions in a group, and in the groups in it."""
    if isinstance(exc, BaseExceptionGroup):
        for part in exc.exceptions:
            yield from leaves(part)
    else:
        yield exc


if __name__ == "__main__":
    # All that it will need: that user may not be able to read where it is.
    import qmpfd.cli.daemon
    import qmpfd.cli.logs
    import qmpfd.cli.serve
    import qmpfd.cli.takeover
    import qmpfd.server.fdstore.recover
    import qmpfd.server.startup
    from qmpfd.cli import main as qmpfd_main

    become(sys.argv[1])
    sys.exit(qmpfd_main(["serve", *sys.argv[2:]]))
