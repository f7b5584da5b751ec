"""The transition table of the daemon's states is complete and consistent."""

from __future__ import annotations

import pytest
import trio
from helpers import settle

from qmpfd.server.lifecycle import STOPPING, TRANSITIONS, Event, Lifecycle, State


def reachable(start: State) -> set[State]:
    found = {start}
    while True:
        more = {after for (before, _), after in TRANSITIONS.items() if before in found} - found
        if not more:
            return found
        found |= more


def test_every_state_is_reached_and_left() -> None:
    assert reachable(State.STARTING) == set(State)
    for state in State:
        assert State.ENDED in reachable(state)


def test_no_event_leaves_the_final_state() -> None:
    for state in (State.DRAINING, State.QUITTING, State.HANDED_OVER, State.ENDED):
        assert State.RUNNING not in reachable(state)
    assert reachable(State.ENDED) == {State.ENDED}
    assert reachable(State.HANDED_OVER) == {State.HANDED_OVER, State.ENDED}


async def test_an_event_that_is_impossible_changes_nothing() -> None:
    for state in State:
        for event in Event:
            lifecycle = _in(state)
            if (state, event) in TRANSITIONS:
                assert lifecycle.can(event)
                lifecycle.handle(event)
                assert lifecycle.state is TRANSITIONS[state, event]
            else:
                assert not lifecycle.can(event)
                with pytest.raises(KeyError):
                    lifecycle.handle(event)
                assert lifecycle.state is state


async def test_a_stop_is_never_lost() -> None:
    """A stop is carried out after a takeover, whether that succeeds or fails."""
    for state in State:
        lifecycle = _in(state)
        if lifecycle.can(Event.STOP):
            lifecycle.handle(Event.STOP)
            assert State.RUNNING not in reachable(lifecycle.state)


async def test_a_quit_is_never_lost() -> None:
    """After ``quit`` the daemon serves no more, unless a successor has taken over."""
    for state in State:
        lifecycle = _in(state)
        if lifecycle.can(Event.STOP) and state is not State.STARTING:
            assert lifecycle.can(Event.QUIT)
        if lifecycle.can(Event.QUIT):
            lifecycle.handle(Event.QUIT)
            after = reachable(lifecycle.state)
            assert not after & {State.RUNNING, State.DRAINING}


def _in(state: State) -> Lifecycle:
    """Return a lifecycle that transitions of the table have brought to *state*."""
    ways: dict[State, list[Event]] = {State.STARTING: []}
    while state not in ways:
        for (before, event), after in TRANSITIONS.items():
            if before in ways and after not in ways:
                ways[after] = [*ways[before], event]
    lifecycle = Lifecycle()
    for event in ways[state]:
        lifecycle.handle(event)
    assert lifecycle.state is state
    return lifecycle


async def test_tasks_wait_for_the_end_of_a_pause() -> None:
    """A task that waits for the end of a pause waits on when the successor has committed."""
    lifecycle = _in(State.PAUSED)
    seen: list[str] = []

    async def wait_running() -> None:
        await lifecycle.wait_running()
        seen.append("running")

    async def wait_stopping() -> None:
        await lifecycle.wait_for(*STOPPING)
        seen.append("stopping")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait_running)
        await settle()
        assert seen == []
        lifecycle.handle(Event.RESUME)
        await settle()
        assert seen == ["running"]
        lifecycle.handle(Event.PAUSE)
        nursery.start_soon(wait_running)
        nursery.start_soon(wait_stopping)
        lifecycle.handle(Event.HAND_OVER)
        await settle()
        assert seen == ["running", "stopping"]
        assert not lifecycle.ended.is_set()
        lifecycle.handle(Event.END)
        assert lifecycle.ended.is_set()
        nursery.cancel_scope.cancel()
