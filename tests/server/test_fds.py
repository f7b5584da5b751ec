"""Which command gets which descriptor.

Black-box tests: clients send the write ends of pipes.  The read end shows whether the daemon holds
the write end; removing the fd set of a reply shows which command got it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from helpers import (
    ADD,
    CAPABILITIES,
    QUERY,
    Pipe,
    Wire,
    daemon,
    error,
    pipes,
    remove,
    request,
    settle,
    value,
)

OK = "ok"
NOT_SUPPLIED = "FdNotSupplied"
GENERIC = "GenericError"
LEFT, MIDDLE, RIGHT = b'{"exec', b'ute":"add', b'-fd"}'
ELSEWHERE = request("add-fd", {"fdset-id": 77})
UNTYPED = request("add-fd", {"fdset-id": "0"})


@dataclass(frozen=True)
class Row:
    """Input with descriptors, named by letters, and the expected replies.

    Args:
        sent: bytes and descriptors of each system call.
        got: for each reply the letter of the descriptor added, ``OK``, or an error class.
        waiting: descriptors that are pending afterwards.
        negotiated: whether the connection has negotiated before.
    """

    name: str
    sent: Sequence[tuple[bytes, str]]
    got: Sequence[str]
    waiting: str = ""
    negotiated: bool = True

    @property
    def letters(self) -> list[str]:
        return [letter for _, letters in self.sent for letter in letters]


ROWS = [
    # several sends, each a command with its fd; the daemon reads late
    Row("each its own", [(ADD, "a"), (ADD, "b"), (ADD, "c")], "abc"),
    Row("no line ends", [(ADD.strip(), "a"), (ADD.strip(), "b")], "ab"),
    Row("twenty", [(ADD, letter) for letter in "abcdefghijklmnopqrst"], "abcdefghijklmnopqrst"),
    Row("with an id", [(request("add-fd", id={"n": 1}), "a"), (ADD, "b")], "ab"),
    # add-fd without an fd, then one with
    Row("without, then with", [(ADD, ""), (ADD, "a")], [NOT_SUPPLIED, "a"]),
    Row("with, without, with", [(ADD, "a"), (ADD, ""), (ADD, "b")], ["a", NOT_SUPPLIED, "b"]),
    Row("two without", [(ADD, ""), (ADD, ""), (ADD, "a")], [NOT_SUPPLIED, NOT_SUPPLIED, "a"]),
    # other commands before and after
    Row("others around", [(QUERY, ""), (ADD, "a"), (QUERY, "")], [OK, "a", OK]),
    Row(
        "others around, in one send",
        [(QUERY + QUERY + ADD + QUERY, "a"), (ADD, "")],
        [OK, OK, "a", OK, NOT_SUPPLIED],
    ),
    Row("a broken one before", [(b"]", ""), (ADD, "a")], [GENERIC, "a"]),
    # two add-fd and two fds in one send
    Row("in order", [(ADD + ADD, "ab")], "ab"),
    Row("in order, others between", [(ADD + QUERY + ADD, "ab")], ["a", OK, "b"]),
    Row("more commands than fds", [(ADD * 3, "ab")], ["a", "b", NOT_SUPPLIED]),
    Row("more fds than commands", [(ADD * 2, "abcd"), (ADD, "")], ["a", "b", NOT_SUPPLIED]),
    Row("two and two", [(ADD + ADD, "ab"), (ADD + ADD, "cd")], "abcd"),
    # one add-fd and three fds
    Row("the others closed", [(ADD, "abc"), (ADD, "")], ["a", NOT_SUPPLIED]),
    Row("the others closed, then more", [(ADD, "abc"), (ADD, "d")], ["a", "d"]),
    Row("three on a blank", [(b" ", "abc"), (ADD, ""), (ADD, "")], ["a", NOT_SUPPLIED]),
    # the fd on the first half of a command, or on a blank before it
    Row("on the first half", [(LEFT, "a"), (MIDDLE, ""), (RIGHT, "")], "a"),
    Row("on the middle", [(LEFT, ""), (MIDDLE, "a"), (RIGHT, "")], "a"),
    Row("on the end", [(LEFT, ""), (MIDDLE, ""), (RIGHT, "a")], "a"),
    Row("on the last byte", [(ADD[:-3], ""), (b"}", "a"), (ADD, "")], ["a", NOT_SUPPLIED]),
    Row("on the line end", [(ADD.strip(), ""), (b"\r\n", "a"), (ADD, "")], [NOT_SUPPLIED, "a"]),
    Row(
        "on the first half of another",
        [(QUERY[:5], "a"), (QUERY[5:], ""), (ADD, "")],
        [OK, "a"],
    ),
    Row("on a whole other", [(QUERY, "a"), (QUERY, ""), (ADD, "")], [OK, OK, "a"]),
    Row("on a blank", [(b" ", "a"), (ADD, "")], "a"),
    Row("on a line end", [(b"\n", "a"), (ADD, "")], "a"),
    Row("on a blank, others between", [(b" ", "a"), (QUERY * 2, ""), (ADD, "")], [OK, OK, "a"]),
    Row(
        "on a blank before negotiation",
        [(b" ", "a"), (CAPABILITIES, ""), (ADD, "")],
        [OK, "a"],
        negotiated=False,
    ),
    Row("on a blank, and nothing else", [(b" ", "a")], [], waiting="a"),
    Row("on a blank, others after", [(b" ", "a"), (QUERY, "")], [OK], waiting="a"),
    Row("two halves, two fds", [(ADD[:8], "a"), (ADD[8:], "b")], "b"),
    # blank and fd, command, blank and fd, command
    Row("blanks", [(b" ", "a"), (ADD, ""), (b" ", "b"), (ADD, "")], "ab"),
    Row(
        "blanks, others between",
        [(b" ", "a"), (QUERY + ADD, ""), (b" ", "b"), (ADD + QUERY, ""), (b" ", "c"), (ADD, "")],
        [OK, "a", "b", OK, "c"],
    ),
    Row("blanks and not", [(b" ", "a"), (ADD, ""), (ADD, "b"), (b" ", "c"), (ADD, "")], "abc"),
    # newer fds arrive while older ones are pending
    Row("newer ones", [(b" ", "a"), (b" ", "b"), (ADD, ""), (ADD, "")], ["b", NOT_SUPPLIED]),
    Row("newer ones, others", [(b" ", "a"), (QUERY, ""), (b" ", "b"), (ADD, "")], [OK, "b"]),
    Row("newer ones on a command", [(b" ", "abc"), (ADD, "d"), (ADD, "")], ["d", NOT_SUPPLIED]),
    Row("newer ones, many", [(b" ", "ab"), (b" ", "cd"), (b" ", "ef")], [], waiting="ef"),
    # the command that takes the fd is refused, or is not valid JSON
    Row(
        "refused by value",
        [(ELSEWHERE, "a"), (ADD, "")],
        ["InvalidParameterValue", NOT_SUPPLIED],
    ),
    Row("refused by type", [(UNTYPED, "a"), (ADD, "")], [GENERIC, NOT_SUPPLIED]),
    Row("refused by type, then one", [(UNTYPED, "a"), (ADD, "b")], [GENERIC, "b"]),
    Row(
        "refused, the fd on a blank",
        [(b" ", "a"), (UNTYPED, ""), (ADD, "")],
        [GENERIC, NOT_SUPPLIED],
    ),
    Row("refused, two fds", [(UNTYPED + ADD, "ab")], [GENERIC, "b"]),
    Row(
        "refused by a member",
        [(request("add-fd", other=1), "a"), (ADD, "")],
        [GENERIC, NOT_SUPPLIED],
    ),
    Row(
        "refused before negotiation",
        [(ADD, "a"), (CAPABILITIES, ""), (ADD, "")],
        ["CommandNotFound", OK, NOT_SUPPLIED],
        negotiated=False,
    ),
    Row("broken", [(b'{"execute":"add-fd",}', "a"), (ADD, "")], [GENERIC, NOT_SUPPLIED]),
    Row(
        "broken, the fd on a blank", [(b" ", "a"), (b"{]", ""), (ADD, "")], [GENERIC, NOT_SUPPLIED]
    ),
    Row("broken, then one", [(b"{]", "a"), (ADD, "b")], [GENERIC, "b"]),
    Row("unknown", [(request("no-such"), "a"), (ADD, "")], ["CommandNotFound", "a"]),
]


async def _send(row: Row, wire: Wire, letters: dict[str, Pipe], *, late: bool) -> None:
    for data, fds in row.sent:
        wire.send(data, [letters[letter] for letter in fds])
        if not late:
            await settle()
    for pipe in letters.values():
        pipe.release()


@contextmanager
def _named(letters: Sequence[str]) -> Iterator[dict[str, Pipe]]:
    with pipes(len(letters)) as made:
        yield dict(zip(letters, made, strict=True))


def _held(letters: dict[str, Pipe]) -> set[str]:
    return {letter for letter, pipe in letters.items() if pipe.held()}


@pytest.mark.parametrize("late", [True, False], ids=["late", "step by step"])
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
async def test_row(row: Row, late: bool, path: Path) -> None:
    with _named(row.letters) as letters:
        async with daemon(path):
            with await _opened(row, path) as wire:
                await _send(row, wire, letters, late=late)
                replies = await wire.replies(len(row.got))
                await settle()
                added = {e: r for e, r in zip(row.got, replies, strict=True) if e in letters}
                for expected, reply in zip(row.got, replies, strict=True):
                    if expected not in letters:
                        assert (OK if "return" in reply else error(reply)) == expected
                # The daemon holds the stored and the pending descriptors, and no others.
                assert _held(letters) == {*added, *row.waiting}
                for letter, reply in added.items():
                    await remove(wire, value(reply))
                    assert not letters[letter].held()
                    del letters[letter]
                    assert _held(letters) == {*added, *row.waiting} & letters.keys()
                # There are no further replies.
                assert "return" in await wire.call("query-name")
            await settle()
            assert not _held(letters)


async def _opened(row: Row, path: Path) -> Wire:
    if row.negotiated:
        return await Wire.session(path)
    wire = await Wire.connect(path)
    assert "QMP" in await wire.reply()
    return wire


@pytest.mark.parametrize("late", [True, False], ids=["late", "step by step"])
async def test_getfd_takes_its_own_among_others(path: Path, late: bool) -> None:
    """``getfd`` and ``add-fd`` take descriptors from the same queue, in order."""
    named = [request("getfd", {"fdname": name}) for name in "xy"]
    row = Row("", [(named[0], "a"), (b" ", "b"), (ADD, ""), (named[1] + ADD, "cd")], "")
    with _named(row.letters) as letters:
        async with daemon(path):
            with await Wire.session(path) as wire:
                await _send(row, wire, letters, late=late)
                replies = await wire.replies(4)
                assert [value(reply) for reply in (replies[0], replies[2])] == [{}, {}]
                for command, letter in [("x", "a"), ("y", "c")]:
                    assert _held(letters) >= {letter}
                    assert await wire.call("closefd", {"fdname": command}) == {"return": {}}
                    assert letter not in _held(letters)
                for reply, letter in [(replies[1], "b"), (replies[3], "d")]:
                    await remove(wire, value(reply))
                    assert letter not in _held(letters)
                assert not _held(letters)


# -- the connection ends -----------------------------------------------------------------------


@pytest.mark.parametrize("late", [True, False], ids=["late", "step by step"])
@pytest.mark.parametrize(
    "sent, stored",
    [
        ([(ADD, "a"), (ADD, "b")], "ab"),
        ([(b" ", "a")], ""),
        ([(LEFT, "a"), (MIDDLE, "")], ""),
        ([(ADD, "a"), (ADD[:-3], "b")], "a"),
        ([(ADD, "a"), (b" ", "b")], "a"),
        ([(b" ", "a"), (QUERY, ""), (ADD, "")], "a"),
        ([(b" ", "a"), (ADD, ""), (b" ", "b"), (ADD, "")], "ab"),
        ([(UNTYPED, "a"), (ADD, "b"), (b"{", "c")], "b"),
    ],
)
async def test_the_connection_ends(
    sent: list[tuple[bytes, str]], stored: str, late: bool, path: Path
) -> None:
    """Complete commands are executed; descriptors that no command took are closed."""
    row = Row("", sent, "")
    with _named(row.letters) as letters:
        async with daemon(path):
            with await Wire.session(path) as other:
                wire = await Wire.session(path)
                with wire:
                    await _send(row, wire, letters, late=late)
                await settle()
                assert _held(letters) == set(stored)
                sets = value(await other.call("query-fdsets"))
                assert [fdset["fdset-id"] for fdset in sets] == [*reversed(range(len(stored)))]
                for fdset, letter in zip(reversed(sets), stored, strict=True):
                    await other.call("remove-fd", {"fdset-id": fdset["fdset-id"]})
                    assert not letters[letter].held()
