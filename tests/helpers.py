"""What the tests of the daemon, the client and the command line share.

Nothing here is a mock: daemons are real ones, in the test's own event loop, in a thread or in a
process of their own, and descriptors are real descriptors.
"""

from __future__ import annotations

import array
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Self

import trio
import trio.testing

import qmpfd
from qmpfd.kernel.fd import FileDescriptorLike, fileno
from qmpfd.server.listen.binding import Permissions
from qmpfd.server.server import DaemonServer
from qmpfd.server.startup import run_daemon

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 20.0
"""Seconds until something that must happen is given up."""


def open_fds(pid: int | str = "self") -> dict[int, str]:
    """The open descriptors of a process, and what each of them is."""
    found = {}
    folder = f"/proc/{pid}/fd"
    for name in os.listdir(folder):
        with suppress(FileNotFoundError):  # the one that lists the folder
            found[int(name)] = os.readlink(f"{folder}/{name}").removesuffix(" (deleted)")
    return found


# -- QMP as text -------------------------------------------------------------------------------


def request(command: str, arguments: Mapping[str, Any] | None = None, **members: Any) -> bytes:
    """One request; *members* are the others that it has, such as ``id``."""
    whole = {"execute": command, **members}
    if arguments is not None:
        whole["arguments"] = arguments
    return json.dumps(whole).encode() + b"\r\n"


ADD = request("add-fd")
QUERY = request("query-name")
CAPABILITIES = request("qmp_capabilities")


def value(reply: dict[str, Any]) -> Any:
    """What a reply returns; it is no error."""
    assert "return" in reply, reply
    return reply["return"]


def error(reply: dict[str, Any]) -> str:
    """The class of a reply's error."""
    assert "error" in reply, reply
    assert reply["error"].keys() == {"class", "desc"}
    return str(reply["error"]["class"])


# -- descriptors -------------------------------------------------------------------------------


class Pipe:
    """A pipe, to see whether anybody still holds what was passed on: its writing end."""

    def __init__(self) -> None:
        self._reader, self._writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def fileno(self) -> int:
        """The writing end."""
        return self._writer

    def release(self) -> None:
        """Close our own writing end."""
        number, self._writer = self._writer, -1
        if number >= 0:
            os.close(number)

    def held(self) -> bool:
        """Whether another writing end is open, in some process or on the way there."""
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
    """*count* of them."""
    with ExitStack() as stack:
        yield [stack.enter_context(Pipe()) for _ in range(count)]


def send_now(sock: socket.socket, data: bytes, fds: Sequence[FileDescriptorLike] = ()) -> None:
    """Send *data*, and *fds* with its first byte, in one system call."""
    numbers = array.array("i", map(fileno, fds))
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, numbers)] if fds else []
    assert sock.sendmsg([data], rights) == len(data)


# -- the wire ----------------------------------------------------------------------------------


