"""Helpers that the tests of the daemon, the client and the command line share.

There are no mocks: the daemons are real, in the test's event loop, in a thread or in a process,
and so are the descriptors.
"""

from __future__ import annotations

import array
import json
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Self

import trio
import trio.testing

import qmpfd
from qmpfd import testing
from qmpfd.kernel.binding import Permissions
from qmpfd.kernel.fd import FileDescriptorLike, fileno
from qmpfd.server.server import DaemonServer
from qmpfd.server.startup import run_daemon

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 20.0
"""Timeout in seconds for a wait that must end."""


def open_fds(pid: int | str = "self") -> dict[int, str]:
    """Return the open descriptors of a process, each with its link in /proc/PID/fd."""
    found = {}
    folder = f"/proc/{pid}/fd"
    for name in os.listdir(folder):
        with suppress(FileNotFoundError):  # the descriptor of os.listdir itself
            found[int(name)] = os.readlink(f"{folder}/{name}").removesuffix(" (deleted)")
    return found


# -- QMP as text -------------------------------------------------------------------------------


def request(command: str, arguments: Mapping[str, Any] | None = None, **members: Any) -> bytes:
    """Return a request as JSON; *members* are its other members, such as ``id``."""
    whole = {"execute": command, **members}
    if arguments is not None:
        whole["arguments"] = arguments
    return json.dumps(whole).encode() + b"\r\n"


ADD = request("add-fd")
QUERY = request("query-name")
CAPABILITIES = request("qmp_capabilities")


def value(reply: dict[str, Any]) -> Any:
    """Return the value of a reply that is no error."""
    assert "return" in reply, reply
    return reply["return"]


def error(reply: dict[str, Any]) -> str:
    """Return the class of an error reply."""
    assert "error" in reply, reply
    assert reply["error"].keys() == {"class", "desc"}
    return str(reply["error"]["class"])


# -- descriptors -------------------------------------------------------------------------------


class Pipe:
    """A pipe whose write end a test sends; the read end shows whether a write end is still open."""

    def __init__(self) -> None:
        self._reader, self._writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def fileno(self) -> int:
        """Return the write end."""
        return self._writer

    def release(self) -> None:
        """Close the test's own write end."""
        number, self._writer = self._writer, -1
        if number >= 0:
            os.close(number)

    def held(self) -> bool:
        """Return whether a write end is open, in a process or in a socket's queue."""
        assert self._writer < 0, "released first, or it is held by ourselves"
        try:
            return os.read(self._reader, 1) != b""
        except BlockingIOError:
            return True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.release()
        os.close(self._reader)


@contextmanager
def pipes(count: int) -> Iterator[list[Pipe]]:
    """Yield *count* pipes."""
    with ExitStack() as stack:
        yield [stack.enter_context(Pipe()) for _ in range(count)]


def send_now(sock: socket.socket, data: bytes, fds: Sequence[FileDescriptorLike] = ()) -> None:
    """Send *data*, and *fds* with its first byte, in one system call."""
    numbers = array.array("i", map(fileno, fds))
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, numbers)] if fds else []
    assert sock.sendmsg([data], rights) == len(data)


# -- the wire ----------------------------------------------------------------------------------


