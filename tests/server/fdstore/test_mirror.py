"""The mirror of the store with a fake parent: when replies are sent, and removed fds closed.

Tests of server/durability.py, server/fdstore/outgoing.py, server/fdstore/kept.py and
server/fdstore/lifespan.py.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest
import trio
from cancelling import CancelAt
from fake_parent import Parent, kept_daemon, silent, unanswered
from helpers import ADD, Pipe, Wire, open_fds, pipes, request, settle, value

from qmpfd.kernel.fd import close_all
from qmpfd.server.connection.session import Session
from qmpfd.server.server import DaemonServer

REMOVE = request("remove-fd", {"fdset-id": 0})


async def test_replies_wait_for_the_acknowledgement(path: Path) -> None:
    async with kept_daemon(path) as (_, parent):
        with (
            await Wire.session(path) as wire,
            await Wire.session(path) as other,
            await Wire.session(path) as watcher,
            Pipe() as pipe,
        ):
            await watcher.call("watch-fdsets", {"enable": True})
            parent.stop()
            wire.send(ADD, [pipe])
            pipe.release()
            await settle()
            other.send(request("query-fdsets"))
            assert await silent(wire)
            assert await silent(other)
            assert await silent(watcher)
            parent.turn()
            assert value(await wire.reply())["fdset-id"] == 0
            assert len(value(await other.reply())) == 1
            assert (await watcher.reply())["event"] == "FD_ADDED"
            # A removal waits too, and closes the daemon's descriptor first.
            wire.send(REMOVE)
            await settle()
            other.send(request("query-fdsets"))
            for each in (wire, other, watcher):
                assert await silent(each)
            assert pipe.held()
            parent.turn()
            assert value(await wire.reply()) == {}
            assert not pipe.held()
            assert value(await other.reply()) == []
            assert (await watcher.reply())["event"] == "FD_REMOVED"


async def test_the_parent_closes_a_removed_fd_first(path: Path) -> None:
    async with kept_daemon(path) as (_, parent):
        with await Wire.session(path) as wire, Pipe() as pipe:
            value(await wire.call("add-fd", None, [pipe]))
            pipe.release()
            parent.stop()
            wire.send(REMOVE)
            await settle()
            # The parent has closed it, but not acknowledged: the daemon's is still open.
            close_all(parent.kept.values())
            assert await silent(wire)
            assert pipe.held()
            parent.turn()
            value(await wire.reply())
            assert not pipe.held()


async def test_replies_without_pending_changes_do_not_wait(path: Path) -> None:
    async with kept_daemon(path) as (_, parent):
        with await Wire.session(path) as wire, await Wire.session(path) as other, Pipe() as pipe:
            value(await wire.call("add-fd", None, [pipe]))
            parent.stop()
            assert len(value(await other.call("query-fds"))) == 1
            wire.send(ADD, [pipe])
            await settle()
            # Replies without store changes, also to a new client.
            assert value(await other.call("query-name")) == {}
            with await Wire.session(path) as third:
                assert value(await third.call("query-version"))
            parent.go_on()
            value(await wire.reply())


async def test_one_barrier_for_many(path: Path) -> None:
    async with kept_daemon(path) as (_, parent):
        with pipes(8) as made:
            wires = [await Wire.session(path) for _ in made]
            parent.stop()
            before = parent.barriers
            for wire, pipe in zip(wires, made, strict=True):
                wire.send(ADD * 3, [pipe])
            await settle()
            while parent.turn():
                await settle()
            for wire in wires:
                assert value(await wire.reply())
                await wire.replies(2)
                wire.close()
            assert parent.barriers - before <= 3


async def test_more_messages_than_the_socket_buffers(path: Path) -> None:
    """More messages than the socket buffers: all are sent, in order."""
    async with kept_daemon(path) as (_, parent):
        with await Wire.session(path) as wire, Pipe() as pipe:
            parent.stop()
            listeners = len(parent.kept)
            for _ in range(3):
                wire.send(request("add-fds"), [pipe] * 250)
            await settle()
            assert await silent(wire)
            parent.go_on()
            await wire.replies(3)
            assert len(parent.kept) == listeners + 750
            for number in range(3):
                assert value(await wire.call("remove-fd", {"fdset-id": number})) == {}
            assert len(parent.kept) == listeners


async def test_connection_end_and_expiry(path: Path) -> None:
    async with kept_daemon(path) as (_, parent):
        before = len(parent.kept)
        with await Wire.session(path) as wire, Pipe() as pipe:
            await wire.call("add-fds", {"lifetime": "connection"}, [pipe])
            assert len(parent.kept) == before
            await wire.call("add-fds", {"expires": 1}, [pipe])
            assert len(parent.kept) == before + 1
            pipe.release()
            parent.stop()
            await trio.sleep(1.1)
            await settle()
            wire.close()
            await settle()
            assert pipe.held()
            parent.go_on()
            with await Wire.session(path) as other:  # its reply comes after the acknowledgement
                assert value(await other.call("query-fds")) == []
            assert not pipe.held()
            assert len(parent.kept) == before


async def test_the_parent_dies(path: Path) -> None:
    """Pending replies are sent; further descriptors are refused."""
    async with unanswered(path) as (_, parent, wire, pipe):
        parent.die()
        assert value(await wire.reply())
        reply = await wire.call("add-fd", None, [pipe])
        assert "--takeover --supervise" in reply["error"]["desc"]
        assert len(value(await wire.call("query-fds"))) == 1
        value(await wire.call("remove-fd", {"fdset-id": 0}))
        pipe.release()
        assert not pipe.held()


class _FirstCancelled(DaemonServer):
    """A daemon whose first session is cancelled at some step."""

    scope: trio.CancelScope
    victim: trio.lowlevel.Task | None

    async def _serve(self, session: Session) -> None:
        if self.victim is None:
            type(self).victim = trio.lowlevel.current_task()
            with self.scope:
                await super()._serve(session)
        else:
            await super()._serve(session)


async def _live(path: Path, parent: Parent) -> None:
    """Run a client whose replies wait for the parent repeatedly."""
    opening = request("open-fdset", {"fdset-id": 0})
    with await Wire.session(path) as wire, pipes(4) as made:
        wire.send(ADD, [made[0]])
        await wire.reply()
        for pipe in made[1:3]:
            parent.stop()
            wire.send(ADD, [pipe])
            wire.send(opening)
            for data in (opening, REMOVE, request("query-fds")):  # each after a pending change
                await settle()
                wire.send(data)
            await settle()
            parent.turn()
            await settle()
            wire.send(request("query-name"))
            await settle()
            parent.go_on()
            await wire.replies(6)
        wire.send(ADD, [made[3]])
        await settle()


@pytest.mark.parametrize("before", [True, False], ids=["running", "waiting"])
async def test_cancelled_at_each_step(
    path: Path, before: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No descriptor leaks on either side, and other clients are served."""
    monkeypatch.setattr("helpers.DaemonServer", _FirstCancelled)
    at_first = open_fds()
    for step in range(1, 200):
        _FirstCancelled.scope, _FirstCancelled.victim = trio.CancelScope(), None
        async with kept_daemon(path) as (_, parent):
            mine = len(parent.kept)
            with (
                CancelAt(
                    lambda task: task is _FirstCancelled.victim,
                    _FirstCancelled.scope,
                    step,
                    before=before,
                ) as cancel,
                suppress(AssertionError, ConnectionError),
            ):
                await _live(path, parent)
            parent.go_on()
            await settle()
            with await Wire.session(path) as wire:
                listed = value(await wire.call("query-fdsets"))
                assert len(parent.kept) - mine == sum(len(each["fds"]) for each in listed)
                for fdset in listed:
                    value(await wire.call("remove-fd", {"fdset-id": fdset["fdset-id"]}))
            assert len(parent.kept) == mine
        assert open_fds() == at_first, f"step {step}"
        if not cancel.done:
            break
    assert 10 < step < 199
