"""Which command gets which descriptor, however the kernel joins and splits the sends."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import pytest
from fake_kernel import BUFFER_BYTES, FakeQueue, Queue, SocketQueue, Tags, read_once
from hypothesis import example, given, settings
from hypothesis import strategies as st
from msgspec import UNSET, Struct, UnsetType
from outcome import Error

from qmpfd.errors import QMPError
from qmpfd.kernel.fd import Fd, close_all
from qmpfd.limits import READ_BYTES, SCM_MAX_FD, SLOW_PATH_BYTES
from qmpfd.protocol.client import ClientConnection, Reply
from qmpfd.protocol.connection import State
from qmpfd.protocol.request_decoder import RequestDecoder, Spec
from qmpfd.protocol.server import ServerConnection


class Anything(Struct, forbid_unknown_fields=True):
    pad: str | UnsetType = UNSET


class Number(Struct, forbid_unknown_fields=True):
    number: int


DECODER = RequestDecoder(
    {
        "qmp_capabilities": Spec(Anything, fds=0),
        "take": Spec(Anything, fds=1),
        "take-all": Spec(Anything, fds=SCM_MAX_FD),
        "take-checked": Spec(Number, fds=1),
        "look": Spec(Anything, fds=0),
    }
)

#: Result of a request: its id, and the files that it got or the text of its error.
Result = tuple[Any, list[int] | str]

TAGS = 12


@pytest.fixture(scope="module")
def tags() -> Iterator[Tags]:
    tags = Tags(TAGS)
    yield tags
    tags.close()


class Server:
    """The server's end of a connection, and the result of each request."""

    def __init__(self, queue: Queue, tags: Tags, *, max_request_bytes: int = 1 << 20) -> None:
        self.queue = queue
        self.connection = ServerConnection(DECODER, max_request_bytes=max_request_bytes)
        self.connection.greeting({})
        self.connection.negotiate([])
        self.results: list[Result] = []
        self._tags = tags

    def send(self, data: bytes, *tags: int) -> None:
        self.queue.send(data, [self._tags[tag] for tag in tags])

    def read(self, most: int = 1) -> bool:
        """Read at most *most* times and execute; return False if the queue was empty."""
        if not self.receive(most):
            return False
        for request, sent_id, fds in iter(self.connection.next_request, None):
            request_id = None if sent_id is UNSET else sent_id
            if isinstance(request, Error):
                assert isinstance(request.error, QMPError)
                assert not fds
                self.results.append((request_id, request.error.desc))
            else:
                self.results.append((request_id, [self._tags.which(fd) for fd in fds]))
                close_all(fds)
        self.close_fds()
        return True

    def receive(self, most: int) -> bool:
        """Read at most *most* times; return False if the queue was empty."""
        if not read_once(self.queue, self.connection):
            return False
        for _ in range(most - 1):
            read_once(self.queue, self.connection)
        return True

    def read_all(self, at_once: int = 1) -> list[Result]:
        while self.read(at_once):
            pass
        return self.results

    def close_fds(self) -> None:
        close_all(self.connection.fds_to_close)
        self.connection.fds_to_close.clear()

    def close(self) -> None:
        if self.connection.state is not State.CLOSED:
            self.connection.close()
        self.close_fds()
        self.queue.close()


@pytest.fixture(params=[FakeQueue, SocketQueue], ids=["fake", "kernel"])
def server(request: pytest.FixtureRequest, tags: Tags) -> Iterator[Server]:
    server = Server(request.param(), tags)
    yield server
    server.close()


def take(number: int) -> bytes:
    return b'{"execute":"take","id":%d}' % number


def take_slowly(number: int) -> bytes:
    """As ``take``, in a form that needs the slow path."""
    return b"{'execute':'take','id':%d}" % number


def look(number: int) -> bytes:
    return b'{"execute":"look","id":%d}' % number


# -- docs/differences-from-qemu.md, "Which command gets a descriptor" -----------------------------

Command = Callable[[int], bytes]
both_ways = pytest.mark.parametrize("take", [take, take_slowly], ids=["quick", "careful"])


