"""Turns: in which order those have them who ask for much."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from time import monotonic, thread_time

import trio
from trio.testing import wait_all_tasks_blocked

from qmpfd.limits import FIRST_TURN_SECONDS, SHARE_SECONDS, TURN_SECONDS
from qmpfd.server.connection.turns import Share, Turns


async def _spend(seconds: float) -> None:
    ends = thread_time() + seconds
    while thread_time() < ends:
        pass


async def _order(*waits: Callable[[Turns], Awaitable[None]]) -> list[int]:
    """In which order they have their turns, when they come in this order while one is busy."""
    turns = Turns()
    order: list[int] = []

    async def wait(number: int) -> None:
        await waits[number](turns)
        order.append(number)

    async with trio.open_nursery() as nursery:
        turns._busy = True  # somebody has a turn
        for number in range(len(waits)):
            nursery.start_soon(wait, number)
            await wait_all_tasks_blocked()
        turns._pass_on()
    return order


async def _much(turns: Turns) -> None:
    await Share(turns).next_turn(much=True)


async def _little(turns: Turns) -> None:
    share = Share(turns)
    await _spend(SHARE_SECONDS)
    await share.next_turn()


async def test_who_may_be_done_sooner_goes_first() -> None:
    """However many have come before that have used nothing yet."""
    order = await _order(*[_much] * 50, _little)
    assert order[0] == 50
    assert sorted(order) == list(range(51))


async def test_one_turn_a_pass() -> None:
    """Between two of them everybody else is served."""
    turns = Turns()
    passes = 0
    seen = []

    async def count() -> None:
        nonlocal passes
        while True:
            await trio.lowlevel.checkpoint()
            passes += 1

    async def wait() -> None:
        await Share(turns).next_turn(much=True)
        seen.append(passes)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(count)
        async with trio.open_nursery() as waiters:
            for _ in range(20):
                waiters.start_soon(wait)
        nursery.cancel_scope.cancel()
    assert seen == sorted(set(seen)), "two in one pass"


async def test_a_turn_is_as_long_as_what_was_used() -> None:
    for used, much, longest in (
        (0.0, False, FIRST_TURN_SECONDS),
        (0.0, True, TURN_SECONDS),
        (10 * TURN_SECONDS, False, TURN_SECONDS),
    ):
        share = Share(Turns())
        await _spend(used)
        await share.next_turn(much=much)
        assert share.in_turn is much
        left = share.ends - monotonic()
        assert longest - 0.01 < left <= longest


async def test_one_that_gives_up_its_place() -> None:
    """Whoever is behind it is not left waiting."""
    turns = Turns()
    async with trio.open_nursery() as nursery:
        turns._busy = True
        scopes = []
        for _ in range(3):
            scope = trio.CancelScope()
            scopes.append(scope)

            async def wait(scope: trio.CancelScope = scope) -> None:
                with scope:
                    await _much(turns)

            nursery.start_soon(wait)
            await wait_all_tasks_blocked()
        scopes[0].cancel()
        turns._pass_on()
        scopes[1].cancel()
    await _much(turns)
