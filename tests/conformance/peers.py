"""The servers under comparison, each a process, and a blocking client for them."""

from __future__ import annotations

import array
import json
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import pytest
from installed import QEMU, need

DEADLINE = 10.0
"""Timeout in seconds for a reply, which takes milliseconds."""

POLL = 0.01
ROOT = Path(__file__).resolve().parents[2]

ESC = b"\x1b"
"""Resets the parser in any state; the reply is exactly one error."""


class Wire:
    """One connection: sends bytes and descriptors, reads lines."""

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(DEADLINE)
        self._buffer = bytearray()
        self._probes = 0
        try:
            self._socket.connect(path)
        except OSError:
            self._socket.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()

    def send(self, data: bytes, fds: Sequence[int] = (), *, bytewise: bool = False) -> None:
        """Send `data` in one write, or byte by byte, with the descriptors on the first write."""
        pieces = [data[i : i + 1] for i in range(len(data))] if bytewise else [data]
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        for piece in pieces:
            try:
                sent = self._socket.sendmsg([piece], rights)
            except BrokenPipeError:
                return  # the peer has closed, for instance after `quit`: the replies show that
            rights = []  # a short write has sent the descriptors with its first byte
            if sent < len(piece):  # an empty send to a closed peer would be an error
                self._socket.sendall(piece[sent:])

    def shut_write(self) -> None:
        self._socket.shutdown(socket.SHUT_WR)

    def line(self) -> bytes | None:
        """Return the next line with its end; None at the end of the connection."""
        while (end := self._buffer.find(b"\n")) < 0:
            try:
                chunk = self._socket.recv(65536)
            except ConnectionResetError:
                chunk = b""  # the peer has closed with our data unread
            if not chunk:
                assert not self._buffer, f"closed in the middle of a line: {self._buffer!r}"
                return None
            self._buffer += chunk
        line = bytes(self._buffer[: end + 1])
        del self._buffer[: end + 1]
        return line

    def lines(self, count: int) -> list[bytes]:
        """Return `count` lines, or fewer if the peer closes or sends nothing until the timeout."""
        got: list[bytes] = []
        try:
            while len(got) < count and (line := self.line()) is not None:
                got.append(line)
        except TimeoutError:
            got.append(b"(silence)")
        return got

    def send_probe(self, *, reset: bool = False) -> None:
        """Send a probe, a harmless command with a unique id; see `until_probe`.

        `reset`: the parser may be in the middle of a message, of which the probe would become a
        part.
        """
        self._probes += 1
        probe = b'{"execute":"query-name","id":"probe %d"}' % self._probes
        self.send(ESC + probe if reset else probe)

    def until_probe(self) -> list[bytes]:
        """Return all lines before the reply to the last probe.

        Replies come in order: a line that is not before that reply was never sent.  No test has
        to wait for silence.
        """
        got: list[bytes] = []
        mark = b'"probe %d"' % self._probes
        try:
            while (line := self.line()) is not None and mark not in line:
                got.append(line)
        except TimeoutError:
            return [*got, b"(silence)"]
        return got if line is not None else [*got, b"(closed)"]

    def call(self, command: bytes) -> list[bytes]:
        """Return all replies to `command`, which must be complete."""
        self.send(command)
        self.send_probe()
        return self.until_probe()


@dataclass
class Peer:
    """A running server."""

    name: str
    paths: tuple[str, ...]  # the sockets: QEMU serves one client on each, qmpfd any number
    process: subprocess.Popen[bytes]
    log: Path
    version: tuple[int, int] = (0, 0)
    """Major and minor of the greeting."""

    @property
    def is_qemu(self) -> bool:
        return self.name == "qemu"

    @property
    def swallows_what_is_nested_too_deep(self) -> bool:
        """Whether one error is the only reply to a message that is nested too deep.

        True for QEMU since 11.1.  Older ones, and qmpfd, also reply to the rest of the message:
        clients may rely on the number of replies.
        """
        return self.is_qemu and self.version >= (11, 1)

    def connect(self, socket_number: int = 0) -> Wire:
        return Wire(self.paths[socket_number % len(self.paths)])

    def session(self, socket_number: int = 0) -> Wire:
        """Connect and negotiate."""
        wire = self.connect(socket_number)
        assert wire.line() is not None, f"no greeting from {self.name}: {self.said()}"
        assert wire.call(b'{"execute":"qmp_capabilities"}') == [b'{"return": {}}\r\n']
        return wire

    def said(self) -> str:
        """Return the standard error of the process."""
        return self.log.read_text(errors="replace").strip() or "(nothing on standard error)"


