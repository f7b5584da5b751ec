"""``watch-fdsets``: who is told what, when, and what becomes of one who does not listen."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import trio
from helpers import Pipe, Wire, daemon, error, open_fds, pipes, request, settle, value
from trio.testing import MockClock

import qmpfd
from qmpfd.commands import DECODER, TABLE, Context, SharedState
from qmpfd.commands.events import Event, EventLog, Watcher
from qmpfd.commands.extension_types import FdAdded
from qmpfd.fdsets import Peer
from qmpfd.kernel.close_pool import ClosePool
from qmpfd.kernel.fd import Fd
from qmpfd.kernel.hangups import Hangups
from qmpfd.limits import EVENT_BYTES_A_TURN, MAX_EVENT_BYTES, MAX_EVENTS, MAX_REQUEST_BYTES
from qmpfd.policy import EVERYTHING, Access, Grant
from qmpfd.protocol.server import ServerConnection

#: What the two ends of a Unix socket hold for sure, at most: Linux doubles what it is asked for.
SOCKET_BYTES = 1 << 20


async def watching(path: Path) -> Wire:
    """A connection that watches."""
    wire = await Wire.session(path)
    assert value(await wire.call("watch-fdsets", {"enable": True})) == {}
    return wire


async def told_nothing_else(wire: Wire) -> None:
    """Nothing has come, and nothing is on its way: the next line answers the next question."""
    await settle()
    assert "return" in await wire.call("query-name")


# -- what is told ------------------------------------------------------------------------------


async def test_the_shape(path: Path) -> None:
    async with daemon(path):
        with await watching(path) as wire, Pipe() as pipe:
            before = time.time()
            value(await wire.call("add-fd", {"opaque": "o"}, [pipe]))
            added = await wire.reply()
            stamp = added.pop("timestamp")
            assert stamp.keys() == {"seconds", "microseconds"}
            assert before - 1 < stamp["seconds"] + stamp["microseconds"] / 1e6 < time.time() + 1
            assert 0 <= stamp["microseconds"] < 1_000_000
            number = added["data"]["fd"]
            data = {"fdset-id": 0, "fd": number, "opaque": "o"}
            assert added == {"event": "FD_ADDED", "data": data}
            value(await wire.call("remove-fd", {"fdset-id": 0}))
            removed = await wire.reply()
            del removed["timestamp"]
            data["reason"] = "removed"
            assert removed == {"event": "FD_REMOVED", "data": data}


async def test_without_an_opaque_text(path: Path) -> None:
    async with daemon(path):
        with await watching(path) as wire, Pipe() as pipe:
            value(await wire.call("add-fd", None, [pipe]))
            assert (await wire.reply())["data"].keys() == {"fdset-id", "fd"}
            value(await wire.call("remove-fd", {"fdset-id": 0}))
            assert (await wire.reply())["data"].keys() == {"fdset-id", "fd", "reason"}


async def test_one_for_each_descriptor(path: Path) -> None:
    """In the order in which they are listed."""
    async with daemon(path), qmpfd.connect(path) as client:
        with pipes(5) as made:
            async with client.watch_fdsets() as events:
                added = await client.add_fds(made)
                await client.remove_fd(0)
                for name in ("FD_ADDED", "FD_REMOVED"):
                    for fd in added.fds:
                        event = await anext(events)
                        assert (event.name, event.data["fd"]) == (name, fd.fd)


async def test_reasons(path: Path, autojump_clock: MockClock) -> None:
    """Each way in which a descriptor can leave, whoever brought it."""
    async with daemon(path), qmpfd.connect(path) as client, client.watch_fdsets() as events:

        async def reason() -> str:
            assert (await anext(events)).name == "FD_ADDED"
            removed = await anext(events)
            assert removed.name == "FD_REMOVED"
            return str(removed.data["reason"])

        with pipes(1) as made:
            await client.add_fd(made[0])
            await client.remove_fd(0)
            assert await reason() == "removed"
            await client.add_fds(made[:1], expires=3)
            assert await reason() == "expired"
            async with qmpfd.connect(path) as other:
                await other.add_fds(made[:1], lifetime="connection")
            assert await reason() == "connection"
            async with qmpfd.connect(path) as other:
                await other.execute("getfd", {"fdname": "x"}, fds=made[:1])  # in no set
            here, there = socket.socketpair()
            with here, there:
                await client.add_fds([here], watch_hangup=True)
                there.close()
                assert await reason() == "hangup"


async def test_nothing_unasked(path: Path) -> None:
    """Not to one who never asked, not for what failed, not for reading."""
    async with daemon(path):
        with await Wire.session(path) as plain, await watching(path) as wire, Pipe() as pipe:
            info = value(await plain.call("add-fd", None, [pipe]))
            assert (await wire.reply())["event"] == "FD_ADDED"
            assert error(await plain.call("add-fd", {"fdset-id": 9}, [pipe])) != ""
            assert error(await plain.call("remove-fd", {"fdset-id": 9})) == "FdNotFound"
            for command in ("query-fdsets", "query-fds", "query-stats"):
                value(await plain.call(command))
            value(await plain.call("getfd", {"fdname": "x"}, [pipe]))
            value(await plain.call("open-fdset", {"fdset-id": 0}))
            await told_nothing_else(wire)
            value(await plain.call("remove-fd", info))
            assert (await wire.reply())["event"] == "FD_REMOVED"
            await told_nothing_else(plain)


async def test_not_for_what_was_there_before(path: Path) -> None:
    async with daemon(path):
        with await Wire.session(path) as wire, Pipe() as pipe:
            value(await wire.call("add-fd", None, [pipe]))
            value(await wire.call("watch-fdsets", {"enable": True}))
            await told_nothing_else(wire)


async def test_enable_and_disable(path: Path) -> None:
    """Twice is as good as once; after the reply to disable nothing comes any more."""
    async with daemon(path):
        with await Wire.session(path) as wire, await Wire.session(path) as other, Pipe() as pipe:
            for enable in (False, True, True):
                assert value(await wire.call("watch-fdsets", {"enable": enable})) == {}
            value(await other.call("add-fd", None, [pipe]))
            assert (await wire.reply())["event"] == "FD_ADDED"
            await told_nothing_else(wire)
            for _ in range(3):  # an event is on its way when it is told to stop
                other.send(request("add-fd"), [pipe])
            wire.send(request("watch-fdsets", {"enable": False}, id="stop"))
            while (line := await wire.reply()).get("id") != "stop":
                assert line["event"] == "FD_ADDED"
            value(await other.call("remove-fd", {"fdset-id": 0}))
            await told_nothing_else(wire)


async def test_arguments(path: Path) -> None:
    async with daemon(path):
        with await Wire.session(path) as wire:
            for arguments in (None, {}, {"enable": 1}, {"enable": None}, {"enable": True, "x": 1}):
                assert error(await wire.call("watch-fdsets", arguments)) == "GenericError"


async def test_many_watchers(path: Path) -> None:
    """Each is told all, in the same order."""
    seen: list[list[Any]] = []

    async def listen(wire: Wire) -> None:
        with wire:
            seen.append([(await wire.reply())["data"] for _ in range(40)])

    async with daemon(path), qmpfd.connect(path) as client, trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(listen, await watching(path))
        with pipes(10) as made:
            for _ in range(2):
                await client.add_fds(made)
                await client.remove_fd(0)
    assert len(seen) == 20
    assert all(events == seen[0] for events in seen)


async def test_between_replies(path: Path) -> None:
    """Whole lines, whatever is being answered at the time."""
    async with daemon(path):
        with await watching(path) as wire, await Wire.session(path) as other, pipes(1) as made:
            for start in range(0, 100, 20):
                for n in range(start, start + 20):
                    wire.send(request("query-commands", id=n))
                    other.send(request("add-fd", {"opaque": "x" * 1000}), made)
                lines = await wire.replies(40)
                ids = [line["id"] for line in lines if "id" in line]
                assert ids == list(range(start, start + 20))
                assert sum(line.get("event") == "FD_ADDED" for line in lines) == 20


# -- one who does not listen -------------------------------------------------------------------


async def churn(client: qmpfd.Client, pipe: Pipe, rounds: int) -> int:
    """Add and remove; how many events that makes."""
    for _ in range(rounds):
        info = await client.add_fds([pipe] * 250)
        await client.remove_fd(info.fdset_id)
    return rounds * 500


async def test_a_slow_watcher_is_told_what_it_missed(path: Path) -> None:
    """All that was not lost comes in order; the loss is told where it happened; then it goes on."""
    async with daemon(path), qmpfd.connect(path) as client:
        with await watching(path) as wire, Pipe() as pipe:
            made = await churn(client, pipe, 60)
            told = lost = losses = 0
            while told + lost < made:
                event = await wire.reply()
                if event["event"] == "FD_EVENTS_LOST":
                    assert event["data"].keys() == {"count"}
                    assert event["data"]["count"] > 0
                    lost += event["data"]["count"]
                    losses += 1
                    continue
                if not losses:  # up to there nothing is missing
                    expected = "FD_ADDED" if told % 500 < 250 else "FD_REMOVED"
                    assert event["event"] == expected
                told += 1
            assert told + lost == made
            assert lost > 0
            assert told >= MAX_EVENTS
            await told_nothing_else(wire)
            await client.add_fd(pipe)
            assert (await wire.reply())["event"] == "FD_ADDED"


async def test_long_texts_do_not_fill_the_daemon(path: Path) -> None:
    """What waits is bounded in bytes too."""
    long = "x" * 20_000
    async with daemon(path), qmpfd.connect(path) as client:
        with await watching(path) as wire, Pipe() as pipe:
            for _ in range(2):
                info = await client.add_fds([pipe] * 250, opaque=long)
                await client.remove_fd(info.fdset_id)
            await settle()
            told = lost = size = 0
            while told + lost < 1000:
                line = await wire.line()
                assert line is not None
                size += len(line)
                event = json.loads(line)
                if event["event"] == "FD_EVENTS_LOST":
                    lost += event["data"]["count"]
                else:
                    assert event["data"]["opaque"] == long
                    told += 1
            # Some in the socket, some being sent, some waiting.
            assert size < SOCKET_BYTES + 2 * MAX_EVENT_BYTES


async def test_the_longest_text_of_all(path: Path) -> None:
    """As long as a request may be, six times that in the events: yet they get through."""
    long = "\u20ac" * (MAX_REQUEST_BYTES // 3 - 100)
    async with daemon(path):
        with await watching(path) as wire, Pipe() as pipe:
            wire.send(b" ", [pipe])
            arguments = b'{"opaque": "%s"}' % long.encode()
            await wire.send_all(b'{"execute": "add-fd", "arguments": %s}' % arguments)
            value(await wire.reply())
            added = await wire.reply()
            assert added["data"]["opaque"] == long
            value(await wire.call("remove-fd", {"fdset-id": 0}))
            assert (await wire.reply())["data"]["opaque"] == long


def event(number: int, size: int = 256) -> Event:
    """One that is about that descriptor, as large as that."""
    return Event.now("FD_ADDED", FdAdded(0, number, "x" * ((size - 256) // 6) or None))


def told(watcher: Watcher) -> list[Any]:
    """All that waits: the descriptors, and how many were lost."""
    lines = b"".join(iter(watcher.next_batch, b"")).splitlines()
    data = [json.loads(line)["data"] for line in lines]
    return [each["fd"] if "fd" in each else f"{each['count']} lost" for each in data]


def test_the_newest_are_kept() -> None:
    """The count stands where the lost ones would; each watcher has its own."""
    log = EventLog(EVERYTHING)
    first = Watcher(log, lambda: False)
    long = MAX_EVENT_BYTES // 2
    for each in (event(1), event(2, long)):
        log.put(each)
    second = Watcher(log, lambda: False)
    assert told(second) == []
    for each in (event(3, long), event(4)):
        log.put(each)
    assert told(first) == ["2 lost", 3, 4]
    assert told(first) == []
    assert told(second) == [3, 4]
    log.put(event(5))
    log.put(event(6, 2 * long))  # alone it may be longer
    assert told(first) == told(second) == ["1 lost", 6]


def test_as_many_as_there_may_be() -> None:
    log = EventLog(EVERYTHING)
    watcher = Watcher(log, lambda: False)
    for number in range(MAX_EVENTS + 3):
        log.put(event(number))
    assert told(watcher) == ["3 lost", *range(3, MAX_EVENTS + 3)]


def test_a_little_is_taken_at_a_time() -> None:
    """What a client does not take is kept for it alone."""
    log = EventLog(EVERYTHING)
    watcher = Watcher(log, lambda: False)
    for number in range(MAX_EVENTS):
        log.put(event(number))
    takes = list(iter(watcher.next_batch, b""))
    assert sum(take.count(b"FD_ADDED") for take in takes) == MAX_EVENTS
    assert max(map(len, takes)) < EVENT_BYTES_A_TURN + 200


def test_a_change_costs_the_same_however_many_watch() -> None:
    """It is kept once, looked at once for each set of rights, and one call tells of it."""
    calls = 0

    def news() -> None:
        nonlocal calls
        calls += 1

    class Counting(Access):
        looks = 0

        def may(self, right: Any, fdset_id: int, opaque: str | None) -> bool:
            type(self).looks += 1
            return super().may(right, fdset_id, opaque)

    def unused() -> None:
        raise AssertionError

    core = SharedState("spec", qmpfd.Limits(), lambda: 0.0, unused, TABLE, ClosePool(), Hangups())
    core.on_event = news
    grant = Grant(frozenset({"query"}), frozenset({0}))
    contexts = [
        Context(core, ServerConnection(DECODER), Peer(1, 1, 1), Counting((grant,)), lambda: False)
        for _ in range(100)
    ]
    for context in contexts:
        context.watch(True)
    assert len(core.logs) == 1
    with Pipe() as pipe:
        fd = Fd(os.dup(pipe.fileno()))
        (stored,) = core.add([fd])
        assert (calls, Counting.looks) == (1, 1)
        core.remove([stored], "removed", [])
        fd.close()
    assert (calls, Counting.looks) == (2, 2)
    for context in contexts:
        assert context.events is not None
        assert context.events.next_batch().count(b"FD_") == 2
        context.watch(False)
    assert not core.logs
    assert not core.watchers
    core.closer.shut_down()
    core.hangups.close()


async def test_the_rights_of_the_time(path: Path) -> None:
    """Who may see less from now on is told what it could see before, if it has taken it; else
    that it was lost.
    """
    async with daemon(path) as server, qmpfd.connect(path) as client:
        with await watching(path) as wire, Pipe() as pipe:
            await client.add_fd(pipe)
            await client.add_fd(pipe)
            assert (await wire.reply())["data"]["fdset-id"] == 0
            assert (await wire.reply())["data"]["fdset-id"] == 1
            [context] = [s.context for s in server.sessions if s.context.events is not None]
            context.change_access(Access((Grant(frozenset({"query"}), frozenset({1})),)))
            await client.remove_fd(0)
            await client.remove_fd(1)
            assert (await wire.reply())["data"]["fdset-id"] == 1
            context.change_access(context.access)
            await told_nothing_else(wire)


async def test_others_are_not_held_up(path: Path) -> None:
    """Nor is the one itself: its replies come behind the events that were sent already."""
    async with daemon(path), qmpfd.connect(path) as client:
        with await watching(path) as deaf, await watching(path) as wire, Pipe() as pipe:
            await churn(client, pipe, 30)
            assert len(await client.query_fdsets()) == 0
            for _ in range(100):
                assert (await wire.reply())["event"] == "FD_ADDED"
            deaf.send(request("query-name", id="here"))
            while (await deaf.reply()).get("id") != "here":
                pass


async def test_it_never_listens_again(path: Path, autojump_clock: MockClock) -> None:
    """Cut off after the write timeout, like any client that does not take what it is sent."""
    async with daemon(path), qmpfd.connect(path) as client:
        before = open_fds()
        with await watching(path) as wire, Pipe() as pipe:
            await churn(client, pipe, 60)
            await trio.sleep(29)
            assert (await client.execute("query-stats"))["connections"] == 2
            await trio.sleep(2)
            assert (await client.execute("query-stats"))["connections"] == 1
            assert await wire.drain()
        await settle()
        assert open_fds() == before


@pytest.mark.parametrize("how", ["close", "half close"])
async def test_it_dies(path: Path, how: str) -> None:
    """With events unread, and more on their way: nothing of it is left, others are not harmed."""
    async with daemon(path), qmpfd.connect(path) as client:
        before = open_fds()
        with Pipe() as pipe:
            wire = await watching(path)
            with wire:
                await churn(client, pipe, 30)
                if how == "close":
                    wire.close()
                else:
                    wire.shut_write()
                await churn(client, pipe, 2)
            await settle()
            assert (await client.execute("query-stats"))["connections"] == 1
            await churn(client, pipe, 2)
        await settle()
        assert open_fds() == before


async def test_a_watcher_is_not_idle(path: Path, autojump_clock: MockClock) -> None:
    """It has nothing to ask: it is there to listen."""
    async with (
        daemon(path, limits=qmpfd.Limits(idle_timeout=10)),
        qmpfd.connect(path) as client,
    ):
        with await watching(path) as wire, Pipe() as pipe:
            for _ in range(10):
                await trio.sleep(8)
                await client.query_fdsets()
            await client.add_fd(pipe)
            assert (await wire.reply())["event"] == "FD_ADDED"


# -- our client --------------------------------------------------------------------------------


async def test_the_client_begins_afresh(path: Path) -> None:
    """A block's events are those of that block, not what an earlier one left unread."""
    async with daemon(path), qmpfd.connect(path) as client:
        with pipes(3) as made:
            async with client.watch_fdsets():
                await client.add_fd(made[0], opaque="first")
            await client.add_fd(made[1], opaque="second")
            async with client.watch_fdsets() as events:
                await client.add_fd(made[2], opaque="third")
                assert (await anext(events)).data["opaque"] == "third"


async def test_two_blocks_at_a_time(path: Path) -> None:
    """The end of one does not end the other."""
    async with daemon(path), qmpfd.connect(path) as client:
        with Pipe() as pipe:
            async with client.watch_fdsets() as events:
                async with client.watch_fdsets():
                    pass
                await client.add_fd(pipe)
                assert (await anext(events)).name == "FD_ADDED"


async def test_the_client_knows_when_the_daemon_ends(path: Path) -> None:
    async with daemon(path) as server, qmpfd.connect(path) as client:
        with pytest.raises(trio.BrokenResourceError):  # noqa: PT012 - out of the block
            async with client.watch_fdsets() as events:
                server.stop()
                await anext(events)
