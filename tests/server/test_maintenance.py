"""The daemon's own tasks: a failure is logged, and the task runs again."""

from __future__ import annotations

import errno
import logging
import os
import select
import socket
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path

import pytest
import trio
from helpers import ADD, Wire, daemon, daemon_process, error, pipes, settle, value
from trio.testing import MockClock

import qmpfd
from qmpfd.kernel.fd import Fd, FileDescriptorLike
from qmpfd.kernel.hangups import Hangups
from qmpfd.limits import MAX_RESTART_DELAY, MIN_RESTART_DELAY
from qmpfd.server.maintenance import supervise
from qmpfd.transport import FdStream


async def test_a_failing_task_runs_again_after_growing_delays(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    starts: list[float] = []

    async def fail() -> None:
        starts.append(trio.current_time())
        if len(starts) < 15:
            raise [OSError("odd"), RuntimeError("odd"), ExceptionGroup("odd", [KeyError("odd")])][
                len(starts) % 3
            ]

    await supervise("a task of the test", fail)  # returns when the task returns
    delays = [after - before for before, after in pairwise(starts)]
    assert delays[:3] == pytest.approx([MIN_RESTART_DELAY * factor for factor in (1, 2, 4)])
    assert delays[-1] == pytest.approx(MAX_RESTART_DELAY)
    lines = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(lines) == 14
    assert "a task of the test failed" in lines[0].getMessage()
    assert lines[0].exc_info is not None


async def test_the_delay_is_reset_after_a_long_run(autojump_clock: MockClock) -> None:
    """The delay before a restart is short again when the task has run for long."""
    starts: list[float] = []

    async def work() -> None:
        starts.append(trio.current_time())
        if len(starts) < 8:
            raise OSError
        if len(starts) < 12:
            await trio.sleep(86400)
            raise OSError

    await supervise("a task of the test", work)
    assert starts[9] - starts[8] == pytest.approx(86400 + MIN_RESTART_DELAY)
    assert starts[10] - starts[9] == pytest.approx(86400 + 2 * MIN_RESTART_DELAY, abs=1)


async def test_supervision_is_cancelled() -> None:
    with trio.move_on_after(0) as scope:
        await supervise("a task of the test", trio.sleep_forever)
    assert scope.cancelled_caught


async def test_an_epoll_that_fails(path: Path) -> None:
    """A daemon whose epoll fails misses hang-ups, and does everything else."""
    with pipes(2) as made:
        async with daemon(path) as server:
            with await Wire.session(path) as wire:
                await wire.call("add-fds", {"watch-hangup": True}, made[:1])
                hangups = server.daemon.hangups
                Fd(hangups.fileno()).close()  # each epoll call fails with EBADF from here on
                made[0].release()
                await settle()
                assert value(await wire.call("query-fdsets"))
                assert value(await wire.call("remove-fd", {"fdset-id": 0})) == {}
                # The daemon closes this number at the end: give it to another epoll.
                with select.epoll() as other:
                    os.dup2(other.fileno(), hangups.fileno(), inheritable=False)


def test_a_fifo_that_was_opened_again(tmp_path: Path) -> None:
    """A FIFO that has hung up and was opened again hangs up again with its last writer."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    hangups: Hangups[str] = Hangups()
    with ExitStack() as stack:
        stack.callback(hangups.close)
        reader = stack.enter_context(Fd(os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)))
        Fd(os.open(fifo, os.O_WRONLY)).close()
        hangups.watch(reader, "entry")
        hangups.poll()
        assert hangups.due == [reader.fileno()]
        writer = stack.enter_context(Fd(os.open(fifo, os.O_WRONLY)))  # clears the hang-up
        assert hangups.examine(1) == []
        assert not hangups.draining
        writer.close()
        hangups.poll()
        assert hangups.examine(1) == ["entry"]
        hangups.unwatch(reader)


@pytest.mark.parametrize("odd", ["loop", "folder", "missing", "not UTF-8"])
def test_metrics_that_cannot_be_written(tmp_path: Path, odd: str) -> None:
    target = tmp_path / "metrics"
    if odd == "loop":
        target.symlink_to(target)
    elif odd == "folder":
        target.mkdir()
    elif odd == "missing":
        target = tmp_path / "none" / "metrics"
    else:
        target = tmp_path / os.fsdecode(b"caf\xe9") / "metrics"
    path = tmp_path / "q.sock"
    with daemon_process(path, "--metrics", str(target)) as process:
        process.await_line(lambda line: "cannot write the metrics" in line)
        assert "Traceback" not in "".join(process.log)
        process.process.terminate()
        assert process.wait() == 0


class _Full(FdStream):
    """A connection whose send(2) fails with ENOBUFS."""

    def send_nowait(self, data: bytes | memoryview, fds: Sequence[FileDescriptorLike] = ()) -> int:
        raise OSError(errno.ENOBUFS, os.strerror(errno.ENOBUFS))


async def test_a_rejection_that_cannot_be_sent(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with daemon(path, limits=qmpfd.Limits(max_connections=1)):
        with await Wire.session(path) as wire:
            with monkeypatch.context() as patch:
                patch.setattr("qmpfd.server.server.FdStream", _Full)
                with await Wire.connect(path) as other:
                    assert await other.rest() == []
            with await Wire.connect(path) as other:
                [output] = await other.rest()
                assert error(output) == "GenericError"
            with pipes(1) as made:
                wire.send(ADD, made)
                assert value(await wire.reply())["fdset-id"] == 0


async def test_a_listening_socket_that_is_shut_down_is_bound_again(path: Path) -> None:
    """The daemon binds the socket again: no client is refused, and there is no busy loop."""
    async with daemon(path) as server:
        (listener,) = server.listeners
        number = listener.socket.fileno()
        for how in (socket.SHUT_RD, socket.SHUT_RDWR):
            with socket.socket(fileno=os.dup(number)) as theirs:
                theirs.shutdown(how)
            await settle()
            assert listener.socket.fileno() == number
            with await Wire.session(path) as wire:
                assert value(await wire.call("query-fdsets")) == []
    assert not path.exists()


async def test_an_abstract_socket_that_is_shut_down(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It cannot be bound again: one line says so, and clients of other sockets are served."""
    async with daemon(path, Path(f"@{path.name}-{os.getpid()}")) as server:
        _, listener = server.listeners
        with socket.socket(fileno=os.dup(listener.socket.fileno())) as theirs:
            theirs.shutdown(socket.SHUT_RDWR)
        await settle()
        with await Wire.session(path) as wire:
            assert value(await wire.call("query-fdsets")) == []
    (record,) = caplog.records
    assert record.getMessage().endswith("no client can connect to it any more")
    assert record.exc_info is None