@both_ways
@pytest.mark.parametrize("late", [False, True])
def test_each_command_gets_the_fd_it_was_sent_with(
    server: Server, take: Command, late: bool
) -> None:
    for number in range(TAGS):
        server.send(take(number), number)
        if not late:
            server.read()
    assert server.read_all() == [(number, [number]) for number in range(TAGS)]


@both_ways
def test_command_without_an_fd_joined_to_one_with(server: Server, take: Command) -> None:
    server.send(take(1))
    server.send(take(2), 5)
    assert server.read_all() == [(1, []), (2, [5])]


@both_ways
def test_other_commands_before_and_after_joined(server: Server, take: Command) -> None:
    server.send(look(1) + look(2))
    server.send(take(3), 7)
    server.send(look(4) + take(5))
    assert server.read_all() == [(1, []), (2, []), (3, [7]), (4, []), (5, [])]


@both_ways
def test_two_commands_and_two_fds_in_one_send(server: Server, take: Command) -> None:
    server.send(take(1) + b"\r\n" + take(2), 3, 4)
    assert server.read_all() == [(1, [3]), (2, [4])]


@both_ways
def test_two_commands_and_two_fds_with_others_between(server: Server, take: Command) -> None:
    server.send(look(1) + take(2) + look(3) + take(4) + take(5) + look(6), 3, 4)
    expected = [(1, []), (2, [3]), (3, []), (4, [4]), (5, []), (6, [])]
    assert server.read_all() == expected


@both_ways
@pytest.mark.parametrize("joined", [False, True])
def test_surplus_fds_are_closed(server: Server, take: Command, joined: bool) -> None:
    server.send(take(1), 1, 2, 3)
    if not joined:
        server.read_all()
    server.send(take(2))
    assert server.read_all() == [(1, [1]), (2, [])]


@both_ways
@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("blank", [b" ", b"\r\n", b"\t\t"])
def test_fd_on_a_blank_waits_for_a_command_that_takes_one(
    server: Server, take: Command, joined: bool, blank: bytes
) -> None:
    server.send(blank, 6)
    if not joined:
        server.read_all()
    server.send(look(1) + look(2))
    if not joined:
        server.read_all()
    server.send(take(3) + take(4))
    assert server.read_all() == [(1, []), (2, []), (3, [6]), (4, [])]


@both_ways
@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("cut", [1, 10, 20, -1])
def test_fd_on_the_first_half_of_a_command(
    server: Server, take: Command, joined: bool, cut: int
) -> None:
    server.send(take(1)[:cut], 8)
    if not joined:
        server.read_all()
    server.send(take(1)[cut:] + take(2))
    assert server.read_all() == [(1, [8]), (2, [])]


@both_ways
@pytest.mark.parametrize("cut", [1, 10, 20, -1])
def test_fd_on_the_second_half_of_a_command(server: Server, take: Command, cut: int) -> None:
    server.send(take(1)[:cut])
    server.send(take(1)[cut:] + take(2), 8)
    assert server.read_all() == [(1, [8]), (2, [])]


@both_ways
@pytest.mark.parametrize("joined", [False, True])
def test_fd_on_half_of_a_command_that_takes_none(
    server: Server, take: Command, joined: bool
) -> None:
    server.send(look(1)[:9], 8)
    if not joined:
        server.read_all()
    server.send(look(1)[9:])
    server.send(take(2))
    assert server.read_all() == [(1, []), (2, [8])]


@both_ways
def test_two_fds_and_the_second_command_not_all_in_the_send(server: Server, take: Command) -> None:
    server.send(take(1) + take(2)[:10], 3, 4)
    server.send(take(2)[10:] + take(3))
    assert server.read_all() == [(1, [3]), (2, [4]), (3, [])]


@both_ways
@pytest.mark.parametrize("reads", [False, True])
def test_blank_and_fd_then_command_over_and_over(
    server: Server, take: Command, reads: bool
) -> None:
    """Blank with descriptor, then command, as qemu.qmp sends them, joined by the kernel."""
    for number in range(TAGS):
        server.send(b" ", number)
        server.send(take(number))
        if reads:
            server.read()
    assert server.read_all() == [(number, [number]) for number in range(TAGS)]


