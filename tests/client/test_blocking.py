"""``qmpfd.connect_blocking``: client for programs without an event loop."""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest
from fakes import GREETING
from helpers import PATIENCE, ROOT, Pipe, daemon_thread
from supervised import until

import qmpfd
from qmpfd.limits import MAX_EVENTS


@pytest.fixture
def client(path: Path) -> Iterator[qmpfd.BlockingClient]:
    with daemon_thread(path), qmpfd.connect_blocking(path) as made:
        yield made


def test_it_has_what_the_trio_client_has() -> None:
    """BlockingClient has the methods of Client, with the same arguments in the same order."""
    for name, method in inspect.getmembers(qmpfd.Client, inspect.isfunction):
        if not name.startswith("_"):
            ours = inspect.signature(getattr(qmpfd.BlockingClient, name))
            theirs = inspect.signature(method)
            assert list(ours.parameters) == list(theirs.parameters), name


def test_commands_and_their_values(client: qmpfd.BlockingClient) -> None:
    with Pipe() as pipe:
        info = client.add_fd(pipe, opaque="p")
        assert isinstance(info, qmpfd.AddfdInfo)
        [fdset] = client.query_fdsets()
        assert (fdset.fdset_id, fdset.fds[0].opaque) == (info.fdset_id, "p")
        with client.open_fdset(info.fdset_id, access="wronly") as fd:
            assert os.fstat(fd.fileno()).st_ino == os.fstat(pipe.fileno()).st_ino
        [described] = client.query_fds()
        assert described.kind == "pipe"
        added = client.add_fds([pipe, pipe], opaque="two", expires=60)
        assert len(added.fds) == 2
        client.remove_fd(info.fdset_id, info.fd)
        assert client.execute("query-version")["package"].startswith("qmpfd ")
        assert client.greeting["version"]


def test_events(client: qmpfd.BlockingClient) -> None:
    with client.watch_fdsets() as events, Pipe() as pipe:
        info = client.add_fd(pipe)
        event = next(events)
        assert (event.name, event.data) == ("FD_ADDED", {"fdset-id": 0, "fd": info.fd})


@contextmanager
def _scripted(
    path: Path, output: bytes, fds: Sequence[int] = (), *, stays: bool = True
) -> Iterator[None]:
    """Run a server that sends *said* after the negotiation, and nothing else.

    Args:
        path: its socket.
        said: what it sends.
        fds: descriptors to send with that.
        stays: whether it then waits until the client disconnects.
    """
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.fspath(path))
        listener.listen()

        def serve() -> None:
            sock, _ = listener.accept()
            with sock, sock.makefile("rb") as lines:
                sock.sendall(GREETING)
                request = json.loads(lines.readline())
                sock.sendall(b'{"return": {}, "id": %d}\r\n' % request["id"])
                with suppress(ConnectionError):  # the client may disconnect first
                    sock.sendall(output[socket.send_fds(sock, [output], fds) :])
                    if stays:
                        lines.read()

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield
        finally:
            thread.join()


def test_the_newest_events_are_kept(path: Path) -> None:
    """A client that takes no events stores a limited number, the newest."""
    output = [b'{"event": "X", "data": {"n": %d}}\r\n' % n for n in range(MAX_EVENTS + 5)]
    last = b'{"return": {}, "id": 2}\r\n'
    with (
        _scripted(path, b"".join(output) + last),
        qmpfd.connect_blocking(path) as client,
    ):
        client.execute("query-name")
        events = client.events()
        found = [next(events).data["n"] for _ in range(MAX_EVENTS)]
        assert found == list(range(5, MAX_EVENTS + 5))


@pytest.mark.parametrize(
    "last, error",
    [
        (b"", qmpfd.NoDaemon),
        (b"no QMP\r\n", qmpfd.NoDaemon),
        (b'{"error": {"class": "GenericError", "desc": "go"}}\r\n', qmpfd.GenericError),
    ],
    ids=["closed", "not QMP", "rejected"],
)
def test_the_last_events_of_a_connection(path: Path, last: bytes, error: type[Exception]) -> None:
    """The events from before the end of the connection are returned; then each call raises."""
    output = b'{"event": "X"}\r\n' + last
    with _scripted(path, output, stays=bool(last)), qmpfd.connect_blocking(path) as client:
        assert [event.name for event in until(client.take_events)] == ["X"]
        for call in (partial(until, client.take_events), client.take_events, client.query_fdsets):
            with pytest.raises(error):
                call()


