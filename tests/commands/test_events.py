"""``watch-fdsets``: the events, and clients that do not read them."""

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

#: Upper bound of the bytes in both buffers of a Unix socket: Linux doubles SO_SNDBUF.
SOCKET_BYTES = 1 << 20


async def watching(path: Path) -> Wire:
    """Connect and enable events."""
    wire = await Wire.session(path)
    assert value(await wire.call("watch-fdsets", {"enable": True})) == {}
    return wire


async def told_nothing_else(wire: Wire) -> None:
    """Check that no event is pending: the next line is the reply to the next request."""
    await settle()
    assert "return" in await wire.call("query-name")


# -- the events --------------------------------------------------------------------------------


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
    """One event for each descriptor, in the order of the listing."""
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
    """The reason of each kind of removal."""
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
                await other.execute("getfd", {"fdname": "x"}, fds=made[:1])  # no event
            here, there = socket.socketpair()
            with here, there:
                await client.add_fds([here], watch_hangup=True)
                there.close()
                assert await reason() == "hangup"


async def test_no_events_without_watch_fdsets(path: Path) -> None:
    """No events without watch-fdsets, for failed commands, or for queries."""
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


async def test_no_events_for_earlier_descriptors(path: Path) -> None:
    async with daemon(path):
        with await Wire.session(path) as wire, Pipe() as pipe:
            value(await wire.call("add-fd", None, [pipe]))
            value(await wire.call("watch-fdsets", {"enable": True}))
            await told_nothing_else(wire)


async def test_enable_and_disable(path: Path) -> None:
    """Enabling twice has no effect; no event follows the reply to disable."""
    async with daemon(path):
        with await Wire.session(path) as wire, await Wire.session(path) as other, Pipe() as pipe:
            for enable in (False, True, True):
                assert value(await wire.call("watch-fdsets", {"enable": enable})) == {}
            value(await other.call("add-fd", None, [pipe]))
            assert (await wire.reply())["event"] == "FD_ADDED"
            await told_nothing_else(wire)
            for _ in range(3):  # an event is pending at the disable
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
    """All watchers get all events, in the same order."""
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
    """Events are whole lines between replies."""
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


# -- watchers that do not read -----------------------------------------------------------------


async def churn(client: qmpfd.Client, pipe: Pipe, rounds: int) -> int:
    """Add and remove descriptors; return the number of events."""
    for _ in range(rounds):
        info = await client.add_fds([pipe] * 250)
        await client.remove_fd(info.fdset_id)
    return rounds * 500


async def test_a_slow_watcher_gets_the_number_of_lost_events(path: Path) -> None:
    """A slow watcher gets the events in order, with FD_EVENTS_LOST in the place of lost ones."""
    async with daemon(path), qmpfd.connect(path) as client:
        with await watching(path) as wire, Pipe() as pipe:
            made = await churn(client, pipe, 60)
            delivered = lost = losses = 0
            while delivered + lost < made:
                event = await wire.reply()
                if event["event"] == "FD_EVENTS_LOST":
                    assert event["data"].keys() == {"count"}
                    assert event["data"]["count"] > 0
                    lost += event["data"]["count"]
                    losses += 1
                    continue
                if not losses:  # before the first loss nothing is missing
                    expected = "FD_ADDED" if delivered % 500 < 250 else "FD_REMOVED"
                    assert event["event"] == expected
                delivered += 1
            assert delivered + lost == made
            assert lost > 0
            assert delivered >= MAX_EVENTS
            await told_nothing_else(wire)
            await client.add_fd(pipe)
            assert (await wire.reply())["event"] == "FD_ADDED"


async def test_long_texts_do_not_fill_the_daemon(path: Path) -> None:
    """Queued events are limited in bytes too."""
    long = "x" * 20_000
    async with daemon(path), qmpfd.connect(path) as client:
        with await watching(path) as wire, Pipe() as pipe:
            for _ in range(2):
                info = await client.add_fds([pipe] * 250, opaque=long)
                await client.remove_fd(info.fdset_id)
            await settle()
            delivered = lost = size = 0
            while delivered + lost < 1000:
                line = await wire.line()
                assert line is not None
                size += len(line)
                event = json.loads(line)
                if event["event"] == "FD_EVENTS_LOST":
                    lost += event["data"]["count"]
                else:
                    assert event["data"]["opaque"] == long
                    delivered += 1
            # In the socket, in the send buffer, and in the queue.
            assert size < SOCKET_BYTES + 2 * MAX_EVENT_BYTES