def test_blank_of_the_next_command_does_not_overtake(server: Server) -> None:
    """A blank with fd 1, then command A and a blank with fd 2 joined: A does not get fd 2."""
    server.send(b" ", 1)
    server.send(take(1))
    server.send(b" ", 2)
    server.send(look(2))
    server.send(take(3))
    assert server.read_all() == [(1, [1]), (2, []), (3, [2])]


@both_ways
@pytest.mark.parametrize("joined", [False, True])
def test_newer_fds_displace_older_ones(server: Server, take: Command, joined: bool) -> None:
    server.send(b" ", 1, 2)
    if not joined:
        server.read_all()
    server.send(look(1), 3)
    server.send(take(2) + take(3))
    assert server.read_all() == [(1, []), (2, [3]), (3, [])]


@pytest.mark.parametrize(
    "refused",
    [
        b'{"execute":"take-checked"}',
        b'{"execute":"take-checked","arguments":{"number":"1"}}',
        b'{"execute":"take","arguments":{"unknown":1}}',
        b'{"execute":"take","arguments":[]}',
        b'{"execute":"take","unknown":1}',
        b'{"execute":"take" "id":1}',
        b'{"execute":"take",}',
        b'{"execute":"take","execute":"take"}',
        b'{"execute":"take","id":@',
        b'{"execute":"take","id":"\\ud800"}',
    ],
)
@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("blank", [False, True])
def test_fd_of_a_refused_command_is_closed(
    server: Server, refused: bytes, joined: bool, blank: bool
) -> None:
    if blank:
        server.send(b" ", 1)
        server.send(refused)
    else:
        server.send(refused, 1)
    if not joined:
        server.read_all()
    server.send(b"\n" + take(9))
    assert server.read_all()[-1] == (9, [])
    assert all(isinstance(outcome, str) for _, outcome in server.results[:-1])


@both_ways
@pytest.mark.parametrize("broken", [b"nan", b"@", b"}", b"{,}", b'"\x01', b"[1,]"])
@pytest.mark.parametrize("joined", [False, True])
def test_a_broken_text_before_does_not_cost_the_next_command_its_fd(
    server: Server, take: Command, broken: bytes, joined: bool
) -> None:
    server.send(broken)
    if not joined:
        server.read_all()
    server.send(take(1), 4)
    server.send(take(2))
    assert server.read_all()[-2:] == [(1, [4]), (2, [])]


def test_pending_fds_are_closed_with_the_connection(server: Server, tags: Tags) -> None:
    server.send(b" ", 1, 2)
    server.read_all()
    server.send(look(1), 3)
    read_once(server.queue, server.connection)  # received, and taken by no request
    server.connection.close()
    assert sorted(map(tags.which, server.connection.fds_to_close)) == [1, 2, 3]
    assert server.connection.state is State.CLOSED


@pytest.mark.parametrize("joined", [False, True])
def test_requests_never_taken_leave_no_descriptors(
    server: Server, tags: Tags, joined: bool
) -> None:
    """After ``quit``, pipelined requests are not executed, and their descriptors are closed."""
    if joined:
        server.send(look(1) + take(2))
        server.send(take(3), 1, 2)
    else:
        server.send(look(1) + take(2), 1, 2)
    read_once(server.queue, server.connection)
    requests = iter(server.connection.next_request, None)
    _, request_id, _ = next(requests)
    assert request_id == 1
    del requests
    server.connection.close()
    assert sorted(map(tags.which, server.connection.fds_to_close)) == [1, 2]


def test_all_fds_of_a_message_for_a_command_that_takes_many(server: Server) -> None:
    server.send(b'{"execute":"take-all","id":1}' + take(2), *range(TAGS))
    assert server.read_all() == [(1, list(range(TAGS))), (2, [])]


def test_253_fds_arrive(server: Server) -> None:
    server.send(b'{"execute":"take-all","id":1}', *([3] * SCM_MAX_FD))
    assert server.read_all() == [(1, [3] * SCM_MAX_FD)]


