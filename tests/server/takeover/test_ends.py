"""Takeovers that are refused, or interrupted by signals.

Tests of server/takeover/sender.py and server/takeover/receiver.py.
"""

from __future__ import annotations

import os
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from time import monotonic
from typing import Any

import msgspec
import pytest
from helpers import Pipe, pipes, send_now
from stepper import Stepped, Stepper

from qmpfd.client.blocking import BlockingClient
from qmpfd.commands import Stats
from qmpfd.kernel.fd import Fd, close_all, receive
from qmpfd.limits import TAKEOVER_FORMAT
from qmpfd.server.connection.snapshot import SavedRest
from qmpfd.server.saved_state import (
    CONFIRM,
    MORE,
    NEXT,
    REFUSED,
    SavedFd,
    SavedListener,
    SavedState,
    decode,
    encode,
)

PATIENCE = 20.0


@pytest.fixture(scope="module")
def stepper() -> Iterator[Stepper]:
    with Stepper() as stepper:
        yield stepper


@contextmanager
def daemon(stepper: Stepper, path: Path, *arguments: str, **options: Any) -> Iterator[Stepped]:
    log = path.with_suffix(f".{len(list(path.parent.glob('*.log')))}.log")
    started = stepper.start(["serve", "--socket", str(path), *arguments], log, **options)
    try:
        started.until("listening", "STEP")
        yield started
    finally:
        started.end()
    assert "Traceback" not in started.said, started.said


class FakeSuccessor:
    """Fake successor."""

    def __init__(self, path: Path) -> None:
        with BlockingClient(path, PATIENCE) as client:
            _, self.passed = client.request("takeover", {"format": TAKEOVER_FORMAT})
            self.sock = client.detach()
        self.sock.setblocking(True)
        self.sock.settimeout(PATIENCE)

    def more(self) -> bytes:
        """Request more descriptors; return the predecessor's answer."""
        self.sock.sendall(b"n")
        output, fds, _ = receive(self.sock, 1)
        self.passed += fds
        return output

    def __enter__(self) -> FakeSuccessor:
        return self

    def __exit__(self, *exc_info: object) -> None:
        close_all(self.passed)
        self.sock.close()


def fill(client: BlockingClient, made: list[Pipe]) -> None:
    for pipe in made:
        client.execute("add-fd", fds=[pipe])
        pipe.release()


# -- signals -----------------------------------------------------------------------------------

END = [signal.SIGTERM, signal.SIGINT]


@pytest.mark.parametrize("number", END)
@pytest.mark.parametrize("asked", range(3))
def test_sigterm_to_the_predecessor(
    path: Path, stepper: Stepper, asked: int, number: signal.Signals
) -> None:
    """SIGTERM while the successor hangs: the predecessor answers requests, and ends in time."""
    patches = {"qmpfd.server.takeover.sender.SCM_MAX_FD": 2}
    with pipes(5) as made:
        with (
            daemon(stepper, path, "--drain-timeout", "0.6", patches=patches) as old,
            BlockingClient(path, PATIENCE) as client,
        ):
            fill(client, made)
            with FakeSuccessor(path) as successor:
                for _ in range(asked):
                    assert successor.more() == b"f"
                with client.detach() as sock:
                    sock.setblocking(True)
                    sock.sendall(b'{"execute": "query-name", "id": "asked while frozen"}')
                    began = monotonic()
                    old.signal(number)
                    assert old.wait() == 0
                    assert monotonic() - began < 3
                    assert b'"id": "asked while frozen"' in sock.recv(1000)
                    assert sock.recv(1000) == b""
                assert successor.sock.recv(10) == b"x"
        assert not path.exists()
        assert not any(pipe.held() for pipe in made)


@pytest.mark.parametrize("told_twice", [False, True])
def test_sigterm_to_the_predecessor_does_not_stop_the_successor(
    path: Path, stepper: Stepper, told_twice: bool
) -> None:
    """SIGTERM to the predecessor does not stop the takeover; a second SIGTERM does."""
    with pipes(3) as made:
        with daemon(stepper, path) as old, BlockingClient(path, PATIENCE) as client:
            fill(client, made)
            command = ["serve", "--socket", str(path), "--takeover"]
            successor = stepper.start(
                command,
                path.with_suffix(".new.log"),
                where={"restore.py": ["_restore_sessions"]},
                step=3,
                number=signal.SIGSTOP,
            )
            successor.until("STEP")
            old.signal(signal.SIGTERM)
            old.until("stopping after the received requests")
            if told_twice:
                old.signal(signal.SIGTERM)
                assert old.wait() == 0
            successor.signal(signal.SIGCONT)
            successor.until("listening")
            if told_twice:
                assert successor.wait() == 3
                assert "cancelled the takeover" in successor.said
            else:
                assert old.wait() == 0
                assert path.exists()
                assert len(client.execute("query-fdsets")) == 3
                successor.end()
        assert not path.exists()
        assert not any(pipe.held() for pipe in made)


