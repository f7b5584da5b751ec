"""200 concurrent clients: no reply and no descriptor is lost."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
import trio
from helpers import Pipe, daemon_process, open_fds

import qmpfd

CLIENTS = 200


LONG = (
    pytest.mark.slow,
    pytest.mark.skipif("QMPFD_SLOW" not in os.environ, reason="20 s: set QMPFD_SLOW=1"),
)


@pytest.mark.parametrize("seconds", [5, pytest.param(20, marks=LONG)])
async def test_many_clients(path: Path, seconds: float) -> None:
    answered = [0] * CLIENTS

    async def live(number: int, until: float) -> None:
        dice = random.Random(number)
        async with qmpfd.connect(path) as client:
            while trio.current_time() < until:
                answered[number] += await _turn(client, dice, f"{number}:{answered[number]}")

    with daemon_process(path) as process:
        async with qmpfd.connect(path) as client:
            await client.query_fdsets()  # the daemon has finished its start by then
            before = open_fds(process.pid)
        until = trio.current_time() + seconds
        async with trio.open_nursery() as nursery:
            for number in range(CLIENTS):
                nursery.start_soon(live, number, until)
        assert all(answered), "somebody was starved"
        async with qmpfd.connect(path) as client:
            assert await client.query_fdsets() == []
        # The daemon reads the ends of the last clients before it answers a later client twice.
        async with qmpfd.connect(path) as client:
            await client.query_fdsets()
            await client.query_fdsets()
            left = open_fds(process.pid)
        assert len(left) == len(before)
        assert len(before.items() - left.items()) <= 1  # the connection of this client


async def _turn(client: qmpfd.Client, dice: random.Random, name: str) -> int:
    """Add descriptors, list them, remove some by number and the others by set; return the number
    of replies.
    """
    made = [Pipe() for _ in range(dice.randint(1, 4))]
    try:
        infos = [await client.add_fd(made[0], opaque=name)]
        fdset_id = infos[0].fdset_id
        infos += [await client.add_fd(pipe, fdset_id, name) for pipe in made[1:]]
        for pipe in made:
            pipe.release()
        numbers = [info.fd for info in infos]
        assert {info.fdset_id for info in infos} == {fdset_id}
        [ours] = [fdset for fdset in await client.query_fdsets() if fdset.fdset_id == fdset_id]
        assert [(fd.fd, fd.opaque) for fd in ours.fds] == [(fd, name) for fd in numbers]
        alone = dice.randrange(len(made))
        for index in range(alone):
            await client.remove_fd(fdset_id, numbers[index])
            assert not made[index].held()
        assert all(pipe.held() for pipe in made[alone:])
        await client.remove_fd(fdset_id)
        assert not any(pipe.held() for pipe in made)
        return len(made) + 2 + alone
    finally:
        for pipe in made:
            pipe.__exit__()


async def test_one_connection_and_many_tasks(path: Path) -> None:
    """200 tasks share one client, with all calls in flight at once."""
    async with trio.open_nursery() as nursery:
        server: qmpfd.Server = await nursery.start(qmpfd.serve, [path])
        async with qmpfd.connect(path) as client, trio.open_nursery() as calls:
            for number in range(CLIENTS):
                calls.start_soon(_turn, client, random.Random(number), str(number))
        server.stop()