def test_never_more_than_two_messages_of_unclaimed_fds(tags: Tags) -> None:
    """At most two messages' descriptors are open, counted before ``fds_to_close`` is closed."""
    opened = 0

    class Counting(FakeQueue):
        def receive(self, count: int) -> tuple[bytes, list[Fd], str]:
            nonlocal opened
            data, fds, dropped = super().receive(count)
            opened += len(fds)
            return data, fds, dropped

    server = Server(Counting(), tags)
    most = 0
    for data in (b" ", look(1), b"[", look(2), b"]", b" ") * 3:
        server.send(data, *([1] * SCM_MAX_FD))
        assert read_once(server.queue, server.connection)
        most = max(most, opened)
        assert all(fds == [] for _, _, fds in iter(server.connection.next_request, None))
        opened -= len(server.connection.fds_to_close)
        server.close_fds()
    assert most == 2 * SCM_MAX_FD
    server.close()


# -- descriptors that the kernel has dropped ------------------------------------------------------


@pytest.fixture
def short(tags: Tags) -> Iterator[Server]:
    """A server that runs out of descriptors."""
    server = Server(FakeQueue(), tags)
    yield server
    server.close()


def set_room(server: Server, room: int | None) -> None:
    assert isinstance(server.queue, FakeQueue)
    server.queue.room = room


LOST = "File descriptors sent via SCM_RIGHTS were lost: the receiver is out of file descriptors"


@both_ways
@pytest.mark.parametrize("blank", [False, True])
@pytest.mark.parametrize("room", [0, 1])
def test_truncated_control_message(short: Server, take: Command, blank: bool, room: int) -> None:
    set_room(short, room)
    if blank:
        short.send(b" ", 1, 2)
        short.send(look(1) + take(2) + take(3))
    else:
        short.send(look(1) + take(2), 1, 2)
        short.send(take(3))
    assert short.read_all() == [(1, []), (2, LOST), (3, [])]
    assert not short.connection.fds_to_close


def test_truncation_is_forgotten_when_newer_fds_arrive(short: Server) -> None:
    set_room(short, 0)
    short.send(b" ", 1)
    short.read_all()
    set_room(short, None)
    short.send(take(1), 2)
    assert short.read_all() == [(1, [2])]


def test_truncation_of_a_refused_command(short: Server) -> None:
    """A refused command reports its own error, not that its descriptors were dropped."""
    set_room(short, 0)
    short.send(b'{"execute":"take-checked","id":1}', 1)
    short.send(take(2))
    assert short.read_all() == [(1, "Parameter 'number' is missing"), (2, [])]


# -- large segments -------------------------------------------------------------------------------


def padded(command: str, number: int, size: int, *, slowly: bool) -> bytes:
    pad = "x" * size
    text = f'{{"execute":"{command}","id":{number},"arguments":{{"pad":"{pad}"}}}}'
    return (text.replace('"', "'") if slowly else text).encode()


@pytest.mark.parametrize("slowly", [False, True])
@pytest.mark.parametrize("size", [SLOW_PATH_BYTES - 60, SLOW_PATH_BYTES, 40_000, 2 * READ_BYTES])
def test_surplus_fds_of_a_long_command_are_closed(server: Server, slowly: bool, size: int) -> None:
    """A segment that is read in several steps keeps its exact end."""
    server.send(padded("take", 1, size, slowly=slowly), 1, 2)
    server.send(take(2))
    server.send(take(3), 3)
    assert server.read_all() == [(1, [1]), (2, []), (3, [3])]


@pytest.mark.parametrize("slowly", [False, True])
def test_fds_in_order_in_a_long_segment(server: Server, slowly: bool) -> None:
    data = padded("take", 1, SLOW_PATH_BYTES, slowly=slowly)
    data += padded("look", 2, SLOW_PATH_BYTES, slowly=slowly) + take(3)
    server.send(data, 1, 2, 3)
    server.send(take(4))
    assert server.read_all() == [(1, [1]), (2, []), (3, [2]), (4, [])]


