"""Start and end of a daemon: socket files, signals, ``quit``, and no reply is lost."""

from __future__ import annotations

import errno
import os
import signal
import socket
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from helpers import (
    ADD,
    QUERY,
    Pipe,
    Wire,
    daemon,
    daemon_process,
    open_fds,
    pipes,
    request,
    settle,
    value,
)
from trio.testing import MockClock

import qmpfd
import qmpfd.kernel.fd
from qmpfd.kernel.binding import SocketInUse
from qmpfd.transport import Arrival, FdStream

# -- the socket file ---------------------------------------------------------------------------


def _leave_stale(path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.bind(os.fspath(path))


async def _works(path: Path) -> None:
    with await Wire.session(path) as wire:
        assert value(await wire.call("query-name")) == {}


@pytest.mark.parametrize("listened", [True, False], ids=["closed", "never listened"])
async def test_a_stale_socket_file_is_replaced(path: Path, listened: bool) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.bind(os.fspath(path))
        if listened:
            sock.listen()
    async with daemon(path):
        await _works(path)
    assert not path.exists()


async def test_a_live_daemon_is_left_alone(path: Path) -> None:
    async with daemon(path):
        with pytest.raises(SocketInUse) as info:
            await qmpfd.serve([path])
        assert info.value.errno == errno.EADDRINUSE
        assert info.value.filename == os.fspath(path)
        assert "already listening" in str(info.value)
        await _works(path)


async def test_a_live_daemon_with_a_full_backlog_is_left_alone(path: Path) -> None:
    with ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        listener.bind(os.fspath(path))
        listener.listen(0)
        with pytest.raises(BlockingIOError):
            _fill_backlog(path, stack)
        with pytest.raises(SocketInUse):
            await qmpfd.serve([path])
        assert path.exists()


def _fill_backlog(path: Path, stack: ExitStack) -> None:
    while True:
        client = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        client.setblocking(False)
        client.connect(os.fspath(path))


@pytest.mark.parametrize("kind", ["file", "directory", "symbolic link"])
async def test_a_file_that_is_no_socket_is_left_alone(path: Path, kind: str) -> None:
    if kind == "file":
        path.write_text("precious")
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to(path.with_name("target"))
    with pytest.raises(OSError, match="not a socket") as info:
        await qmpfd.serve([path])
    assert info.value.filename == os.fspath(path)
    assert path.is_symlink() or path.exists()
    if kind == "file":
        assert path.read_text() == "precious"


async def test_one_bad_path_fails_the_start(path: Path) -> None:
    """The daemon closes the sockets that it has bound, and the descriptors of ``--add-fd``."""
    missing = path.with_name("missing") / "q.sock"
    with Pipe() as pipe:
        initial = [(qmpfd.kernel.fd.Fd(os.dup(pipe.fileno())), 0, None)]
        with pytest.raises(OSError, match="cannot bind") as info:
            await qmpfd.serve([path, missing], initial_fds=initial)
        assert info.value.filename == os.fspath(missing)
        assert not path.exists()
        pipe.release()
        assert not pipe.held()


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o777])
@pytest.mark.parametrize("mode", [None, 0o660, 0o600, 0o000])
async def test_mode_of_the_socket_file(path: Path, mode: int | None, umask: int) -> None:
    options = {} if mode is None else {"socket_mode": mode}
    previous = os.umask(umask)
    try:
        async with daemon(path, **options):
            assert stat.S_IMODE(path.stat().st_mode) == (0o600 if mode is None else mode)
        assert os.umask(umask) == umask
    finally:
        os.umask(previous)


async def test_somebody_elses_socket_file_is_not_removed(path: Path) -> None:
    """Another program has replaced the socket file: the daemon does not remove it."""
    async with daemon(path):
        path.unlink()
        _leave_stale(path)
    assert path.exists()


async def test_listening_again_on_the_same_path(path: Path) -> None:
    with pipes(3) as made:
        for pipe in made:
            async with daemon(path):
                with await Wire.session(path) as wire:
                    assert value(await wire.call("query-fdsets")) == []
                    assert value(await wire.call("add-fd", None, [pipe]))["fdset-id"] == 0
                    pipe.release()
                    assert pipe.held()
            assert not path.exists()
            assert not pipe.held()


# -- quit, stop, cancellation ------------------------------------------------------------------


