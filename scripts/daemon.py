"""Run a qmpfd daemon as a child process, for the other scripts in this folder.

    python scripts/daemon.py USER [ARGUMENT]...

runs ``qmpfd serve ARGUMENT...`` as USER, even if USER may not read this Python.
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

#: Timeout in seconds for a start or an end, which take milliseconds.
PATIENCE = 10.0


class Broken(Exception):
    """The daemon does not behave as documented."""


@dataclass
class Daemon:
    """A running daemon: its socket, its process and its log."""

    socket: Path
    pid: int
    process: trio.Process | None = None  # None: this script did not start the daemon
    log: bytearray = field(default_factory=bytearray)

    def fd_count(self) -> int:
        """Return the number of descriptors that the daemon has open."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    async def settles_at(self, count: int) -> bool:
        """Wait until the daemon has *count* descriptors open; return whether that happened in time.

        The daemon closes a client's descriptors only when it has read the end of the connection.
        """
        for _ in range(int(PATIENCE / 0.01)):
            if self.fd_count() == count:
                return True
            await trio.sleep(0.01)
        return False

    def file_behind(self, fd: int) -> tuple[int, int] | None:
        """Return device and inode of the daemon's descriptor *fd*; None if *fd* is not open."""
        try:
            return identity(os.stat(f"/proc/{self.pid}/fd/{fd}"))
        except FileNotFoundError:
            return None

    def access_of(self, fd: int) -> int:
        """Return the access mode of the daemon's descriptor *fd*: O_RDONLY, O_WRONLY or O_RDWR."""
        with open(f"/proc/{self.pid}/fdinfo/{fd}") as info:
            flags = next(line for line in info if line.startswith("flags:"))
        return int(flags.split()[1], 8) & os.O_ACCMODE

    def said(self) -> str:
        """Return the daemon's log as text."""
        return self.log.decode(errors="replace").strip() or "(it said nothing)"


def identity(found: os.stat_result) -> tuple[int, int]:
    """Return a file's device and inode, which no other existing file has."""
    return found.st_dev, found.st_ino


@asynccontextmanager
async def running_daemon(
    socket: Path, *options: str, user: str | None = None
) -> AsyncGenerator[Daemon, None]:
    """Start a daemon; at the end, send SIGTERM and check that the daemon exits cleanly.

    Args:
        socket: path of its socket.
        options: further options of ``qmpfd serve``.
        user: name of the daemon's user; None for the user of this process.

    Raises:
        Broken: the daemon does not start, or does not exit with status 0.
    """
    start = ["-m", "qmpfd", "serve"] if user is None else [__file__, user]
    command = [sys.executable, *start, f"--socket={socket}", *options]
    process = await trio.lowlevel.open_process(
        command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    daemon = Daemon(socket, process.pid, process)
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


async def _read_log(daemon: Daemon, listening: trio.Event) -> None:
    """Collect the daemon's log; set *listening* when the daemon listens or has exited."""
    assert daemon.process is not None
    assert daemon.process.stderr is not None
    async with daemon.process.stderr as log:
        async for chunk in log:
            daemon.log += chunk
            if b"listening on" in daemon.log:
                listening.set()
    listening.set()


async def end_on_sigterm(scope: trio.CancelScope) -> None:
    """Cancel *scope* on SIGTERM: the script then cleans up before it exits."""
    with trio.open_signal_receiver(signal.SIGTERM) as signals:
        async for _ in signals:
            scope.cancel()


def become(user: str) -> None:
    """Set this process's uid, gid and groups to *user*'s, irrevocably."""
    entry = pwd.getpwnam(user)
    os.setgroups([])
    os.setgid(entry.pw_gid)
    os.setuid(entry.pw_uid)


def run(main: Callable[[], Awaitable[int]]) -> int:
    """Run a script's main function; print each expected failure; return the exit status."""
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
    """Yield the exceptions in a group and in its nested groups."""
    if isinstance(exc, BaseExceptionGroup):
        for part in exc.exceptions:
            yield from leaves(part)
    else:
        yield exc


if __name__ == "__main__":
    # All modules that the daemon needs: USER may not be able to read them.
    import qmpfd.cli.daemon
    import qmpfd.cli.logs
    import qmpfd.cli.serve
    import qmpfd.cli.takeover
    import qmpfd.server.fdstore.recover
    import qmpfd.server.startup
    from qmpfd.cli import main as qmpfd_main

    become(sys.argv[1])
    sys.exit(qmpfd_main(["serve", *sys.argv[2:]]))
