"""Barriers between the worker and the parent of ``serve --supervise``, and the replies behind."""

from __future__ import annotations

import os
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import trio
from fake_parent import kept_daemon, silent, unanswered
from helpers import ADD, Pipe, Wire, pipes, request, settle, value

from qmpfd import Limits
from qmpfd.kernel.fd import Fd

REMOVE = request("remove-fd", {"fdset-id": 0})


class _Steps(trio.abc.Instrument):
    """Records which tasks run.

    Args:
        own: the test's task, which is not recorded.
    """

    def __init__(self, own: trio.lowlevel.Task) -> None:
        self._own = own
        self.names: list[str] = []

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        if task is not self._own and "Parent" not in task.name:
            self.names.append(task.name)


async def test_an_add_takes_two_task_steps(path: Path) -> None:
    """One task step executes the command; another receives the answer and sends the reply."""
    async with kept_daemon(path) as (_, _):
        with await Wire.session(path) as wire, Pipe() as pipe:
            for _ in range(3):
                value(await wire.call("add-fd", None, [pipe]))
            await settle()
            steps = _Steps(trio.lowlevel.current_task())
            trio.lowlevel.add_instrument(steps)
            value(await wire.call("add-fd", None, [pipe]))
            trio.lowlevel.remove_instrument(steps)
            assert 0 < len(steps.names) <= 2, steps.names


async def test_the_changes_of_many_are_two_messages(path: Path) -> None:
    """One message has all additions, the next one all removals."""
    async with kept_daemon(path) as (_, parent), AsyncExitStack() as stack:
        wires = [stack.enter_context(await Wire.session(path)) for _ in range(6)]
        pipe = stack.enter_context(Pipe())
        for wire in wires:
            value(await wire.call("add-fd", None, [pipe]))
        parent.stop()
        wires[0].send(ADD, [pipe])  # the other changes share the next barrier
        await settle()
        for number, wire in enumerate(wires[1:], 1):
            if number % 2:
                wire.send(request("remove-fd", {"fdset-id": number}))
            else:
                wire.send(ADD, [pipe])
            await settle()
        assert parent.turn() == 1
        before = parent.barriers
        await settle()
        assert (parent.turn(), parent.barriers) == (2, before + 1)
        parent.go_on()
        for wire in wires:
            value(await wire.reply())


async def test_a_client_that_ends_its_input(path: Path) -> None:
    """The client gets its pending reply, and then the end of the connection."""
    async with unanswered(path) as (_, parent, wire, _):
        wire.shut_write()
        assert await silent(wire)
        parent.go_on()
        (reply,) = await wire.rest()
        assert value(reply)["fdset-id"] == 0


async def test_further_requests_wait_for_the_first_reply(path: Path) -> None:
    """Further requests of the client are executed after its first reply, in order."""
    async with kept_daemon(path) as (_, parent):
        with await Wire.session(path) as wire, pipes(2) as made:
            parent.stop()
            wire.send(ADD, [made[0]])
            await settle()
            wire.send(ADD, [made[1]])
            wire.send(request("query-fdsets") + REMOVE + request("query-fdsets"))
            assert await silent(wire)
            parent.go_on()
            replies = [value(each) for each in await wire.replies(5)]
            assert [each["fdset-id"] for each in replies[:2]] == [0, 1]
            assert [each["fdset-id"] for each in replies[2]] == [1, 0]
            assert replies[3] == {}
            assert [each["fdset-id"] for each in replies[4]] == [1]


async def test_a_failing_action_does_not_affect_others(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An action that fails on the acknowledgement does not affect the other actions."""
    async with unanswered(path) as (server, parent, wire, _):
        called: list[str] = []
        durability = server.services.durability
        durability.on_synced([].pop)
        durability.on_synced(lambda: called.append("behind it"))
        parent.go_on()
        value(await wire.reply())
        assert called == ["behind it"]
        assert "IndexError" in caplog.text


async def test_quit_behind_a_change(path: Path) -> None:
    async with kept_daemon(path) as (_, parent):
        with await Wire.session(path) as wire, Pipe() as pipe:
            parent.stop()
            wire.send(ADD + request("quit"), [pipe])
            assert await silent(wire)
            parent.go_on()
            first, second = map(value, await wire.rest())
            assert first["fdset-id"] == 0
            assert second == {}


async def test_a_stop_waits_for_pending_replies(path: Path) -> None:
    """A client with a pending reply gets it before the daemon ends."""
    async with unanswered(path) as (server, parent, wire, _):
        server.stop()
        assert await silent(wire)
        parent.go_on()
        (reply,) = await wire.rest()
        assert value(reply)["fdset-id"] == 0


async def test_a_parent_that_dies_before_a_change(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The log names the remedy, also if sendmsg(2) detects the parent's death."""
    async with kept_daemon(path) as (server, parent):
        server.daemon.add([Fd(os.dup(0))], None, None, create=True)
        parent.die()
        await server.durability.sync()  # sendmsg(2) fails before the link's task is woken
        assert "--takeover --supervise" in caplog.text


async def test_a_client_with_a_pending_reply_is_not_idle(path: Path) -> None:
    async with unanswered(path, limits=Limits(idle_timeout=1)) as (server, parent, wire, _):
        (session,) = server.sessions
        for seconds in (10, 20):  # the first call sees the request just sent
            session.evict_if_idle(trio.current_time() + seconds)
        assert await silent(wire)
        parent.go_on()
        value(await wire.reply())
        await settle()
        session.evict_if_idle(trio.current_time() + 30)
        (farewell,) = await wire.rest()
        assert "Idle" in farewell["error"]["desc"]


async def test_a_descriptor_that_the_parent_lost_is_sent_again(path: Path) -> None:
    """The daemon sends the descriptor again until the parent has stored it; the reply waits."""
    async with kept_daemon(path) as (_, parent):
        with await Wire.session(path) as wire, Pipe() as pipe:
            before = len(parent.kept)
            parent.stop()
            parent.lose = 2
            wire.send(ADD, [pipe])
            pipe.release()
            await settle()
            parent.turn()  # sends LOST
            assert not parent.lost & parent.kept.keys()
            assert await silent(wire)
            parent.go_on()
            info = value(await wire.reply())
            assert parent.lose == 0
            assert parent.lost <= parent.kept.keys()
            assert len(parent.kept) == before + 1
            assert pipe.held()
            value(await wire.call("remove-fd", {"fdset-id": info["fdset-id"]}))
            assert len(parent.kept) == before
            assert not pipe.held()


async def test_a_removed_descriptor_is_not_sent_again(path: Path) -> None:
    """A removed descriptor that the parent has lost is not sent again."""
    async with kept_daemon(path) as (_, parent):
        with await Wire.session(path) as wire, await Wire.session(path) as other, Pipe() as pipe:
            before = set(parent.kept)
            parent.stop()
            parent.lose = 1
            wire.send(ADD, [pipe])
            pipe.release()
            await settle()
            other.send(REMOVE)
            await settle()
            parent.go_on()
            assert value(await wire.reply())["fdset-id"] == 0
            assert value(await other.reply()) == {}
            assert parent.lost
            assert set(parent.kept) == before
            assert not pipe.held()