async def test_quit(path: Path) -> None:
    """``quit`` is answered, later requests of its client are not; other clients get replies."""
    with pipes(3) as made, ExitStack() as stack:
        async with daemon(path) as server:
            wire = stack.enter_context(await Wire.session(path))
            other = stack.enter_context(await Wire.session(path))
            idle = stack.enter_context(await Wire.session(path))
            await wire.call("add-fd", None, [made[0]])
            # All input is in the sockets before the daemon reads.
            other.send(ADD + QUERY, [made[1]])
            wire.send(QUERY + request("quit", id="q") + ADD + QUERY, [made[2]])
            wire.send(ADD + QUERY, [made[2]])
            for pipe in made:
                pipe.release()
            assert await wire.rest() == [{"return": {}}, {"return": {}, "id": "q"}]
            assert await idle.rest() == []
            added, name = await other.rest()
            assert value(added)["fdset-id"] == 1
            assert value(name) == {}
            await server.ended.wait()
            assert not path.exists()
        assert not any(pipe.held() for pipe in made)


async def test_stop_serves_the_backlog(path: Path) -> None:
    """Clients that connected before the stop are served."""
    with ExitStack() as stack:
        async with daemon(path) as server:
            await settle()
            wires = [stack.enter_context(await Wire.connect(path)) for _ in range(20)]
            for wire in wires:
                wire.send(request("qmp_capabilities") + request("query-fdsets"))
            server.stop()
            for wire in wires:
                greeting, capabilities, fdsets = await wire.rest()
                assert "QMP" in greeting
                assert value(capabilities) == {}
                assert value(fdsets) == []


async def test_stop_does_not_wait_for_idle_clients(path: Path, autojump_clock: MockClock) -> None:
    with ExitStack() as stack:
        async with daemon(path) as server:
            for sent in (b"", b" ", b'{"execute":'):
                wire = stack.enter_context(await Wire.session(path))
                wire.send(sent) if sent else None
            await settle()
            start = trio.current_time()
            server.stop()
            await server.ended.wait()
            assert trio.current_time() == start


async def test_stop_waits_for_a_reader_but_not_for_ever(
    path: Path, autojump_clock: MockClock
) -> None:
    limits = qmpfd.Limits(drain_timeout=7, write_timeout=60)
    async with daemon(path, limits=limits) as server:
        with await Wire.session(path) as wire:
            wire.send(request("query-commands") * 2000)
            await settle()
            start = trio.current_time()
            server.stop()
            await server.ended.wait()
            assert trio.current_time() == start + 7


