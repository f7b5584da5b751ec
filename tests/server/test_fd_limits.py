"""Many descriptors in one message, a full descriptor table (MSG_CTRUNC), and pending ones."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
from helpers import (
    ADD,
    QUERY,
    DaemonProcess,
    Wire,
    daemon,
    daemon_process,
    error,
    open_fds,
    pipes,
    remove,
    value,
)


def _limit(process: DaemonProcess, *, room: int) -> None:
    """Leave the process *room* for more descriptors."""
    used = open_fds(process.pid)
    limit = next(n for n in range(1 << 20) if n - sum(fd < n for fd in used) == room)
    hard = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)[1]
    resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (limit, hard))


def _unlimit(process: DaemonProcess) -> None:
    hard = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)[1]
    resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (hard, hard))


@pytest.mark.parametrize("messages", [2, 9])
async def test_pending_descriptors_are_those_of_two_messages_at_most(
    path: Path, messages: int
) -> None:
    with daemon_process(path) as process, pipes(1) as [pipe]:
        with await Wire.session(path) as wire:
            # With more pending at any time, the kernel would drop some, and the add-fd would fail.
            _limit(process, room=2 * 253)
            for _ in range(messages):
                wire.send(b" ", [pipe] * 253)
            wire.send(ADD)
            pipe.release()
            info = value(await wire.reply())
            assert pipe.held()
            await remove(wire, info)
            assert not pipe.held()
        _unlimit(process)


async def test_253_commands_with_253_fds_in_one_send(path: Path) -> None:
    """The most descriptors of one message (SCM_MAX_FD), each for a command of its own."""
    async with daemon(path):
        with await Wire.session(path) as wire, pipes(253) as made:
            # Without line ends, the receive buffer must take its slow path.
            wire.send(ADD.strip() * 253, made)
            for pipe in made:
                pipe.release()
            replies = [value(reply) for reply in await wire.replies(253)]
            assert [reply["fdset-id"] for reply in replies] == [*range(253)]
            for pipe, info in zip(made, replies, strict=True):
                assert pipe.held()
                await remove(wire, info)
                assert not pipe.held()


# The pieces that are sent; the first one carries the descriptors.
PIECES = {"the command": [ADD], "a blank": [b" ", ADD], "the first half": [ADD[:6], ADD[6:]]}


@pytest.mark.parametrize("pieces", PIECES.values(), ids=PIECES)
@pytest.mark.parametrize("sent, room", [(1, 0), (3, 0), (3, 1), (253, 252)])
async def test_out_of_descriptors(path: Path, sent: int, room: int, pieces: list[bytes]) -> None:
    """Only the command whose descriptor the kernel has dropped gets the error; descriptors that
    fitted are closed.
    """
    with daemon_process(path) as process, await Wire.session(path) as wire:
        before = open_fds(process.pid)
        with pipes(sent) as made:
            _limit(process, room=room)
            wire.send(QUERY)
            wire.send(pieces[0], made)
            for pipe in made:
                pipe.release()
            for piece in pieces[1:]:
                wire.send(piece)
            ok, lost = await wire.replies(2)
            assert ok == {"return": {}}
            assert error(lost) == "FdNotSupplied"
            assert not any(pipe.held() for pipe in made)
        assert open_fds(process.pid) == before
        plain = await wire.call("add-fd")
        assert error(plain) == "FdNotSupplied"
        assert plain["error"]["desc"] == "No file descriptor supplied via SCM_RIGHTS"
        assert "out of file descriptors" in lost["error"]["desc"]
        _unlimit(process)
        with pipes(1) as [pipe]:
            wire.send(ADD, [pipe])
            pipe.release()
            await remove(wire, value(await wire.reply()))
            assert not pipe.held()


async def test_newer_descriptors_replace_lost_ones(path: Path) -> None:
    """Newer descriptors replace lost ones, as they replace pending ones."""
    with daemon_process(path) as process:
        with await Wire.session(path) as wire, pipes(3) as made:
            _limit(process, room=1)
            wire.send(b" ", made[:2])
            wire.send(b" ", made[2:])
            for pipe in made:
                pipe.release()
            wire.send(ADD)
            info = value(await wire.reply())
            assert [pipe.held() for pipe in made] == [False, False, True]
            await remove(wire, info)
            assert not made[2].held()
        _unlimit(process)