def test_a_long_segment_of_many_lines(server: Server) -> None:
    """All commands of a segment get its descriptors in order, over any number of reads."""
    count = 1000
    between = b"".join(look(number) + b"\n" for number in range(count))
    server.send(take(1) + b"\n" + between + take(2), 1, 2)
    looked: list[Result] = [(number, []) for number in range(count)]
    assert server.read_all() == [(1, [1]), *looked, (2, [2])]


@pytest.mark.parametrize("slowly", [False, True])
@pytest.mark.parametrize("ahead", [READ_BYTES - 200, READ_BYTES - 101, READ_BYTES - 1, READ_BYTES])
def test_segment_across_the_end_of_what_is_looked_at(
    server: Server, slowly: bool, ahead: int
) -> None:
    """With much data queued before it, a peek shows only the start of a segment with fds."""
    lead = padded("look", 1, 20_000, slowly=slowly)
    server.send(lead)
    server.send(b" " * (BUFFER_BYTES - 1))
    server.send(b" " * (ahead - len(lead) - BUFFER_BYTES + 1))
    server.send(take(2) + b" " * 100 + take(3) + look(4) + take(5), 1, 2, 3)
    server.send(take(6))
    expected: list[Result] = [(1, []), (2, [1]), (3, [2]), (4, []), (5, [3]), (6, [])]
    assert server.read_all() == expected


# -- random sends, compared with the rule ---------------------------------------------------------

Kind = Literal["take", "take-all", "look", "broken", "number", "blank"]

MOST = {"take": 1, "take-all": SCM_MAX_FD, "look": 0, "number": 0}


@dataclass
class Item:
    """A message, or blanks between two."""

    kind: Kind
    text: str  # %d: the item's number

    def data(self, number: int) -> bytes:
        return self.text.replace("%d", str(number)).encode()


ITEMS = [
    Item("take", '{"execute":"take","id":%d}'),
    Item("take", '{"execute":"take","id":%d}\r\n'),
    Item("take", "{'execute':'take','id':%d}"),
    Item("take", '{"execute": "take", "arguments": {"pad": "a{[:,\\u0041"}, "id": %d}'),
    Item("take-all", '{"execute":"take-all","id":%d}'),
    Item("look", '{"execute":"look","id":%d}'),
    Item("look", "\n{'execute':'look','id':%d}"),
    Item("broken", '{"execute":"take",}'),
    Item("broken", "nan"),
    Item("broken", "@\n"),
    Item("broken", "]"),
    Item("number", "7"),
    Item("number", "[]"),
    Item("blank", " "),
    Item("blank", "\r\n"),
]


@dataclass
class Script:
    """Messages, the sends that carry them with their descriptors, and the reads."""

    items: list[Item]
    cuts: list[int]  # offsets in bytes between the sends, ascending
    fds: list[int]  # number of descriptors of each send
    reads: list[int]  # number of reads after each send
    careful_bytes: int = SLOW_PATH_BYTES
    at_once: int = 1  # number of reads before requests are executed
    data: bytes = field(init=False)
    spans: list[tuple[int, int, Kind]] = field(init=False)  # start, end and kind of each message

    def __post_init__(self) -> None:
        data = bytearray()
        self.spans = []
        for number, item in enumerate(self.items):
            text = item.data(number)
            if data[-1:].isalnum() and text[:1].isalnum():
                data += b" "  # separates two words
            begin = len(data) + len(text) - len(text.lstrip())
            data += text
            self.spans.append((begin, begin + len(text.strip()), item.kind))
        self.data = bytes(data) + b"\n"  # the line end completes a number

    def sends(self) -> Iterator[tuple[bytes, list[int], int]]:
        tag = 0
        begins = [0, *self.cuts]
        ends = [*self.cuts, len(self.data)]
        for begin, end, fds, reads in zip(begins, ends, self.fds, self.reads, strict=True):
            yield self.data[begin:end], [t % TAGS for t in range(tag, tag + fds)], reads
            tag += fds

    def expected(self) -> list[tuple[int | None, list[int]]]:
        """Apply the rule to the sends: docs/differences-from-qemu.md, "Which command gets a
        descriptor".

        Returns:
            For each message its number, or None for an error, and its descriptors.
        """
        batches = [fds for _, fds, _ in self.sends()]

        def send_of(offset: int) -> int:
            return sum(cut <= offset for cut in self.cuts)

        results: list[tuple[int | None, list[int]]] = []
        current = -1  # the newest send with descriptors so far
        left: list[int] = []  # its descriptors that no message has taken
        touched = False  # whether a message has taken some of them
        for number, (begin, end, kind) in enumerate(self.spans):
            if kind == "blank":
                continue
            first, last = send_of(begin), send_of(end - 1)
            newest = max((n for n in range(last + 1) if batches[n]), default=-1)
            if newest != current:  # older descriptors are closed
                current, left, touched = newest, batches[newest], False
            sent_with_it = first <= current
            if kind == "broken":
                left = []
            most = MOST.get(kind, 0)
            if touched and not sent_with_it:
                left = []
            got, rest = left[:most], left[most:]
            if most:
                left = rest if sent_with_it else []
                touched = True
            results.append((number if kind in ("take", "take-all", "look") else None, got))
        return results