@pytest.mark.parametrize("step", [1, 10, 20, 40, 80, 90, 95])
@pytest.mark.parametrize("number", [*END, signal.SIGHUP])
def test_sigterm_to_the_successor(
    path: Path, stepper: Stepper, step: int, number: signal.Signals
) -> None:
    """A signal before the successor serves ends it, as SIGKILL would."""
    with daemon(stepper, path) as old, BlockingClient(path, PATIENCE) as client, pipes(3) as made:
        fill(client, made)
        with daemon(
            stepper,
            path,
            "--takeover",
            where={
                "takeover/receiver.py": ["prepare", "reserve", "receive_rest", "_receive_fds"],
                "restore.py": ["_restore_sessions", "_fill_store"],
            },
            step=step,
            number=number,
        ) as successor:
            assert successor.wait() != 0
            assert successor.place
        assert old.poll() is None
        assert len(client.execute("query-fdsets")) == 3


def test_hangups_during_a_takeover(path: Path, stepper: Stepper) -> None:
    """SIGHUP during and after a takeover reloads the policy."""
    with daemon(stepper, path) as old, BlockingClient(path, PATIENCE) as client, pipes(3) as made:
        fill(client, made)
        with FakeSuccessor(path) as successor:
            old.signal(signal.SIGHUP)
            assert successor.more() == b"f"
            old.signal(signal.SIGHUP)
        assert len(client.execute("query-fdsets")) == 3
        with daemon(stepper, path, "--takeover") as real:
            assert old.wait() == 0
            real.signal(signal.SIGHUP)
            real.until("SIGHUP")
            assert len(client.execute("query-fdsets")) == 3


# -- drain -------------------------------------------------------------------------------------


def test_a_client_that_never_reads_its_last_reply(path: Path, stepper: Stepper) -> None:
    with (
        daemon(stepper, path, "--drain-timeout", "0.5") as old,
        BlockingClient(path, PATIENCE) as client,
    ):
        client.execute("add-fds", {"opaque": "x" * 1000}, [0] * 250)
        with client.detach() as sock:
            sock.setblocking(True)
            sock.sendall(b'{"execute": "query-fdsets"}' * 4)
            assert sock.recv(1) == b"{"
            began = monotonic()
            old.signal(signal.SIGTERM)
            assert old.wait() == 0
            assert monotonic() - began < 3
    assert not path.exists()


def test_a_client_that_floods(path: Path, stepper: Stepper) -> None:
    """A client that sends requests without end, and reads all replies, does not delay the end."""
    with daemon(stepper, path, "--drain-timeout", "0.5") as old:
        with BlockingClient(path, PATIENCE) as client:
            sock = client.detach()
        sock.setblocking(True)

        def ask() -> None:
            try:
                while True:
                    sock.sendall(b'{"execute": "query-version"}' * 1000)
            except OSError:
                pass

        def read() -> None:
            try:
                while sock.recv(1 << 20):
                    pass
            except OSError:
                pass

        with sock:
            threads = [threading.Thread(target=ask), threading.Thread(target=read)]
            for thread in threads:
                thread.start()
            began = monotonic()
            old.signal(signal.SIGTERM)
            assert old.wait() == 0
            assert monotonic() - began < 3
            for thread in threads:
                thread.join(PATIENCE)
    assert not path.exists()


# -- giving up ---------------------------------------------------------------------------------


