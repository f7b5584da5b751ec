"""Streamed replies: encoded in steps, between which others are served and the store changes.

Tests of protocol/streamed_reply.py.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
from helpers import Pipe, Wire, daemon, error, pipes, request, value
from outcome import Value
from trio.testing import MockClock

import qmpfd
from qmpfd.commands import DECODER, TABLE, Context, SharedState
from qmpfd.commands.listings import Listing, SavedListing, listing
from qmpfd.commands.selectors import Selector
from qmpfd.fdsets import Peer, StoredFd
from qmpfd.kernel.close_pool import ClosePool
from qmpfd.kernel.fd import Fd, close_all
from qmpfd.kernel.hangups import Hangups
from qmpfd.policy import EVERYTHING, Access, Grant
from qmpfd.protocol.encode import JSONStream, RawJSON
from qmpfd.protocol.server import ServerConnection
from qmpfd.protocol.streamed_reply import StreamedReply

COMMANDS = ["query-fdsets", "query-fds"]


class Counting(Access):
    """Access rights that count their checks, one for each descriptor visited."""

    looks = 0

    def may(self, right: Any, fdset_id: int, opaque: str | None) -> bool:
        type(self).looks += 1
        return super().may(right, fdset_id, opaque)


@contextmanager
def core(access: Access = EVERYTHING) -> Iterator[Context]:
    """Yield the context of a connection to a daemon without I/O, whose clock stands still."""

    def unused() -> None:
        raise AssertionError

    made = SharedState("spec", qmpfd.Limits(), lambda: 10.0, unused, TABLE, ClosePool(), Hangups())
    connection = ServerConnection(DECODER)
    try:
        yield Context(made, connection, Peer(1, 1, 1), access, lambda: False)
    finally:
        close_all(stored.fd for stored in made.store.everything())
        made.closer.shut_down()
        made.hangups.close()


def fill(shared: SharedState, count: int, *, each: int = 1, opaque: str | None = None) -> None:
    """Add *count* descriptors, *each* to a set."""
    number = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
    for n in range(count):
        shared.add([Fd(os.dup(number))], n // each, opaque, create=True, now=n // 7 / 1000)
    os.close(number)


def bits(context: Context, command: str) -> JSONStream | RawJSON:
    """Return the value of a command."""
    return listing(context, None if command == "query-fdsets" else Selector())


def numbers(listing: Any) -> list[int]:
    """Return the numbers of the listed descriptors."""
    return [fd["fd"] for entry in listing for fd in entry.get("fds", [entry])]


# -- limits of a step --------------------------------------------------------------------------


@pytest.mark.parametrize("each", [1, 5000])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_step_visits_few_descriptors(command: str, each: int) -> None:
    """A step visits few descriptors, with and without a policy, of many sets or large ones."""
    with core(Counting((Grant(frozenset({"query"})),))) as context:
        fill(context.shared, 1000, each=each)
        listing = bits(context, command)
        assert isinstance(listing, JSONStream)
        most, text = 0, b""
        while True:
            Counting.looks = 0
            bit = next(listing.bits, None)
            if bit is None:
                break
            most = max(most, Counting.looks)
            text += bit
        assert 10 < most <= 300
        assert len(numbers(json.loads(text))) == 1000


@pytest.mark.parametrize("command", COMMANDS)
def test_a_step_encodes_little(command: str) -> None:
    """A step encodes at most one long opaque text."""
    with core() as context:
        fill(context.shared, 50, opaque="x" * 100_000)
        listing = bits(context, command)
        assert isinstance(listing, JSONStream)
        assert max(map(len, listing.bits)) < 110_000


def test_what_is_kept_of_a_listing_is_little() -> None:
    """A listing under way holds no copies of the texts, which may be six times as long escaped."""
    with core() as context:
        store = context.shared.store
        fill(context.shared, 300, opaque="\x01" * 200)
        fill(context.shared, 300, each=300, opaque="x")
        for _ in range(2):
            listing = bits(context, "query-fdsets")
            assert isinstance(listing, JSONStream)
            text = b"".join(listing.bits)
            assert len(numbers(json.loads(text))) == 600
        assert sum(len(fdset.listing or b"") for fdset in store) < 300 * 512


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("count", [0, 1, 300])
def test_nothing_may_be_seen(command: str, count: int) -> None:
    with core(Access((Grant(frozenset({"query"}), frozenset({9999})),))) as context:
        fill(context.shared, count)
        listing = bits(context, command)
        text = listing if isinstance(listing, RawJSON) else b"".join(listing.bits)
        assert text == b"[]"


# -- changes meanwhile -------------------------------------------------------------------------


@pytest.mark.parametrize("each", [1, 100, 5000])
@pytest.mark.parametrize("command", COMMANDS)
def test_what_goes_and_what_comes(command: str, each: int) -> None:
    """Descriptors that stay are listed once, removed ones not, though numbers are reused."""
    with core() as context:
        store = context.shared.store
        fill(context.shared, 2000, each=each)
        everything = [stored for fdset in store for stored in fdset.fds.values()]
        listing = bits(context, command)
        assert isinstance(listing, JSONStream)
        text = next(listing.bits)
        shown = text.count(b'"fd":')
        assert shown < 1000
        gone: list[StoredFd] = everything[::3]
        remaining = [stored for n, stored in enumerate(everything) if n % 3]
        closed: list[Fd] = []
        context.shared.remove(gone, "removed", closed)
        close_all(closed)
        reused = {stored.fd.fileno() for stored in remaining}
        fill(context.shared, 500, each=1)  # reuses the numbers
        text += b"".join(listing.bits)
        found = numbers(json.loads(text))
        assert [number for number in found[shown:] if number in reused] == [
            stored.fd.fileno() for stored in remaining if stored in everything[shown:]
        ]
        if command == "query-fds":
            for entry in json.loads(text):
                assert entry["target"] == "/dev/null"


def test_a_reused_number_is_not_listed() -> None:
    """A reused number is not listed as the removed descriptor."""
    with core() as context, Pipe() as pipe:
        store = context.shared.store
        fill(context.shared, 1000, opaque="ours")
        listing = bits(context, "query-fds")
        assert isinstance(listing, JSONStream)
        text = next(listing.bits)
        oldest = store.get(0)
        assert oldest is not None
        [stored] = oldest.fds.values()
        number = stored.fd.fileno()
        context.shared.remove([stored], "removed", [])
        stored.fd.close()
        os.dup2(pipe.fileno(), number)  # another descriptor, in no set
        try:
            text += b"".join(listing.bits)
        finally:
            os.close(number)
        assert number not in numbers(json.loads(text))
        assert b"pipe" not in text


@pytest.mark.parametrize("each", [1, 5000])
def test_a_walk_ends(each: int) -> None:
    """An iteration ends, though descriptors are added all the time."""
    with core() as context:
        store = context.shared.store
        fill(context.shared, 600, each=each)
        count = 0
        number = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
        for fdset in store.iter_stable():
            for _ in fdset.iter_stable(10.0):
                count += 1
                context.shared.add([Fd(os.dup(number))], fdset.id, now=11.0)
                assert count <= 600
        os.close(number)
        assert count == 600


# -- over a connection -------------------------------------------------------------------------


async def fill_by(client: qmpfd.Client, pipe: Pipe, sets: int, **arguments: Any) -> None:
    for _ in range(sets):
        await client.add_fds([pipe] * 250, **arguments)


@pytest.mark.parametrize("command", COMMANDS)
async def test_others_are_served_meanwhile(command: str, path: Path) -> None:
    """Light clients get many replies while one listing is encoded."""
    async with daemon(path), qmpfd.connect(path) as client:
        with Pipe() as pipe, await Wire.session(path) as wire, await Wire.session(path) as other:
            await fill_by(client, pipe, 16, opaque="\u20ac" * 200)
            answers = 0
            wire.send(request(command, id="long"))
            async with trio.open_nursery() as nursery:

                async def ask() -> None:
                    nonlocal answers
                    while True:
                        value(await other.call("query-name"))
                        answers += 1

                nursery.start_soon(ask)
                reply = await wire.reply()
                nursery.cancel_scope.cancel()
            assert reply["id"] == "long"
            assert len(numbers(value(reply))) == 4000
            assert answers >= 10


@pytest.mark.parametrize("command", COMMANDS)
async def test_replies_stay_in_order(command: str, path: Path) -> None:
    """Replies before and behind a listing, and events, keep their order."""
    async with daemon(path), qmpfd.connect(path) as client:
        with pipes(1) as [pipe], await Wire.session(path) as wire:
            await fill_by(client, pipe, 8)
            value(await wire.call("watch-fdsets", {"enable": True}))
            for n in range(5):
                wire.send(request("query-name", id=2 * n) + request(command, id=2 * n + 1))
            for _ in range(20):
                await client.add_fd(pipe)
                await client.remove_fd(8)
            lines = await wire.replies(50)
            assert [line["id"] for line in lines if "id" in line] == list(range(10))
            assert [line["event"] for line in lines if "event" in line] == [
                "FD_ADDED",
                "FD_REMOVED",
            ] * 20


async def test_a_client_that_does_not_read_a_listing(path: Path, autojump_clock: MockClock) -> None:
    """A client that does not read a listing is disconnected; it delays no other."""
    async with daemon(path), qmpfd.connect(path) as client:
        with pipes(1) as [pipe]:
            await fill_by(client, pipe, 8, opaque="x" * 2000)
            with await Wire.session(path) as wire:
                wire.send(request("query-fds") * 3)
                await trio.sleep(29)
                assert (await client.execute("query-stats"))["connections"] == 2
                assert len(await client.query_fdsets()) == 8
                await trio.sleep(2)
                assert (await client.execute("query-stats"))["connections"] == 1
                assert await wire.drain()


async def test_a_listing_longer_than_the_limit_on_unsent_replies(path: Path) -> None:
    """A client that reads gets a listing longer than the limit on unsent replies."""
    async with daemon(path), qmpfd.connect(path) as client:
        with pipes(1) as [pipe]:
            await fill_by(client, pipe, 1, opaque="\x01" * 16_000)
            listed: Any = await client.execute("query-fdsets")
            assert len(json.dumps(listed)) > 16 << 20
            fdset: Any = listed[0]
            assert all(fd["opaque"] == "\x01" * 16_000 for fd in fdset["fds"])


IDS: dict[str, list[Any]] = {
    "empty": [[], {}, [[]], [{}], {"a": {}}],
    "numbers": [list(range(5000)), [1.5, -0.0, 10**18]],
    "nested": [{"a": [{"b": [1, {"c": None}]}, True]}, json.loads("[" * 500 + "]" * 500)],
    "texts": [["\u20ac\U0001f600\x7f\"'\\" * 100], {"\u20ac": "\u20ac"}],
}


@pytest.mark.parametrize("kind", IDS)
async def test_an_id_may_be_anything(kind: str, path: Path) -> None:
    async with daemon(path):
        with await Wire.session(path) as wire, Pipe() as pipe:
            for each in IDS[kind]:
                await wire.send_all(request("query-name", id=each))
                assert await wire.reply() == {"return": {}, "id": each}
                await wire.send_all(request("nonsense", id=each))
                refused = await wire.reply()
                assert (error(refused), refused["id"]) == ("CommandNotFound", each)
            value(await wire.call("add-fd", None, [pipe]))


async def test_a_descriptor_comes_with_a_long_id(path: Path) -> None:
    """The descriptor comes with the first byte of its reply, also if the id is long."""
    async with daemon(path), qmpfd.connect(path) as client:
        with await Wire.session(path) as wire, Pipe() as pipe:
            await client.add_fd(pipe)
            long = list(range(10_000))
            await wire.send_all(request("query-name", id=1))
            await wire.send_all(request("open-fdset", {"fdset-id": 0}, id=long))
            await trio.testing.wait_all_tasks_blocked()
            first = await wire.line()
            assert first is not None
            assert json.loads(first)["id"] == 1


async def test_an_id_is_echoed_step_by_step(path: Path) -> None:
    """An id of 1 MiB is echoed in steps, while others are served."""
    async with daemon(path):
        with await Wire.session(path) as wire, await Wire.session(path) as other:
            connection = ServerConnection(DECODER)
            whole: list[list[Any]] = [[]] * 100_000
            steps = list(connection.streamed_reply(Value({}), whole))
            assert max(map(len, steps)) < 4096
            async with trio.open_nursery() as nursery:
                nursery.start_soon(wire.send_all, request("query-name", id=whole))
                value(await other.call("query-name"))
                assert await wire.reply() == {"return": {}, "id": whole}


async def test_many_at_once_take_turns(path: Path) -> None:
    """Several listings take turns: between two passes of the event loop, only one step is done."""
    async with daemon(path), qmpfd.connect(path) as client:
        with Pipe() as pipe:
            await fill_by(client, pipe, 4)
            wires = [await Wire.session(path) for _ in range(10)]
            passes = 0

            class Passes(trio.abc.Instrument):
                def before_io_wait(self, timeout: float) -> None:
                    nonlocal passes
                    passes += 1

            instrument = Passes()
            trio.lowlevel.add_instrument(instrument)
            for wire in wires:
                wire.send(request("query-fds"))
            for wire in wires:
                assert len(numbers(value(await wire.reply()))) == 1000
                wire.close()
            trio.lowlevel.remove_instrument(instrument)
            assert passes >= 2 * len(wires)


# -- continued by a successor ------------------------------------------------------------------


def resumed(context: Context, reply: StreamedReply) -> StreamedReply:
    """Return the reply as a successor with the same store continues it."""
    assert isinstance(reply.result, Listing)
    saved, opaque = reply.result.save(context.shared.clock())
    packed = msgspec.msgpack.encode(saved)
    again = msgspec.msgpack.decode(packed, type=SavedListing)
    listing = Listing(context, again.query, context.shared.clock() - again.age)
    listing.restore(again, opaque)
    return StreamedReply(reply.members, listing, reply.written)


@pytest.mark.parametrize("access", [EVERYTHING, Access((Grant(frozenset({"query"})),))])
@pytest.mark.parametrize("each", [1, 90, 5000])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_successor_continues_a_listing(command: str, each: int, access: Access) -> None:
    """A successor continues a listing from any step, with the same text."""
    with core(access) as context:
        fill(context.shared, 600, each=each)
        context.shared.add([Fd(os.dup(2))], 9999, "\N{SNOWMAN}" * 20_000, create=True, now=5.0)
        context.shared.add([Fd(os.dup(2))], 9999, "y" * 5000, now=5.0)

        def reply() -> StreamedReply:
            listing = bits(context, command)
            assert isinstance(listing, JSONStream)
            return StreamedReply({"id": "x" * 10_000}, listing)

        whole = list(reply())
        assert json.loads(b"".join(whole))["id"]
        assert len(whole) > 10
        for taken in range(len(whole)):
            first = reply()
            text = b"".join(islice(first, taken))
            assert text + b"".join(resumed(context, first)) == b"".join(whole)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_listing_continues_after_a_failed_takeover(command: str) -> None:
    """After a failed takeover, a new iteration continues where the last one has stopped."""
    with core() as context:
        fill(context.shared, 3000, each=1)

        def reply() -> StreamedReply:
            listing = bits(context, command)
            assert isinstance(listing, JSONStream)
            return StreamedReply({"id": "x" * 10_000}, listing)

        whole = list(reply())
        assert len(whole) > 5
        for taken in range(len(whole)):
            first = reply()
            text = b"".join(islice(first, taken))
            assert text + b"".join(first) == b"".join(whole)


@pytest.mark.parametrize("each", [1, 40, 5000])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_listing_goes_on_after_changes(command: str, each: int) -> None:
    """A successor leaves out removed descriptors, also in a set that is partly listed."""
    with core() as context:
        store = context.shared.store
        fill(context.shared, 800, each=each)
        everything = [stored for fdset in store for stored in fdset.fds.values()]
        listing = bits(context, command)
        assert isinstance(listing, JSONStream)
        first = StreamedReply({}, listing)
        text = b"".join(islice(first, 2))
        shown = text.count(b'"fd":')
        assert 0 < shown < 400
        gone = everything[::3]
        closed: list[Fd] = []
        context.shared.remove(gone, "removed", closed)
        close_all(closed)
        text += b"".join(resumed(context, first))
        found = numbers(json.loads(text)["return"])[shown:]
        left = {stored.fd.number for stored in everything if not stored.removed}
        assert set(found) <= left
        assert len(found) == len(set(found))
        assert 800 - len(gone) - shown <= len(found) < 800 - shown


def test_the_text_of_a_value_goes_on_elsewhere() -> None:
    """A successor continues the text of a long value or id from any step."""
    members = {"return": [{"n": n, "x": "\x01" * n} for n in range(300)], "id": ["y" * 9000, 1.5]}
    whole = list(StreamedReply(members))
    for taken in range(len(whole)):
        first = StreamedReply(members)
        text = b"".join(islice(first, taken))
        assert text + b"".join(StreamedReply(members, None, first.written)) == b"".join(whole)