async def test_the_longest_text_of_all(path: Path) -> None:
    """Events with the longest possible opaque text, six times as long as the request, arrive."""
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
    """Return an event of *size* bytes for the descriptor *number*."""
    return Event.now("FD_ADDED", FdAdded(0, number, "x" * ((size - 256) // 6) or None))


def queued(watcher: Watcher) -> list[Any]:
    """Return the queued events of a watcher: descriptors, and numbers of lost events."""
    lines = b"".join(iter(watcher.next_batch, b"")).splitlines()
    data = [json.loads(line)["data"] for line in lines]
    return [each["fd"] if "fd" in each else f"{each['count']} lost" for each in data]


def test_the_newest_are_kept() -> None:
    """Each watcher has its own count of lost events, in their place."""
    log = EventLog(EVERYTHING)
    first = Watcher(log, lambda: False)
    long = MAX_EVENT_BYTES // 2
    for each in (event(1), event(2, long)):
        log.put(each)
    second = Watcher(log, lambda: False)
    assert queued(second) == []
    for each in (event(3, long), event(4)):
        log.put(each)
    assert queued(first) == ["2 lost", 3, 4]
    assert queued(first) == []
    assert queued(second) == [3, 4]
    log.put(event(5))
    log.put(event(6, 2 * long))  # a single event may exceed the limit
    assert queued(first) == queued(second) == ["1 lost", 6]


def test_as_many_as_there_may_be() -> None:
    log = EventLog(EVERYTHING)
    watcher = Watcher(log, lambda: False)
    for number in range(MAX_EVENTS + 3):
        log.put(event(number))
    assert queued(watcher) == ["3 lost", *range(3, MAX_EVENTS + 3)]


def test_a_batch_of_events_is_limited() -> None:
    """A watcher takes a limited batch of events at a time."""
    log = EventLog(EVERYTHING)
    watcher = Watcher(log, lambda: False)
    for number in range(MAX_EVENTS):
        log.put(event(number))
    takes = list(iter(watcher.next_batch, b""))
    assert sum(take.count(b"FD_ADDED") for take in takes) == MAX_EVENTS
    assert max(map(len, takes)) < EVENT_BYTES_A_TURN + 200


def test_a_change_costs_the_same_however_many_watch() -> None:
    """An event is stored once, checked once for each set of rights, and announced by one call."""
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


async def test_a_policy_change_applies_to_queued_events(path: Path) -> None:
    """After a policy change, a watcher gets queued events by its new rights, without a count of
    those that it may not see any more.
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


async def test_a_watcher_that_does_not_read_delays_no_other(path: Path) -> None:
    """A watcher that does not read delays no other; its own replies follow the sent events."""
    async with daemon(path), qmpfd.connect(path) as client:
        with await watching(path) as deaf, await watching(path) as wire, Pipe() as pipe:
            await churn(client, pipe, 30)
            assert len(await client.query_fdsets()) == 0
            for _ in range(100):
                assert (await wire.reply())["event"] == "FD_ADDED"
            deaf.send(request("query-name", id="here"))
            while (await deaf.reply()).get("id") != "here":
                pass


async def test_a_watcher_that_does_not_read_is_disconnected(
    path: Path, autojump_clock: MockClock
) -> None:
    """A watcher that does not read is disconnected after the write timeout."""
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
async def test_a_watcher_ends_with_unread_events(path: Path, how: str) -> None:
    """A watcher ends with unread and queued events: nothing leaks, other clients are served."""
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
    """The idle timeout does not apply to watchers, which send no requests."""
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


# -- the client library ------------------------------------------------------------------------


async def test_the_client_begins_afresh(path: Path) -> None:
    """A second watch block does not get events that the first has left unread."""
    async with daemon(path), qmpfd.connect(path) as client:
        with pipes(3) as made:
            async with client.watch_fdsets():
                await client.add_fd(made[0], opaque="first")
            await client.add_fd(made[1], opaque="second")
            async with client.watch_fdsets() as events:
                await client.add_fd(made[2], opaque="third")
                assert (await anext(events)).data["opaque"] == "third"


async def test_two_blocks_at_a_time(path: Path) -> None:
    """The end of one watch block does not end another."""
    async with daemon(path), qmpfd.connect(path) as client:
        with Pipe() as pipe:
            async with client.watch_fdsets() as events:
                async with client.watch_fdsets():
                    pass
                await client.add_fd(pipe)
                assert (await anext(events)).name == "FD_ADDED"


async def test_the_client_knows_when_the_daemon_ends(path: Path) -> None:
    async with daemon(path) as server, qmpfd.connect(path) as client:
        with pytest.raises(trio.BrokenResourceError):  # noqa: PT012 - raised by the block
            async with client.watch_fdsets() as events:
                server.stop()
                await anext(events)