def old_to_the_end(listener: socket.socket, path: Path, pipe: Pipe) -> bytes:
    """Run a fake predecessor that has stored *pipe*, and that aborts after the successor's last
    message; return that message when the successor has disconnected.
    """
    at = path.stat()
    file = SavedListener(os.fsencode(path), (at.st_dev, at.st_ino))
    stored = SavedFd("", 0, 30, None, None, 0.0, None, watch_hangup=False)
    state = SavedState(0.0, [stored], [file])
    rest = SavedRest(0.0, [], [], [], [], [], 1, Stats(0.0), journal=False)
    sock, _ = listener.accept()
    with sock, sock.makefile("rb") as heard, ExitStack() as stack:
        sock.sendall(b'{"QMP": {"version": {}, "capabilities": []}}\r\n')
        heard.readline()
        sock.sendall(b'{"return": {}, "id": 1}\r\n')
        heard.readline()
        with (
            Fd(os.memfd_create("state")) as first,
            Fd(os.memfd_create("rest")) as second,
        ):
            lifeline, theirs = map(stack.enter_context, socket.socketpair())
            os.write(first.fileno(), encode(state))
            os.write(second.fileno(), msgspec.msgpack.encode(rest))
            send_now(sock, b'{"return": {}, "id": 2}\r\n', [first, theirs])
            theirs.close()
            assert heard.read(1) == NEXT
            send_now(sock, MORE, [second])
            assert heard.read(1) == NEXT
            send_now(sock, MORE, [pipe, listener])
        pipe.release()
        last = heard.read(1)
        sock.sendall(REFUSED)
        assert lifeline.recv(1) == b""
        assert not pipe.held()
        assert heard.read() == b""
        return last


@pytest.mark.parametrize("options", [(), ("--supervise",)], ids=["alone", "supervised"])
def test_a_successor_that_is_refused_at_last(path: Path, options: tuple[str, ...]) -> None:
    """When the successor has disconnected, neither it nor its parent has a duplicate."""
    with socket.socket(socket.AF_UNIX) as listener, Pipe() as pipe:
        listener.bind(str(path))
        listener.listen()
        command = [sys.executable, "-m", "qmpfd", "serve", "--takeover", "--socket", str(path)]
        successor = subprocess.Popen([*command, *options], stderr=subprocess.PIPE)
        try:
            assert old_to_the_end(listener, path, pipe) == CONFIRM
            _, output = successor.communicate(timeout=PATIENCE)
            assert successor.returncode == 3
            assert b"cancelled the takeover" in output
            assert path.exists()
        finally:
            successor.kill()
            successor.communicate()


# -- versions ----------------------------------------------------------------------------------

STATE = SavedState(at=0.0, fds=[], listeners=[])


def with_members(**members: object) -> dict[str, object]:
    return {**msgspec.to_builtins(STATE), **members}


UNREADABLE = {
    "newer format": (TAKEOVER_FORMAT + 1, with_members()),
    "no format": (0, with_members()),
    "unknown member": (TAKEOVER_FORMAT, with_members(colour="red")),
    "wrong type": (TAKEOVER_FORMAT, with_members(listeners="one")),
    "no pair": with_members(),
}


@pytest.mark.parametrize("state", UNREADABLE.values(), ids=UNREADABLE)
def test_a_state_that_is_not_understood(path: Path, stepper: Stepper, state: object) -> None:
    """The successor fails with one line, and closes the connection."""
    heard: list[bytes] = []
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def play_old() -> None:
            sock, _ = listener.accept()
            with sock, sock.makefile("rb") as lines:
                sock.sendall(b'{"QMP": {"version": {}, "capabilities": []}}\r\n')
                lines.readline()
                sock.sendall(b'{"return": {}, "id": 1}\r\n')
                lines.readline()
                with Fd(os.memfd_create("state")) as memory:
                    os.write(memory.fileno(), msgspec.msgpack.encode(state))
                    rights = struct.pack("ii", *[memory.fileno()] * 2)
                    reply = b'{"return": {}, "id": 2}\r\n'
                    sock.sendmsg([reply], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
                heard.append(lines.read())

        thread = threading.Thread(target=play_old)
        thread.start()
        with daemon(stepper, path, "--takeover") as successor:
            assert successor.wait() == 3
        thread.join(PATIENCE)
    assert heard == [b""]
    assert successor.said.count("\n") == 1
    assert "cannot be taken over" in successor.said


def test_what_is_encoded_can_be_decoded() -> None:
    assert decode(encode(STATE)) == STATE


def test_broken_bytes() -> None:
    """Decoding broken bytes gives a state or raises ValueError."""
    saved = SavedFd("", 0, 7, "\N{SNOWMAN}", (1, 2, 3), 0.5, 3.0, watch_hangup=True, owner=2)
    whole = encode(SavedState(1.5, [saved] * 2, [SavedListener(b"/run/q\xff", (1, 2))], "a", "b"))
    rng = random.Random(1)
    refused = Counter[str]()
    for _ in range(5000):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(data))
            data[at : at + rng.randrange(3)] = rng.choice(
                [rng.randbytes(1), b"\x91" * 3000, b"\xdd\xff\xff\xff\xff", b"\xc1", b""]
            )
        try:
            decode(bytes(data))
        except ValueError as exc:
            refused[str(exc).partition(":")[0]] += 1
    assert refused.keys() <= {"its state cannot be read"} | {
        kind for kind in refused if re.match(r"its state has format \d+, this version", kind)
    }
    assert refused["its state cannot be read"] > 1000


