"""Takeovers while clients have unread listings, events and pipelined requests.

Unread replies are not encoded for the takeover: neither daemon needs memory for them, no client
waits for them, and the successor sends them completely.

Tests of protocol/saved.py, server/connection/snapshot.py, server/takeover/sender.py and
server/takeover/receiver.py.
"""

from __future__ import annotations

import json
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any

import msgspec
import pytest
import trio
from helpers import Pipe, Wire, daemon, request, settle
from stepper import Stepped, Stepper

from qmpfd.client.blocking import BlockingClient
from qmpfd.kernel.fd import close_all, receive
from qmpfd.kernel.files import contents
from qmpfd.limits import TAKEOVER_FORMAT
from qmpfd.server.connection.snapshot import SavedRest

PATIENCE = 60.0


@pytest.fixture(scope="module")
def stepper() -> Iterator[Stepper]:
    with Stepper() as stepper:
        yield stepper


@pytest.fixture
def daemons(path: Path, stepper: Stepper) -> Iterator[Callable[..., Stepped]]:
    """Return a function that starts a daemon; each but the first takes over from the last."""
    started: list[Stepped] = []

    def start(*options: str) -> Stepped:
        log = path.with_suffix(f".{len(started)}.log")
        takeover = ["--takeover"] if started else []
        made = stepper.start(["serve", "--socket", str(path), *takeover, *options], log)
        started.append(made)
        made.until("listening")
        assert made.poll() is None, made.said
        if len(started) > 1:
            assert started[-2].wait() == 0
        return made

    yield start
    for made in started:
        made.end()
        assert "Traceback" not in made.said, made.said


class Reader:
    """A client that sends requests, and reads replies only when told."""

    def __init__(self, path: Path, *requests: bytes) -> None:
        with BlockingClient(path, PATIENCE) as client:
            self.sock = client.detach()
        self.sock.setblocking(True)
        self.sock.settimeout(PATIENCE)
        self.sock.sendall(b"".join(requests))
        self._lines = self.sock.makefile("rb")

    def begin(self) -> None:
        """Wait until the first data has come."""
        assert self.sock.recv(1, socket.MSG_PEEK) == b"{"

    def raw(self) -> bytes:
        """Return the next reply or event as bytes."""
        line = self._lines.readline()
        assert line.endswith(b"\r\n"), line[-100:]
        return line

    def line(self) -> Any:
        """Return the next reply or event as a value."""
        return json.loads(self.raw())

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._lines.close()
        self.sock.close()


def end(daemon: Stepped) -> int:
    """End a daemon; return its peak memory in MiB."""
    daemon.end()
    return daemon.peak


LISTING = request("query-fds", id="listing")
FDSETS = request("query-fdsets", id="listing")


@pytest.mark.parametrize("asked", [LISTING, FDSETS])
def test_long_listings(path: Path, daemons: Callable[..., Stepped], asked: bytes) -> None:
    """Thirty unread listings of ten megabytes each."""
    patient = partial(daemons, "--write-timeout", "600")  # a busy machine takes long for this
    first = patient()
    with BlockingClient(path, PATIENCE) as client, ExitStack() as stack:
        for number in range(40):
            client.execute("add-fds", {"opaque": f"{number}" * 1000}, [0] * 250)
        expected = json.loads(
            json.dumps(client.execute("query-fds" if asked is LISTING else "query-fdsets"))
        )
        readers = [stack.enter_context(Reader(path, asked)) for _ in range(30)]
        for reader in readers:
            reader.begin()
        second = patient()
        third = patient()
        for reader in readers:
            reply = reader.line()
            assert reply["id"] == "listing"
            found = reply["return"]
            assert len(found) == len(expected)
            for entry, known in zip(found, expected, strict=True):
                entry.pop("age", None)
                known.pop("age", None)
                assert entry == known
        assert client.execute("query-name", {}) == {}
    assert max(first.peak, second.peak, end(third)) < 150


def test_a_text_in_many_unread_replies_goes_over_once(
    path: Path, daemons: Callable[..., Stepped]
) -> None:
    """A long text in many unread replies goes over once."""
    first = daemons()
    text = "\N{SNOWMAN}" * 300_000
    with BlockingClient(path, PATIENCE) as client, ExitStack() as stack:
        for _ in range(3):
            client.execute("add-fd", {"opaque": text}, [0])
        readers = [stack.enter_context(Reader(path, FDSETS)) for _ in range(40)]
        for reader in readers:
            reader.begin()
        second = daemons()
        for reader in readers:
            assert [fd["opaque"] for s in reader.line()["return"] for fd in s["fds"]] == [text] * 3
    assert max(first.peak, end(second)) < 150