async def test_stop_does_not_wait_for_a_client_that_sends_without_end(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each read of the daemon finds one more request: the drain timeout ends that."""
    requests = iter([QUERY] * 200_000)  # some seconds' worth
    async with daemon(path, limits=qmpfd.Limits(drain_timeout=0.1)) as server:
        with await Wire.session(path) as wire:

            def receive_nowait(stream: FdStream, *arguments: Any) -> Arrival:
                with suppress(OSError):
                    wire.sock.send(next(requests, b""))
                with suppress(OSError):
                    wire.sock.recv(1 << 16)
                return FdStream.receive_nowait(stream, *arguments)

            (session,) = server.sessions
            monkeypatch.setattr(
                session.stream, "receive_nowait", partial(receive_nowait, session.stream)
            )
            server.stop()
            await server.ended.wait()
    assert next(requests, None) is not None


async def test_stop_finishes_a_slow_reader(path: Path, autojump_clock: MockClock) -> None:
    """A client that reads within the drain timeout loses no reply."""
    async with daemon(path) as server:
        with await Wire.session(path) as wire:
            wire.send(request("query-commands") * 2000)
            await settle()
            server.stop()
            await trio.sleep(4)
            assert len(await wire.rest()) == 2000


async def test_a_cancelled_daemon_cleans_up(path: Path) -> None:
    """A cancelled daemon removes its socket file, and closes everything."""
    with Pipe() as pipe:
        async with trio.open_nursery() as nursery:
            await nursery.start(qmpfd.serve, [path])
            with await Wire.session(path) as wire:
                await wire.call("add-fd", None, [pipe])
                pipe.release()
                nursery.cancel_scope.cancel()
        assert not pipe.held()
    assert not path.exists()


async def test_an_exception_of_another_task(path: Path) -> None:
    """An exception of another task in its nursery cancels the daemon, which cleans up."""
    with pytest.RaisesGroup(KeyError):
        async with daemon(path):
            await _works(path)
            raise KeyError(path)
    assert not path.exists()


# -- the process -------------------------------------------------------------------------------


@contextmanager
def _stopped(pid: int) -> Iterator[None]:
    """Stop the process while the block runs."""
    os.kill(pid, signal.SIGSTOP)
    _, status = os.waitpid(pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    yield
    os.kill(pid, signal.SIGCONT)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_the_daemon_after_all_replies(
    path: Path, number: signal.Signals
) -> None:
    """The daemon executes and answers everything that was sent before the signal."""
    with daemon_process(path) as process, ExitStack() as stack:
        known = stack.enter_context(await Wire.session(path))
        left, added, late = [stack.enter_context(Pipe()) for _ in range(3)]
        with _stopped(process.pid):
            for _ in range(30):
                known.send(QUERY)
            known.send(ADD, [added])
            with await Wire.connect(path) as gone:  # closed before the daemon accepts it
                gone.send(request("qmp_capabilities"))
                gone.send(ADD, [left])
            new = stack.enter_context(await Wire.connect(path))
            new.send(request("qmp_capabilities"))
            new.send(ADD + request("query-fdsets"), [late])
            for pipe in (left, added, late):
                pipe.release()
            process.signal(number)
        assert [value(reply) for reply in await known.replies(30)] == [{}] * 30
        assert "fdset-id" in value(await known.reply())
        assert await known.rest() == []
        _, _, info, fdsets = await new.rest()
        assert value(info)["fdset-id"] in {fdset["fdset-id"] for fdset in value(fdsets)}
        assert process.wait() == 0
        assert not path.exists()
        assert not any(pipe.held() for pipe in (left, added, late))


async def test_signal_sent_before_close(path: Path) -> None:
    """The daemon executes commands sent right before close(2) and the signal."""
    with daemon_process(path) as process, await Wire.session(path) as other:
        with _stopped(process.pid), pipes(10) as made:
            with await Wire.connect(path) as gone:
                gone.send(request("qmp_capabilities"))
                for pipe in made:
                    gone.send(ADD, [pipe])
            other.send(QUERY)
        await other.reply()
        while len(value(await other.call("query-fdsets"))) < 10:
            pass
        process.signal(signal.SIGTERM)
        assert await other.rest() == []
        assert process.wait() == 0


async def test_second_signal_ends_at_once(path: Path) -> None:
    """A second signal ends the drain, which would wait for a client that does not read."""
    options = ("--drain-timeout", "600", "--write-timeout", "600")
    with daemon_process(path, *options) as process, await Wire.session(path) as wire:
        wire.send(request("query-commands") * 2000)
        await trio.lowlevel.wait_readable(wire.sock)
        process.signal(signal.SIGTERM)
        await trio.to_thread.run_sync(process.await_line, lambda line: "SIGTERM" in line)
        process.signal(signal.SIGINT)
        assert await trio.to_thread.run_sync(process.wait) == 0
        assert any("SIGINT again" in line for line in process.log)
        assert not path.exists()


async def test_drain_is_bounded(path: Path) -> None:
    options = ("--drain-timeout", "0.2")
    with daemon_process(path, *options) as process, await Wire.session(path) as wire:
        wire.send(request("query-commands") * 2000)
        await trio.lowlevel.wait_readable(wire.sock)
        process.signal(signal.SIGTERM)
        assert await trio.to_thread.run_sync(process.wait) == 0
        assert not path.exists()


async def test_quit_ends_the_process(path: Path) -> None:
    with daemon_process(path) as process, await Wire.session(path) as wire:
        wire.send(request("quit"))
        assert await wire.rest() == [{"return": {}}]
        assert process.wait() == 0
        assert not path.exists()


async def test_killed_and_started_again(path: Path) -> None:
    """A killed daemon leaves a stale socket file, which the next one replaces."""
    with daemon_process(path) as process:
        process.signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert path.exists()
    with daemon_process(path) as process:
        await _works(path)


async def test_standard_descriptors_only(path: Path) -> None:
    """The daemon keeps no inherited descriptors except the standard streams."""
    with Pipe() as pipe:
        os.set_inheritable(pipe.fileno(), True)
        with daemon_process(path, pass_fds=()) as process:
            pipe.release()
            assert not pipe.held()
            assert len(open_fds(process.pid)) < 16