NEWER = dict.fromkeys(
    (
        "qmpfd.server.saved_state.TAKEOVER_FORMAT",
        "qmpfd.server.takeover.receiver.TAKEOVER_FORMAT",
        "qmpfd.commands.control.TAKEOVER_FORMAT",
    ),
    TAKEOVER_FORMAT + 1,
)


def test_a_newer_daemon_takes_over_from_an_older_one(path: Path, stepper: Stepper) -> None:
    """An older daemon that takes over from a newer one is refused at once, before the pause."""
    with daemon(stepper, path) as old, BlockingClient(path, PATIENCE) as client, pipes(1) as made:
        fill(client, made)
        with daemon(stepper, path, "--takeover", patches=NEWER) as newer:
            assert old.wait() == 0
            assert len(client.execute("query-fdsets")) == 1
            with daemon(stepper, path, "--takeover") as older:
                assert older.wait() == 1
            assert "'format'" in older.said
            assert older.said.count("\n") == 1
            assert newer.poll() is None
            assert "begins a takeover" not in newer.said
            assert len(client.execute("query-fdsets")) == 1


# -- other refusals ----------------------------------------------------------------------------


def test_too_few_descriptors(path: Path, stepper: Stepper) -> None:
    with daemon(stepper, path) as old, BlockingClient(path, PATIENCE) as client:
        client.execute("add-fds", fds=[0] * 250)
        before = client.execute("query-fdsets")
        for most in (100, 200, 265, 300):
            with daemon(stepper, path, "--takeover", most_files=most) as successor:
                assert successor.wait() == 3
            assert successor.said.count("\n") == 1
            assert f"{most} open files" in successor.said
        assert client.execute("query-fdsets") == before
        assert old.poll() is None


def test_another_socket_that_cannot_be_bound(path: Path, stepper: Stepper) -> None:
    """A second socket that is in use: the takeover fails, and the socket file stays."""
    with daemon(stepper, path) as old, BlockingClient(path, PATIENCE) as client:
        with daemon(stepper, path, "--socket", "/nonexistent/q.sock", "--takeover") as successor:
            assert successor.wait() == 2
        assert path.exists()
        assert client.execute("query-name") == {}
        with daemon(stepper, path, "--socket", f"{path}.second", "--takeover"):
            assert old.wait() == 0
            with BlockingClient(f"{path}.second", PATIENCE) as other:
                assert other.execute("query-name") == client.execute("query-name") == {}
    assert not list(path.parent.glob("*.sock*"))


def test_a_second_takeover_at_the_same_time_is_refused(path: Path, stepper: Stepper) -> None:
    """Of two simultaneous takeovers, one is refused at once."""
    patches = {"qmpfd.server.takeover.sender.TAKEOVER_TIMEOUT": 0.3}
    with (
        daemon(stepper, path, patches=patches) as old,
        BlockingClient(path, PATIENCE) as client,
    ):
        socks = []
        for _ in range(2):
            with BlockingClient(path, PATIENCE) as successor:
                socks.append(successor.detach())
        request = b'{"execute": "takeover", "arguments": {"format": %d}}' % TAKEOVER_FORMAT
        old.signal(signal.SIGSTOP)
        for sock in socks:
            sock.sendall(request)
        old.signal(signal.SIGCONT)
        output = []
        for sock in socks:
            with sock:
                sock.setblocking(True)
                sock.settimeout(PATIENCE)
                data, fds, _ = receive(sock, 1000)
                close_all(fds)
                output.append(data)
        # The second may have been read only after the first had disconnected.
        assert b'"return"' in output[0] + output[1]
        assert all(b'"return"' in data or b"is being taken over" in data for data in output)
        assert client.execute("query-name") == {}