def test_an_unread_reply_to_a_long_removal(path: Path, daemons: Callable[..., Stepped]) -> None:
    """A long unread reply to remove-fd, which is no listing."""
    daemons()
    with BlockingClient(path, PATIENCE) as client:
        for number in range(20):
            client.execute("add-fds", {"opaque": f"{number}" * 500}, [0] * 250)
        expected = client.execute("query-fdsets")
        with Reader(path, request("remove-fds", {"opaque-prefix": ""}, id="all")) as reader:
            reader.begin()
            daemons()
            reply = reader.line()
            assert (reply["id"], reply["return"]) == ("all", expected)
        assert client.execute("query-fdsets") == []


def test_requests_pipelined_behind_a_listing(path: Path, daemons: Callable[..., Stepped]) -> None:
    """Pipelined requests with descriptors, invalid ones, and an incomplete one."""
    daemons()
    deep = b'{"execute": "query-name", "id": ' + b"[" * 1000 + b"]" * 1000 + b"}"
    with BlockingClient(path, PATIENCE) as client, Pipe() as pipe:
        for number in range(20):
            client.execute("add-fds", {"opaque": f"{number}" * 500}, [0] * 250)
        first = [
            FDSETS,
            request("query-name", id={"a": ["\N{SNOWMAN}", 1.5, None, 1 << 70]}),
            b'{"execute": 5}',
            b'{"execute" "x"}',
            request("add-fd", {"opaque": "\x7f"}, id=1),
        ]
        with Reader(path, *first) as reader:
            reader.begin()
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, pipe.fileno().to_bytes(4, "little"))]
            with_fd = request("add-fd", {"opaque": "piped"}, id=2) + FDSETS
            reader.sock.sendmsg([with_fd], rights)
            reader.sock.sendall(deep + FDSETS + b'{"execute": "quer')
            pipe.release()
            daemons()
            daemons()
            reader.sock.sendall(b'y-name", "id": "last"}')
            assert len(reader.line()["return"]) == 20
            assert reader.line()["id"]["a"][:3] == ["\N{SNOWMAN}", 1.5, None]
            assert "execute" in reader.line()["error"]["desc"]
            while "id" not in (reply := reader.line()):
                assert "error" in reply
            assert (reply["id"], reply["error"]["class"]) == (1, "FdNotSupplied")
            reply = reader.line()
            assert reply["id"] == 2
            assert pipe.held()
            assert reader.line()["return"][0]["fds"][0]["opaque"] == "piped"
            assert reader.raw() == b'{"return": {}, "id": ' + b"[" * 1000 + b"]" * 1000 + b"}\r\n"
            assert len(reader.line()["return"]) == 21
            assert reader.line() == {"return": {}, "id": "last"}
            client.execute("remove-fd", {"fdset-id": reply["return"]["fdset-id"]})
            assert not pipe.held()


def test_many_clients_with_unread_listings(path: Path, daemons: Callable[..., Stepped]) -> None:
    """200 clients with 20 unread listings each do not prevent a takeover or delay others."""
    first = daemons()
    with BlockingClient(path, PATIENCE) as client, ExitStack() as stack:
        for number in range(20):
            client.execute("add-fds", {"opaque": f"{number}" * 500}, [0] * 250)
        readers = [stack.enter_context(Reader(path, *[LISTING] * 20)) for _ in range(200)]
        for reader in readers:
            reader.begin()
        began = monotonic()
        second = daemons()
        assert monotonic() - began < 10
        # The limit on unsent replies disconnects most of them; other clients are answered.
        assert client.execute("query-name") == {}
        assert len(client.execute("query-fdsets")) == 20
    assert max(first.peak, end(second)) < 200


def test_silent_watchers(path: Path, daemons: Callable[..., Stepped]) -> None:
    """300 watchers that do not read share one copy of the events; each gets all of them."""
    first = daemons()
    watch = request("watch-fdsets", {"enable": True})
    with BlockingClient(path, PATIENCE) as client, ExitStack() as stack:
        readers = [stack.enter_context(Reader(path, watch)) for _ in range(300)]
        for reader in readers:
            assert reader.line() == {"return": {}}
        for number in range(8):
            client.execute("add-fds", {"opaque": f"{number}" * 300}, [0] * 250)
        second = daemons()
        client.execute("add-fd", {"opaque": "new"}, [0])
        third = daemons()
        for reader in readers[::10]:
            seen = [reader.line()["data"]["opaque"] for _ in range(2001)]
            assert seen == [f"{number}" * 300 for number in range(8) for _ in range(250)] + ["new"]
    assert max(first.peak, second.peak, end(third)) < 150