def qemu_command(paths: Sequence[str]) -> list[str]:
    """Return the command line of a QEMU without hardware, with one monitor on each path."""
    command = [QEMU, "-nodefaults", "-machine", "none", "-display", "none"]
    for path in paths:
        command += ["-qmp", f"unix:{path},server=on,wait=off"]
    return command


def daemon_command(paths: Sequence[str], dialect: str) -> list[str]:
    return [sys.executable, "-m", "qmpfd", "serve", "--socket", paths[0], "--dialect", dialect]


@contextmanager
def start_qemu(sockets: int = 2) -> Iterator[Peer]:
    need(QEMU)
    with _folder() as folder:
        paths = tuple(str(folder / f"{n}.sock") for n in range(sockets))
        with _started("qemu", qemu_command(paths), paths, folder / "log") as peer:
            yield peer


@contextmanager
def start_daemon(dialect: str = "qemu") -> Iterator[Peer]:
    with _folder() as folder:
        paths = (str(folder / "qmpfd.sock"),)
        with _started("qmpfd", daemon_command(paths, dialect), paths, folder / "log") as peer:
            yield peer


@contextmanager
def qemu_at(path: Path) -> Iterator[Callable[[], subprocess.Popen[bytes]]]:
    """Yield a function that starts a QEMU at *path*; kill all started processes at the end.

    QEMU inherits a socket that already listens.  Else a test would have to retry connect(2), and
    each attempt might be the monitor's only client for a moment.
    """
    need(QEMU)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener, ExitStack() as started:
        listener.bind(str(path))
        listener.listen()
        command = [QEMU, "-nodefaults", "-machine", "none", "-display", "none"]
        command += ["-chardev", f"socket,id=qmp,fd={listener.fileno()},server=on,wait=off"]
        command += ["-mon", "chardev=qmp,mode=control"]

        def start() -> subprocess.Popen[bytes]:
            process = started.enter_context(subprocess.Popen(command, pass_fds=[listener.fileno()]))
            started.callback(process.kill)
            return process

        yield start


@contextmanager
def _folder() -> Iterator[Path]:
    """Make a folder with a short name: the path of a Unix socket has at most 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="qmpfd-") as name:
        yield Path(name)


@contextmanager
def _started(name: str, command: list[str], paths: tuple[str, ...], log: Path) -> Iterator[Peer]:
    with log.open("wb") as errors:
        process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=errors, stderr=errors
        )
    peer = Peer(name, paths, process, log)
    try:
        _await_socket(peer)
        yield peer
    finally:
        process.terminate()
        try:
            process.wait(DEADLINE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _await_socket(peer: Peer) -> None:
    """Wait until all sockets accept connections, by polling: qmpfd and QEMU share no other sign."""
    give_up = time.monotonic() + DEADLINE
    for number in range(len(peer.paths)):
        while True:
            try:
                with peer.connect(number) as wire:
                    greeting = wire.line()
                    while greeting is not None and b'"event"' in greeting:
                        greeting = wire.line()  # a QEMU that has just started sends an event first
                    peer.version = _version(greeting)
                break
            except (FileNotFoundError, ConnectionRefusedError):
                code = peer.process.poll()
                if code is not None or time.monotonic() > give_up:
                    pytest.fail(f"{peer.name} is not up (exit status {code}): {peer.said()}")
                time.sleep(POLL)


def _version(greeting: bytes | None) -> tuple[int, int]:
    numbers = json.loads(greeting or b"")["QMP"]["version"]["qemu"]
    return numbers["major"], numbers["minor"]


class Pool:
    """Keeps a peer running for several tests; starts another one if it has ended."""

    def __init__(self, start: Callable[[], AbstractContextManager[Peer]]) -> None:
        self._start = start
        self._stack = ExitStack()
        self._peer: Peer | None = None

    def get(self) -> Peer:
        if self._peer is None or self._peer.process.poll() is not None:
            self.close()
            self._peer = self._stack.enter_context(self._start())
        return self._peer

    def close(self) -> None:
        self._peer = None
        self._stack.close()


def pool_of(start: Callable[[], AbstractContextManager[Peer]]) -> Iterator[Pool]:
    it = Pool(start)
    try:
        yield it
    finally:
        it.close()