class Wire:
    """One end of a connection: bytes and descriptors, a client's or a server's.

    ``send`` never blocks and has no checkpoint: data of consecutive calls is in the socket before a
    daemon in the same event loop can read any of it.
    """

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.sock.setblocking(False)
        self._received = bytearray()

    @classmethod
    async def connect(cls, path: Path) -> Self:
        """Connect, without reading the greeting."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            sock.connect(os.fspath(path))
        except BaseException:
            sock.close()
            raise
        return cls(sock)

    @classmethod
    async def session(cls, path: Path) -> Self:
        """Connect and negotiate."""
        wire = await cls.connect(path)
        try:
            greeting = await wire.reply()
            assert "QMP" in greeting, greeting
            assert await wire.call("qmp_capabilities") == {"return": {}}
        except BaseException:
            wire.close()
            raise
        return wire

    def send(self, data: bytes, fds: Sequence[FileDescriptorLike] = ()) -> None:
        """Send *data*, and *fds* with its first byte, in one system call."""
        send_now(self.sock, data, fds)

    async def send_all(self, data: bytes) -> None:
        """Send *data*, waiting while the socket's buffer is full."""
        rest = memoryview(data)
        while rest:
            try:
                rest = rest[self.sock.send(rest) :]
            except BlockingIOError:
                await trio.lowlevel.wait_writable(self.sock)

    async def _receive(self) -> bytes:
        """Return the next bytes; none at the end of the connection."""
        while True:
            try:
                return self.sock.recv(1 << 16)
            except BlockingIOError:
                pass
            except ConnectionResetError:  # the peer has closed with our data unread
                return b""
            await trio.lowlevel.wait_readable(self.sock)

    async def line(self) -> bytes | None:
        """Return the next line with its end; None at the end of the connection."""
        while (end := self._received.find(b"\n")) < 0:
            data = await self._receive()
            if not data:
                assert not self._received, f"closed within a line: {self._received!r}"
                return None
            self._received += data
        line = bytes(self._received[: end + 1])
        del self._received[: end + 1]
        return line

    async def reply(self) -> dict[str, Any]:
        """Return the next reply, greeting or event."""
        line = await self.line()
        assert line is not None, "closed, where a reply was due"
        assert line.endswith(b"\r\n")
        assert line.isascii()
        reply = json.loads(line)
        assert isinstance(reply, dict)
        return reply

    async def receive(self) -> dict[str, Any]:
        """Return the next request, for a fake server; an empty one at the end of the connection."""
        return dict(json.loads(await self.line() or b"{}"))

    async def replies(self, count: int) -> list[dict[str, Any]]:
        """Return the next *count* replies."""
        return [await self.reply() for _ in range(count)]

    async def rest(self) -> list[dict[str, Any]]:
        """Return all replies and events until the end of the connection."""
        lines = []
        while (line := await self.line()) is not None:
            lines.append(json.loads(line))
        return lines

    async def drain(self) -> bytes:
        """Return all bytes until the end of the connection, also an incomplete line."""
        while data := await self._receive():
            self._received += data
        return bytes(self._received)

    async def call(
        self,
        command: str,
        arguments: Mapping[str, Any] | None = None,
        fds: Sequence[FileDescriptorLike] = (),
    ) -> dict[str, Any]:
        """Send a command; return its reply."""
        self.send(request(command, arguments), fds)
        return await self.reply()

    def shut_write(self) -> None:
        """Shut down the sending direction."""
        self.sock.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Close the connection."""
        if self.sock.fileno() >= 0:
            with suppress(RuntimeError):  # the event loop has ended: no task waits for the socket
                trio.lowlevel.notify_closing(self.sock)
            self.sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


async def remove(wire: Wire, info: Mapping[str, Any]) -> None:
    """Remove the descriptor for which ``add-fd`` returned *info*."""
    arguments = {"fdset-id": info["fdset-id"], "fd": info["fd"]}
    assert await wire.call("remove-fd", arguments) == {"return": {}}


# -- daemons -----------------------------------------------------------------------------------


@asynccontextmanager
async def daemon(*paths: Path, **options: Any) -> AsyncIterator[DaemonServer]:
    """Run a daemon in the test's event loop; stop it at the end of the block."""
    names = {"dialect", "limits", "policy", "metrics_path", "fd_store"} & options.keys()
    make_server = partial(DaemonServer, **{name: options.pop(name) for name in names})
    permissions = Permissions(options.pop("socket_mode", 0o600), options.pop("socket_group", None))
    start = partial(run_daemon, make_server, paths, permissions, **options)
    async with trio.open_nursery() as nursery:
        server: DaemonServer = await nursery.start(start)
        yield server
        server.stop()


async def settle() -> None:
    """Wait until all other tasks of this event loop, such as the daemon's, wait for events."""
    await trio.testing.wait_all_tasks_blocked()


@contextmanager
def daemon_thread(path: Path, **options: Any) -> Iterator[None]:
    """Run a daemon in a thread with an event loop of its own, for tests without event loop."""
    started: list[tuple[qmpfd.Server, trio.lowlevel.TrioToken]] = []
    ready = threading.Event()

    async def main() -> None:
        async with daemon(path, **options) as server:
            started.append((server, trio.lowlevel.current_trio_token()))
            ready.set()
            await server.ended.wait()

    def run() -> None:
        try:
            trio.run(main)
        finally:
            ready.set()

    thread = threading.Thread(target=run, name="daemon")
    thread.start()
    try:
        assert ready.wait(PATIENCE)
        assert started, "the daemon did not start"
        yield
    finally:
        for server, token in started:
            with suppress(trio.RunFinishedError):  # a client has sent "quit"
                trio.from_thread.run_sync(server.stop, trio_token=token)
        thread.join(PATIENCE)
        assert not thread.is_alive()


class DaemonProcess(testing.DaemonProcess):
    """A daemon as a process of its own, whose log is read line by line."""

    _lines_read = 0

    @property
    def log(self) -> list[str]:
        """The lines of the log so far, without their times: the log is a file, and has them."""
        return [re.sub(r"^[0-9T:.-]+Z (?=qmpfd:)", "", line) for line in super().log]

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the daemon."""
        self.process.send_signal(number)

    def wait(self) -> int:
        """Wait for the daemon's end; return its exit status."""
        return self.process.wait(PATIENCE)

    def await_line(self, found: Callable[[str], bool]) -> str:
        """Read the daemon's log up to a line for which *found* is true; return that line."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            ended = self.process.poll() is not None
            for line in self.log[self._lines_read :]:
                self._lines_read += 1
                if found(line):
                    return line
            if ended:
                break
            time.sleep(0.005)
        raise AssertionError(f"the daemon's log: {self.log}")


@contextmanager
def daemon_process(
    path: Path,
    *options: str,
    named: bool = True,
    pass_fds: Sequence[int] = (),
    env: Mapping[str, str] | None = None,
    prefix: Sequence[str] = (),
) -> Iterator[DaemonProcess]:
    """Start a daemon, wait until it listens, and end it at the end of the block.

    *named*: pass *path* as an option; else the daemon must find it, for instance in *env*.
    *prefix*: command that starts the daemon, such as prlimit(1).
    """
    command = [*prefix, sys.executable, "-m", "qmpfd", "serve", *options]
    if named:
        command += ["--socket", os.fspath(path)]
    environment = {**os.environ, **(env or {})}
    with testing.running(
        DaemonProcess, path, command, pass_fds, cwd=ROOT, env=environment
    ) as process:
        yield process