def test_a_rejection_during_a_wait_for_events(path: Path) -> None:
    output = b'{"error": {"class": "GenericError", "desc": "go"}}\r\n'
    with (
        _scripted(path, output),
        qmpfd.connect_blocking(path) as client,
        pytest.raises(qmpfd.GenericError, match="go"),
    ):
        next(client.events())


def test_unexpected_replies_are_dropped(path: Path) -> None:
    """A wait for events drops unexpected replies, and closes their descriptors."""
    output = b'{"return": {}, "id": 1}\r\n{"event": "X"}\r\n'
    with (
        Pipe() as pipe,
        _scripted(path, output, [pipe.fileno()]),
        qmpfd.connect_blocking(path) as client,
    ):
        assert next(client.events()).name == "X"
        pipe.release()
        assert not pipe.held()


def test_errors_are_the_trio_clients(client: qmpfd.BlockingClient, path: Path) -> None:
    with pytest.raises(qmpfd.FdNotFound):
        client.open_fdset(7)
    with pytest.raises(qmpfd.CommandNotFound):
        client.execute("nonsense")
    with pytest.raises(OSError, match="Bad file descriptor"):
        client.add_fd(987_654)
    with pytest.raises(TypeError):
        client.query_fds(name="a", opaque="a")
    client.close()
    with pytest.raises(qmpfd.ClientClosed):
        client.query_fdsets()
    with pytest.raises(FileNotFoundError) as caught:
        qmpfd.connect_blocking(path.with_name("none"))
    assert isinstance(caught.value, qmpfd.NoDaemon)


@pytest.mark.parametrize("text", ["\udc80", "a" * (2 << 20), "\uffff"])
def test_what_json_cannot_carry(client: qmpfd.BlockingClient, text: str) -> None:
    with pytest.raises(ValueError, match="cannot be sent"), Pipe() as pipe:
        client.add_fd(pipe, opaque=text)
    with pytest.raises(ValueError, match="cannot be sent"):
        client.execute("query-fds", {"fdset-id": float("nan")})
    assert client.query_fdsets() == []


def test_many_threads(client: qmpfd.BlockingClient) -> None:
    """Calls from several threads, as with asyncio.to_thread, run in turn; each gets its reply."""
    numbers: list[int] = []

    def work() -> None:
        with Pipe() as pipe:
            numbers.extend(client.add_fd(pipe, opaque="x").fd for _ in range(20))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert len(set(numbers)) == 160


def test_a_call_while_another_thread_waits_for_events(path: Path) -> None:
    """The call ends after its time, as when the server does not reply."""

    def watch() -> None:
        with suppress(qmpfd.ClientClosed):
            _watch(shared)

    with daemon_thread(path), qmpfd.connect_blocking(path, timeout=0.5) as shared:
        waiting = threading.Thread(target=watch)
        waiting.start()
        with pytest.raises(TimeoutError, match="another thread"):
            until(shared.query_fdsets)
        shared.close()
        waiting.join()


def _watch(client: qmpfd.BlockingClient) -> None:
    with client.watch_fdsets() as events:
        next(events)


_CALLS: dict[str, Callable[[qmpfd.BlockingClient], object]] = {
    "reply": lambda client: client.query_fdsets(),
    "send": lambda client: client.execute("query-fds", {"opaque": "x" * 900_000}),
    "events": lambda client: next(client.events()),
    "watch": _watch,
}