@st.composite
def scripts(draw: st.DrawFn) -> Script:
    items = draw(st.lists(st.sampled_from(ITEMS), min_size=1, max_size=10))
    size = len(Script(items, [], [0], [0]).data)
    cuts: list[int] = sorted(draw(st.sets(st.integers(1, size - 1), max_size=8)))
    if draw(st.booleans()):  # whole commands, as most clients send them
        edges = {e for b, e, _ in Script(items, [], [0], [0]).spans if 0 < e < size}
        cuts = sorted(draw(st.sets(st.sampled_from(sorted(edges))))) if edges else []
    count = len(cuts) + 1
    fds = draw(st.lists(st.integers(0, 3), min_size=count, max_size=count))
    reads = draw(st.lists(st.integers(0, 2), min_size=count, max_size=count))
    careful = draw(st.sampled_from([SLOW_PATH_BYTES, SLOW_PATH_BYTES, 1, 5, 16]))
    return Script(items, cuts, fds, reads, careful, draw(st.sampled_from([1, 2, 3, 16])))


def carry_out(script: Script, server: Server) -> list[tuple[int | None, list[int]]]:
    with pytest.MonkeyPatch.context() as patch, closing(server):
        patch.setattr("qmpfd.protocol.receive_buffer.SLOW_PATH_BYTES", script.careful_bytes)
        for data, tags, reads in script.sends():
            server.send(data, *tags)
            for _ in range(reads):
                server.read(script.at_once)
        results = server.read_all(script.at_once)
    return [(number, [] if isinstance(got, str) else got) for number, got in results]


_TAKE, _NAN = ITEMS[0], ITEMS[8]
_NAN_THEN_FD = Script([_NAN, _TAKE], [3], [0, 1], [1, 1])
_CAREFUL_SURPLUS = Script([ITEMS[2], _TAKE], [26], [2, 0], [0, 0], 5)


@given(scripts())
@example(_NAN_THEN_FD)
@example(_CAREFUL_SURPLUS)
@settings(max_examples=1500, deadline=None)
def test_any_sends_on_the_fake(tags: Tags, script: Script) -> None:
    assert carry_out(script, Server(FakeQueue(), tags)) == script.expected()


@given(scripts())
@example(_NAN_THEN_FD)
@example(_CAREFUL_SURPLUS)
@settings(max_examples=500, deadline=None)
def test_any_sends_in_the_kernel(tags: Tags, script: Script) -> None:
    assert carry_out(script, Server(SocketQueue(), tags)) == script.expected()