def test_a_successor_that_takes_its_time(path: Path, stepper: Stepper) -> None:
    """A listing has the descriptors stored before its request, with their ages at that time, also
    if the successor sends it later.
    """
    old = stepper.start(["serve", "--socket", str(path)], path.with_suffix(".old.log"))
    old.until("listening")
    successor = None
    try:
        with BlockingClient(path, PATIENCE) as client:
            began = monotonic()
            for number in range(20):
                client.execute("add-fds", {"opaque": f"{number}" * 500}, [0] * 250)
            successor = stepper.start(
                ["serve", "--socket", str(path), "--takeover"],
                path.with_suffix(".new.log"),
                where={"takeover/receiver.py": ["reserve"]},
                step=1,
                number=signal.SIGSTOP,
            )
            successor.until("STEP")
            with Reader(path, LISTING) as reader:
                reader.begin()
                asked = monotonic()
                while monotonic() - asked < 2 * (asked - began):
                    client.execute("query-name")
                successor.signal(signal.SIGCONT)
                successor.until("took over")
                assert len(reader.line()["return"]) == 5000
    finally:
        for daemon in (old, successor):
            if daemon is not None:
                daemon.end()
                assert "Traceback" not in daemon.said


def test_a_successor_that_gives_up(path: Path, daemons: Callable[..., Stepped]) -> None:
    """After a failed takeover, the predecessor continues listings and events."""
    old = daemons()
    watch = request("watch-fdsets", {"enable": True})
    with BlockingClient(path, PATIENCE) as client:
        for number in range(20):
            client.execute("add-fds", {"opaque": f"{number}" * 500}, [0] * 250)
        with Reader(path, *[LISTING] * 3) as reader, Reader(path, watch) as watcher:
            reader.begin()
            watcher.line()
            client.execute("add-fds", {"opaque": "x" * 3000}, [0] * 150)
            with BlockingClient(path, PATIENCE) as successor:
                _, passed = successor.request("takeover", {"format": TAKEOVER_FORMAT})
                with successor.detach() as sock:
                    sock.setblocking(True)
                    sock.settimeout(PATIENCE)
                    sock.sendall(b"n")
                    _, fds, _ = receive(sock, 1)
                    close_all([*passed, *fds])
            counts = [len(reader.line()["return"]) for _ in range(3)]
            assert counts[0] >= 5000
            assert counts[1:] == [5150, 5150]
            assert [watcher.line()["event"] for _ in range(150)] == ["FD_ADDED"] * 150
        assert old.poll() is None


def unread(sock: socket.socket) -> bytes:
    """Return all bytes that the socket holds."""
    came = b""
    try:
        while data := sock.recv(1 << 20):
            came += data
    except BlockingIOError:
        pass
    return came


async def paused_while_read(path: Path, watcher: Wire) -> bytes:
    """Pause the daemon of this event loop in the same pass in which the watcher reads all its
    events, then resume it; return what a successor would send to the watcher.
    """
    successor = await Wire.session(path)
    successor.send(request("takeover", {"format": TAKEOVER_FORMAT}))
    await trio.lowlevel.wait_readable(successor.sock)
    _, passed, _ = receive(successor.sock, 1 << 16)
    await settle()
    unread(watcher.sock)
    successor.send(b"n")
    await trio.lowlevel.wait_readable(successor.sock)
    _, fds, _ = receive(successor.sock, 1)
    rest = msgspec.msgpack.decode(contents(fds[0]), type=SavedRest)
    unread(watcher.sock)
    close_all([*passed, *fds])
    successor.close()
    (session,) = (session for session in rest.sessions if session.watch is not None)
    return b"".join(data for data, _ in session.unsent)


async def test_a_watcher_that_reads_as_the_daemon_pauses(path: Path) -> None:
    """Events sent in the pass of the event loop before the pause are not sent again."""
    async with daemon(path):
        watcher, client = await Wire.session(path), await Wire.session(path)
        await watcher.call("watch-fdsets", {"enable": True})
        for _ in range(10):  # Trio runs the tasks of a pass in random order
            client.send(request("add-fds", {"opaque": "x" * 2000}), [0] * 250)
            assert "return" in await client.reply()
            await settle()
            described = await paused_while_read(path, watcher)
            await settle()
            assert unread(watcher.sock).startswith(described)
        watcher.close()
        client.close()