@pytest.mark.parametrize("by", ["thread", "signal"])
@pytest.mark.parametrize("call", _CALLS)
def test_closed_while_a_call_waits(path: Path, call: str, by: str) -> None:
    """close() in another thread, or in the handler of a signal that interrupts the call."""
    main = threading.get_ident()

    def close() -> None:
        while waiting._calling.acquire(blocking=False):  # until the call has begun
            waiting._calling.release()
        if by == "thread":
            waiting.close()
        else:
            signal.pthread_kill(main, signal.SIGUSR1)

    former = signal.signal(signal.SIGUSR1, lambda *_: waiting.close())
    with _scripted(path, b""), qmpfd.connect_blocking(path, timeout=None) as waiting:
        closing = threading.Thread(target=close)
        closing.start()
        with pytest.raises(qmpfd.ClientClosed):
            _CALLS[call](waiting)
        closing.join()
        with pytest.raises(qmpfd.ClientClosed):
            waiting.take_events()
    signal.signal(signal.SIGUSR1, former)


def test_a_request_that_cannot_be_sent_in_time(path: Path) -> None:
    """A request that cannot be sent in time fails and closes the connection."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.fspath(path))
        listener.listen()

        def negotiate() -> None:
            sock = stack.enter_context(listener.accept()[0])
            sock.sendall(GREETING)
            sock.recv(4096)
            sock.sendall(b'{"return": {}, "id": 1}\r\n')

        with ExitStack() as stack:
            thread = threading.Thread(target=negotiate)
            thread.start()
            with qmpfd.connect_blocking(path, timeout=0.5) as client:
                thread.join()
                with pytest.raises(TimeoutError, match="does not answer"):
                    client.execute("query-fds", {"opaque": "x" * 1_000_000})
                with pytest.raises(qmpfd.ClientClosed):
                    client.query_fdsets()


def test_a_forked_child_closes_its_copy(path: Path) -> None:
    """After a fork(2), in a process with one thread, the child can close its copy."""
    script = (
        "import os, sys, qmpfd\n"
        "with qmpfd.connect_blocking(sys.argv[1]) as client:\n"
        "    if not os.fork():\n"
        "        client.close()\n"
        "        os._exit(0)\n"
        "    os.wait()\n"
        "    assert client.query_fdsets() == []\n"
    )
    command = [sys.executable, "-c", script, os.fspath(path)]
    with daemon_thread(path):
        subprocess.run(command, cwd=ROOT, check=True, timeout=PATIENCE)


@pytest.mark.parametrize("timeout", [1e7, 1e300])
def test_a_long_timeout(path: Path, timeout: float) -> None:
    """A timeout longer than the maximum of poll(2)."""
    with daemon_thread(path), qmpfd.connect_blocking(path, timeout=timeout) as client:
        assert client.query_fdsets() == []


def test_from_asyncio(path: Path) -> None:
    async def main() -> int:
        client = await asyncio.to_thread(qmpfd.connect_blocking, path)
        with client, Pipe() as pipe:
            return (await asyncio.to_thread(client.add_fd, pipe)).fdset_id

    with daemon_thread(path):
        assert asyncio.run(main()) == 0


def test_a_silent_server(path: Path) -> None:
    """A server that sends no greeting, or no reply: the call fails, and the next one too."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.fspath(path))
        listener.listen()
        with pytest.raises(TimeoutError) as caught:
            qmpfd.connect_blocking(path, timeout=0.05)
        assert isinstance(caught.value, qmpfd.NoDaemon)


@pytest.mark.parametrize("name", ["long" * 40, "@abstract"])
def test_any_address(tmp_path: Path, name: str) -> None:
    """Paths longer than sun_path, and abstract addresses (unix(7))."""
    if name.startswith("@"):
        address: str | Path = f"{name}-{os.getpid()}"
    else:
        (tmp_path / name).mkdir()
        address = tmp_path / name / "q.sock"
    with daemon_thread(Path(address)), qmpfd.connect_blocking(address) as client:
        assert client.query_fdsets() == []


def test_a_client_that_was_given_up_is_closed(client: qmpfd.BlockingClient) -> None:
    with client.detach() as sock:
        for call in (client.query_fdsets, client.detach, client.take_events):
            with pytest.raises(qmpfd.ClientClosed):
                call()
        client.close()
        assert sock.fileno() >= 0