def test_the_reference_is_the_rule() -> None:
    """The rule itself, against results worked out by hand."""
    take, look, blank = ITEMS[0], ITEMS[5], ITEMS[13]
    one = len(take.data(0))

    def of(items: Sequence[Item], cuts: list[int], fds: list[int]) -> list[list[int]]:
        return [got for _, got in Script(list(items), cuts, fds, [0] * len(fds)).expected()]

    assert of([take, take], [one], [1, 1]) == [[0], [1]]
    assert of([take, take], [one], [0, 1]) == [[], [0]]
    assert of([look, take, look], [one, 2 * one], [0, 1, 0]) == [[], [0], []]
    assert of([take, take], [], [2]) == [[0], [1]]
    assert of([take, take], [one], [3, 0]) == [[0], []]
    assert of([blank, look, take], [1], [1, 0]) == [[], [0]]
    assert of([take], [10], [1, 0]) == [[0]]
    assert of([blank, take, blank, take], [1, 1 + one, 2 + one], [1, 0, 1, 0]) == [[0], [1]]
    assert of([blank, look, take], [1, 1 + one], [1, 1, 0]) == [[], [1]]
    assert of([ITEMS[7], take], [], [1]) == [[], []]


# -- the fake is the kernel -----------------------------------------------------------------------

Operation = tuple[Literal["send", "peek", "receive"], int, int]


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["send", "peek", "receive"]),
            st.integers(1, 12) | st.sampled_from([BUFFER_BYTES - 1, BUFFER_BYTES, 40_000]),
            st.integers(0, 3),
        ),
        max_size=25,
    )
)
@settings(max_examples=300, deadline=None)
def test_fake_and_kernel_cannot_be_told_apart(tags: Tags, operations: list[Operation]) -> None:
    fake, kernel = FakeQueue(), SocketQueue()
    letter = queued = 0

    def receive(queue: Queue, size: int) -> object:
        try:
            data, fds, dropped = queue.receive(size)
        except BlockingIOError:
            return None
        which = [tags.which(fd) for fd in fds]
        close_all(fds)
        return data, which, dropped

    def peek(queue: Queue) -> object:
        try:
            return queue.peek()
        except BlockingIOError:
            return None

    try:
        for operation, size, fds in operations:
            if operation == "send":
                if queued + size > 80_000:
                    continue  # the fake has no limited send buffer
                queued += size
                letter += 1
                passed = [tags[(letter + n) % TAGS] for n in range(fds)]
                for queue in (fake, kernel):
                    queue.send(bytes([letter]) * size, passed)
            elif operation == "peek":
                assert peek(fake) == peek(kernel)
            else:
                assert receive(fake, size) == receive(kernel, size)
    finally:
        fake.close()
        kernel.close()


# -- the client's receive buffer -------------------------------------------------------------------


def replies(queue: Queue, tags: Tags, connection: ClientConnection) -> list[tuple[Any, list[int]]]:
    found = []
    while read_once(queue, connection):
        for message in connection.messages():
            assert isinstance(message, Reply)
            found.append((message.id, [tags.which(fd) for fd in message.fds]))
            close_all(message.fds)
    return found


@given(
    fds=st.lists(st.integers(0, 2), min_size=1, max_size=6),
    cuts=st.sets(st.integers(1, 200), max_size=6),
    eager=st.booleans(),
    kernel=st.booleans(),
)
@settings(max_examples=300, deadline=None)
def test_each_reply_has_its_own_fds(
    tags: Tags, fds: list[int], cuts: set[int], eager: bool, kernel: bool
) -> None:
    """One send for each reply, as a server does, with further cuts after the descriptors."""
    queue: Queue = SocketQueue() if kernel else FakeQueue()
    connection = ClientConnection()
    found: list[tuple[Any, list[int]]] = []
    try:
        for number, count in enumerate(fds):
            reply = b'{"return": {"a": "b\\u0041"}, "id": %d}\r\n' % number
            edges = [0, *sorted(cut for cut in cuts if cut < len(reply)), len(reply)]
            passed = [tags[(number + n) % TAGS] for n in range(count)]
            for begin, end in pairwise(edges):
                queue.send(reply[begin:end], passed)
                passed = []
                if eager:
                    found += replies(queue, tags, connection)
        found += replies(queue, tags, connection)
    finally:
        connection.close()
        close_all(connection.fds_to_close)
        queue.close()
    assert found == [
        (number, [(number + n) % TAGS for n in range(count)]) for number, count in enumerate(fds)
    ]
