"""pytest fixtures for programs that pass descriptors over QMP: a real daemon, without QEMU.

An installed qmpfd is a pytest plugin with these fixtures:

``qmpfd_server``
    A daemon in the test's own nursery (with pytest-trio), as a :class:`qmpfd.Server`; it listens
    at ``qmpfd_path``.
``qmpfd_process``
    A daemon as a process of its own, as a :class:`DaemonProcess`; it listens at ``qmpfd_path``.
``qmpfd_path``
    The socket's path: a new one for each test, short enough for a Unix socket.

:func:`daemon` and :func:`daemon_process` start daemons with other options: with the dialect
``qemu``, a daemon replies with QEMU's error classes.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

import pytest

if TYPE_CHECKING:
    import trio

    from .server.handle import Server

__all__ = ["DaemonProcess", "daemon", "daemon_process"]

#: Seconds to wait for a daemon's start or end, which takes a fraction of one.
_TIMEOUT = 20.0


@asynccontextmanager
async def daemon(*paths: str | os.PathLike[str], **options: Any) -> AsyncIterator[Server]:
    """Run a daemon in this event loop, in a nursery of its own; stop it after the block.

    An exception of the block, ``pytest.skip()`` included, leaves it as it is.

    Args:
        paths: the sockets to listen on.
        options: further arguments of :func:`qmpfd.serve`.

    Raises:
        Exception: the daemon does not start: what :func:`qmpfd.serve` raises.
    """
    import trio

    failure: BaseException | None = None  # a nursery would wrap it in an ExceptionGroup
    async with trio.open_nursery() as nursery:
        try:
            server = await _start(nursery, paths, options)
            yield server
            server.stop()
        except BaseException as exc:  # noqa: ASYNC103, BLE001 - raised below
            failure = exc
            nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure


async def _start(
    nursery: trio.Nursery, paths: Sequence[str | os.PathLike[str]], options: dict[str, Any]
) -> Server:
    from .server.handle import Server
    from .server.startup import serve

    server = await nursery.start(partial(serve, paths, **options))
    assert isinstance(server, Server)
    return server


class DaemonProcess:
    """A daemon as a process of its own; it is stopped at the end of the test.

    Args:
        path: the socket that it listens on.
        process: the process.
    """

    def __init__(self, path: Path, process: subprocess.Popen[bytes], stderr: IO[bytes]) -> None:
        self.path = path
        self.process = process
        self._stderr = stderr
        self._output = b""

    @property
    def log(self) -> list[str]:
        """The lines that the daemon has written to standard error so far."""
        self._read_stderr()
        return self._output.decode(errors="replace").splitlines()

    def _read_stderr(self) -> None:
        if not self._stderr.closed:
            number = self._stderr.fileno()
            # pread(2), because read(2) would move the file offset, which the daemon shares.
            self._output = os.pread(number, os.fstat(number).st_size, 0)

    @property
    def pid(self) -> int:
        """The daemon's process id."""
        return self.process.pid

    def open_fds(self) -> dict[int, str]:
        """Return the daemon's open descriptors: the link in /proc/PID/fd by number.

        Compare two results to see whether a program has removed everything that it added.
        """
        folder = f"/proc/{self.pid}/fd"
        found = {}
        for name in os.listdir(folder):
            try:
                found[int(name)] = os.readlink(f"{folder}/{name}")
            except FileNotFoundError:  # closed since listdir()
                continue
        return found

    def kill(self) -> None:
        """Kill the daemon (SIGKILL), to test a program whose daemon has crashed."""
        self.process.kill()
        self.process.wait()
        self.stop()

    def stop(self) -> int:
        """Stop the daemon gracefully, if it runs; return its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)  # a test may have stopped it
            self.process.terminate()
            try:
                self.process.wait(_TIMEOUT)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self.process.wait()
        self._read_stderr()
        return self.process.returncode


ProcessT = TypeVar("ProcessT", bound=DaemonProcess)


@contextmanager
def daemon_process(path: str | os.PathLike[str], *options: str) -> Iterator[DaemonProcess]:
    """Run a daemon as a process of its own, which serves clients; stop it after the block.

    Args:
        path: the socket to listen on.
        options: options of ``qmpfd serve``, such as ``--dialect=qemu``.

    Raises:
        RuntimeError: the daemon does not start; the text has its output.
    """
    command = [sys.executable, "-m", "qmpfd", "serve", "--socket", os.fspath(path), *options]
    with running(DaemonProcess, Path(path), command) as process:
        yield process


@contextmanager
def running(
    kind: type[ProcessT],
    path: Path,
    command: Sequence[str],
    pass_fds: Sequence[int] = (),
    **settings: Any,
) -> Iterator[ProcessT]:
    """Run *command*, which ends with arguments of ``qmpfd serve``, until the end of the block.

    Args:
        kind: the class of the result.
        path: the socket that the daemon listens on.
        command: the command.
        pass_fds: further descriptors that the daemon inherits.
        settings: further arguments of Popen.

    Raises:
        RuntimeError: the daemon does not start; the text has its output.
    """
    reader, writer = os.pipe()
    # A file for standard error: a pipe that is full would block the daemon.
    with tempfile.TemporaryFile() as stderr, open(reader, "rb") as ready:
        with open(writer, "wb"):
            process = subprocess.Popen(
                [*command, f"--ready-fd={writer}"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                pass_fds=[writer, *pass_fds],
                **settings,
            )
        started = kind(path, process, stderr)
        try:
            # Up to its end: after that, the daemon does not have the pipe open any more.
            if not (select.select([ready], [], [], _TIMEOUT)[0] and ready.read()):
                started.stop()
                why = " ".join(started.log) or "no word"
                raise RuntimeError(f"the daemon does not start: {why}")
            yield started
        finally:
            started.stop()


@pytest.fixture
def qmpfd_path() -> Iterator[Path]:
    """The path of the socket of this test's daemon."""
    # Not in tmp_path, which contains the test's name: a socket's path has at most 107 bytes.
    folder = tempfile.mkdtemp(prefix="qmpfd-")
    yield Path(folder) / "qmp.sock"
    shutil.rmtree(folder)


@pytest.fixture
async def qmpfd_server(qmpfd_path: Path, nursery: trio.Nursery) -> AsyncIterator[Server]:
    """A daemon in the test's own nursery, at ``qmpfd_path``; needs pytest-trio."""
    server = await _start(nursery, [qmpfd_path], {})
    yield server
    server.stop()
    await server.ended.wait()


@pytest.fixture
def qmpfd_process(qmpfd_path: Path) -> Iterator[DaemonProcess]:
    """A daemon as a process of its own, at ``qmpfd_path``."""
    with daemon_process(qmpfd_path) as process:
        yield process