class Wire:
    """A connection as bytes and descriptors, whichever end of it.

    Sending never waits and never yields to the event loop: what is sent in a row lies in the
    socket before a daemon in the same loop gets to read any of it.
    """

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.sock.setblocking(False)
        self._received = bytearray()

    @classmethod
    async def connect(cls, path: Path) -> Self:
        """Connect; the greeting is not read yet."""
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
        """Send what may be too much for the socket's buffer."""
        while data:
            try:
                data = data[self.sock.send(data) :]
            except BlockingIOError:
                await trio.lowlevel.wait_writable(self.sock)

    async def _receive(self) -> bytes:
        """What comes next; nothing once the peer has closed."""
        while True:
            try:
                return self.sock.recv(1 << 16)
            except BlockingIOError:
                pass
            except ConnectionResetError:  # closed, with something of ours unread
                return b""
            await trio.lowlevel.wait_readable(self.sock)

    async def line(self) -> bytes | None:
        """The next line, its end included; None once the peer has closed."""
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
        """The next reply, or greeting, or event."""
        line = await self.line()
        assert line is not None, "closed, where a reply was due"
        assert line.endswith(b"\r\n")
        assert line.isascii()
        reply = json.loads(line)
        assert isinstance(reply, dict)
        return reply

    async def receive(self) -> dict[str, Any]:
        """The next request, for those who play the server; empty once the client has closed."""
        return dict(json.loads(await self.line() or b"{}"))

    async def replies(self, count: int) -> list[dict[str, Any]]:
        """The next *count* of them."""
        return [await self.reply() for _ in range(count)]

    async def rest(self) -> list[dict[str, Any]]:
        """All that comes until the peer closes."""
        lines = []
        while (line := await self.line()) is not None:
            lines.append(json.loads(line))
        return lines

    async def drain(self) -> bytes:
        """All bytes that come until the peer closes, whole lines or not."""
        while data := await self._receive():
            self._received += data
        return bytes(self._received)

    async def call(
        self,
        command: str,
        arguments: Mapping[str, Any] | None = None,
        fds: Sequence[FileDescriptorLike] = (),
    ) -> dict[str, Any]:
        """Send one command; its reply."""
        self.send(request(command, arguments), fds)
        return await self.reply()

    def shut_write(self) -> None:
        """Send nothing more, and tell the peer."""
        self.sock.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Close the connection."""
        if self.sock.fileno() >= 0:
            with suppress(RuntimeError):  # no event loop any more, so nobody waits
                trio.lowlevel.notify_closing(self.sock)
            self.sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


async def remove(wire: Wire, info: Mapping[str, Any]) -> None:
    """Remove what ``add-fd`` returned *info* for."""
    arguments = {"fdset-id": info["fdset-id"], "fd": info["fd"]}
    assert await wire.call("remove-fd", arguments) == {"return": {}}


# -- daemons -----------------------------------------------------------------------------------


@asynccontextmanager
async def daemon(*paths: Path, **options: Any) -> AsyncIterator[DaemonServer]:
    """A daemon in the test's own event loop; told to end, and waited for, afterwards."""
    names = {"dialect", "limits", "policy", "metrics_path", "keeping"} & options.keys()
    make_server = partial(DaemonServer, **{name: options.pop(name) for name in names})
    permissions = Permissions(options.pop("socket_mode", 0o600), options.pop("socket_group", None))
    start = partial(run_daemon, make_server, paths, permissions, **options)
    async with trio.open_nursery() as nursery:
        server: DaemonServer = await nursery.start(start)
        yield server
        server.stop()


async def settle() -> None:
    """Wait until the daemon in this event loop has done all that it can do for now."""
    await trio.testing.wait_all_tasks_blocked()


@contextmanager
def daemon_thread(path: Path, **options: Any) -> Iterator[None]:
    """A daemon in a thread with an event loop of its own, for tests without one."""
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
            with suppress(trio.RunFinishedError):  # a client said "quit"
                trio.from_thread.run_sync(server.stop, trio_token=token)
        thread.join(PATIENCE)
        assert not thread.is_alive()


class DaemonProcess:
    """``python -m qmpfd serve``, as a process of its own."""

    def __init__(self, process: subprocess.Popen[str], path: Path) -> None:
        self.process = process
        self.path = path
        self.log: list[str] = []

    @property
    def pid(self) -> int:
        """Its process id."""
        return self.process.pid

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self.process.send_signal(number)

    def wait(self) -> int:
        """Wait for its end; its exit status."""
        status = self.process.wait(PATIENCE)
        assert self.process.stderr is not None
        self.log += self.process.stderr.read().splitlines()
        return status

    def await_line(self, found: Callable[[str], bool]) -> None:
        """Read what it says on standard error until it says that."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line.rstrip("\n"))
            if found(line):
                return
        raise AssertionError(f"the daemon ended: {self.log}")


@contextmanager
def daemon_process(
    path: Path,
    *options: str,
    named: bool = True,
    pass_fds: Sequence[int] = (),
    env: Mapping[str, str] | None = None,
    prefix: Sequence[str] = (),
) -> Iterator[DaemonProcess]:
    """Start a daemon, wait until it listens, and end it afterwards where it has not.

    *named* tells it the path by an option; without, it has to find it by itself, in *env*.
    *prefix* is a command that starts it, such as prlimit.
    """
    command = [*prefix, sys.executable, "-m", "qmpfd", "serve", *options]
    if named:
        command += ["--socket", os.fspath(path)]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        pass_fds=pass_fds,
        env={**os.environ, **(env or {})},
    )
    with process:
        started = DaemonProcess(process, path)
        try:
            started.await_line(lambda line: f"listening on {path}" in line)
            yield started
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.terminate()
                try:
                    process.wait(PATIENCE)
                except subprocess.TimeoutExpired:
                    process.kill()
