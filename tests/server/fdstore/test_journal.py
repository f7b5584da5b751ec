"""The journal: its state after any history, complete or cut off anywhere.

Tests of server/fdstore/journal_writer.py and server/fdstore/replay.py.
"""

from __future__ import annotations

import os
import socket
import struct
import zlib
from collections.abc import Sequence

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qmpfd.kernel.fd import Fd
from qmpfd.limits import JOURNAL_FORMAT
from qmpfd.server.fdstore.handover import has_handed_over
from qmpfd.server.fdstore.journal import (
    Confirmed,
    HandedOver,
    Journal,
    ListenerAdded,
    ListenerRemoved,
    Record,
    Removed,
    SnapshotHeader,
    frame,
)
from qmpfd.server.fdstore.replay import follow, frames, replay
from qmpfd.server.saved_state import DONE, NOT_OURS, REFUSED, SavedFd, SavedListener

X = SavedListener(b"/x", (1, 2))
BEGUN = SnapshotHeader(JOURNAL_FORMAT, 1, None)


def added(number: int, fdset_id: int = 0, opaque: str | None = None) -> SavedFd:
    return SavedFd(f"~{number}", fdset_id, number, opaque, (1, 2, 3), 0.0, None, False)


numbers = st.integers(3, 30)
texts = st.none() | st.text(max_size=8)
entries = st.builds(
    SavedFd,
    name=st.just("~1"),
    fdset_id=st.integers(0, 5),
    number=numbers,
    opaque=texts,
    added_by=st.none() | st.tuples(numbers, numbers, numbers),
    added_at=st.floats(0, 1e6),
    expires_at=st.none() | st.floats(0, 1e6),
    watch_hangup=st.booleans(),
)
records = st.lists(entries | st.builds(Removed, number=numbers), max_size=12)


def model(done: Sequence[Record]) -> list[SavedFd]:
    """Return the stored descriptors after *done*, oldest first: a simple model."""
    there: list[SavedFd] = []
    for record in done:
        if isinstance(record, SavedFd):
            there = [each for each in there if each.number != record.number] + [record]
        elif isinstance(record, Removed):
            there = [each for each in there if each.number != record.number]
    return there


def sensible(done: list[Record]) -> list[Record]:
    """Remove impossible records: a number can be stored only once at a time."""
    there: set[int] = set()
    kept = []
    for record in done:
        if isinstance(record, SavedFd):
            if record.number in there:
                continue
            there.add(record.number)
        elif isinstance(record, Removed):
            there.discard(record.number)
        kept.append(record)
    return kept


@given(st.lists(records, max_size=6))
@settings(max_examples=60, deadline=None)
def test_any_history_cut_anywhere(sections: list[list[Record]]) -> None:
    """A critical section that is cut off has no effect."""
    flat = sensible([record for section in sections for record in section])
    sections = [flat[at : at + 3] for at in range(0, len(flat), 3)]
    data, ends, states = frame([BEGUN]), [], []
    done: list[Record] = []
    ends.append(len(data))
    states.append(model(done))
    for section in sections:
        data += frame(section)
        done += section
        ends.append(len(data))
        states.append(model(done))
    for cut in range(ends[0], len(data) + 1):
        whole = max(index for index, end in enumerate(ends) if end <= cut)
        assert list(follow(data[:cut]).entries.values()) == states[whole]
        # Allocated memory that is not written yet is zero.
        assert list(follow(data[:cut] + bytes(50)).entries.values()) == states[whole]


@given(st.integers(0, 10_000), st.integers(1, 255))
@settings(max_examples=200, deadline=None)
def test_a_byte_that_is_wrong(at: int, change: int) -> None:
    """A wrong byte loses its change, and all later ones if the frame's length is wrong; no change
    is invented.
    """
    first = frame([BEGUN])
    data = bytearray(first)
    for number in range(3, 9):
        data += frame([added(number)])
    at %= len(data) - len(first)
    data[len(first) + at] ^= change
    found = list(follow(bytes(data)).entries)
    one, within = divmod(at, (len(data) - len(first)) // 6)
    assert found[:one] == list(range(3, 3 + one))
    others = [number for number in range(3, 9) if number != 3 + one]
    assert found == (others if within >= 4 else [number for number in others if number in found])


def test_a_section_counts_only_when_complete() -> None:
    section = frame([added(number) for number in range(3, 256)])
    begun = frame([BEGUN])
    for cut in range(0, len(section), 97):
        assert not follow(begun + section[:cut]).entries
    assert len(follow(begun + section).entries) == 253


def test_order_within_a_set() -> None:
    history = follow(frame([BEGUN, added(9), added(5), added(7, 2), added(6), Removed(5)]))
    state = history.state(lambda _: True)
    assert [(fd.fdset_id, fd.number) for fd in state.fds] == [(0, 9), (2, 7), (0, 6)]


def test_records_without_descriptor_are_left_out() -> None:
    history = follow(frame([BEGUN, added(5), added(7, 2), added(6), ListenerAdded("~9", X)]))
    state = history.state(lambda name: name == "~6")
    assert state.stored_numbers == [6]
    assert state.listeners == []


def test_listeners_and_takeovers() -> None:
    previous = SnapshotHeader(JOURNAL_FORMAT, 4, "old")
    history = follow(
        frame(
            [previous, ListenerAdded("~1", X), ListenerAdded("~2", NOT_OURS), ListenerRemoved("~1")]
        )
    )
    assert history.listeners == {"~2": NOT_OURS}
    assert not history.confirmed
    assert not history.left
    assert follow(frame([previous, Confirmed()])).confirmed
    assert follow(frame([BEGUN]) + frame([HandedOver(True)])).left
    undecided = frame([HandedOver(False)]) + frame([HandedOver(None)])
    assert follow(frame([BEGUN]) + undecided).left is None


@pytest.mark.parametrize("outcome", [True, False])
def test_the_outcome_of_a_takeover_is_known_at_once(outcome: bool) -> None:
    """The successor's parent stores its descriptors only until a takeover has failed."""
    journal = Journal([BEGUN])
    with journal.fd:
        for each in (None, outcome):
            journal.append(frame([HandedOver(each)]))
        lifeline, old = map(to_fd, socket.socketpair())
        with lifeline:
            old.close()  # dead: its parent restarts it, unless the journal has HandedOver
            assert has_handed_over(lifeline, None, timeout=1000)
            assert has_handed_over(lifeline, journal.fd, timeout=1000) is outcome
            journal.append(frame([HandedOver(None)]))
            assert not has_handed_over(lifeline, journal.fd, timeout=1000)
        journal.close()


@pytest.mark.parametrize("outcome", [True, False])
def test_the_predecessors_word_counts(outcome: bool) -> None:
    """The predecessor's word counts, also after its end; without it, nothing is handed over."""
    lifeline, old = map(to_fd, socket.socketpair())
    with lifeline:
        assert not has_handed_over(lifeline, None, timeout=0)
        os.write(old.fileno(), DONE if outcome else REFUSED)
        for _ in range(2):
            assert has_handed_over(lifeline, None, timeout=1000) is outcome
            old.close()


def to_fd(sock: socket.socket) -> Fd:
    return Fd(sock.detach())


@pytest.mark.parametrize(
    "data",
    [
        b"",
        bytes(100),
        b"\xff" * 100,
        frame([BEGUN])[:-1],
        frame([added(3)]),
        frame([SnapshotHeader(JOURNAL_FORMAT + 1, 1, None)]),
    ],
    ids=["empty", "zeros", "junk", "torn", "no beginning", "another format"],
)
def test_no_journal(data: bytes) -> None:
    with pytest.raises(ValueError, match="journal"):
        follow(data)


def test_frames_with_unknown_records(caplog: pytest.LogCaptureFixture) -> None:
    body = b"\x91\x91\xa1z"  # [["z"]]: of a future version, with a valid checksum
    whole = frame([BEGUN])
    whole += struct.pack("<II", len(body), zlib.crc32(body)) + body
    whole += frame([added(3)])
    assert list(follow(whole).entries) == [3]
    assert "cannot be read" in caplog.text


def test_a_journal_file() -> None:
    journal = Journal([BEGUN])
    try:
        for number in range(3, 3000):
            journal.reserve(200)
            journal.append(frame([added(number, opaque="x" * 50)]))
        size = os.fstat(journal.fd.fileno()).st_size
        assert size >= journal.size
        assert list(replay(journal.fd).entries) == list(range(3, 3000))
    finally:
        journal.close()


def test_half_a_frame_is_written_over() -> None:
    journal = Journal([BEGUN])
    try:
        torn = frame([added(number) for number in range(50, 90)])[:-5]
        os.pwrite(journal.fd.fileno(), torn, journal.size)
        assert not replay(journal.fd).entries
        journal.append(frame([added(3)]))
        assert list(replay(journal.fd).entries) == [3]
    finally:
        journal.close()


def test_frames_stop_at_zeros() -> None:
    data = frame([BEGUN]) + frame([added(3)])
    assert len(list(frames(data + bytes(8)))) == 2


def test_descriptors_of_a_command_come_back_all_or_none() -> None:
    """All descriptors of an unacknowledged command come back, or none."""

    def entry(name: str, number: int) -> SavedFd:
        return SavedFd(name, 0, number, None, None, 0.0, None, False)

    begun: list[Record] = [BEGUN, entry("a", 10), entry("b", 11)]
    one: list[Record] = [entry("c", 12), entry("d", 13)]
    other: list[Record] = [Removed(12), entry("e", 14), entry("f", 15)]
    data = frame(begun) + frame(one) + frame(other)

    def numbers(kept: set[str]) -> list[int]:
        history = follow(data)
        history.forget_unfinished(kept.__contains__)
        return history.state(kept.__contains__).stored_numbers

    assert numbers(set("abdef")) == [10, 11, 13, 14, 15]
    assert numbers(set("abde")) == [10, 11, 13]
    assert numbers(set("bef")) == [11, 14, 15]  # the snapshot's were stored before
    data = frame(begun) + frame(one) + frame([entry("e", 14), entry("f", 15)])
    # Sent after the acknowledgement: a lost one affects no other.
    assert numbers(set("abcef")) == [10, 11, 12, 14, 15]
    assert numbers(set("abce")) == [10, 11, 12]


@given(st.integers(0, 5), st.sampled_from(["number", "opaque", "fdset_id", "added_at"]))
@settings(deadline=None)
def test_one_record_that_is_wrong(at: int, member: str) -> None:
    """One invalid record in a frame with a valid checksum: all others count."""
    entries = [added(number, opaque="x") for number in range(3, 9)]
    wrong = msgspec.structs.replace(entries[at], **{member: b"\xff"})
    section: list[Record] = [BEGUN, *entries[:at], wrong, *entries[at + 1 :]]
    assert list(follow(frame(section)).entries) == [n for n in range(3, 9) if n != at + 3]


def test_a_text_that_is_not_utf8() -> None:
    data = frame([BEGUN, added(3, opaque="cafX"), added(4)])
    header, body = data[:8], data[8:].replace(b"cafX", b"caf\xe9")
    data = struct.pack("<II", len(body), zlib.crc32(body))
    assert len(header) == len(data)
    assert list(follow(data + body).entries) == [4]


def test_a_snapshot_in_several_frames() -> None:
    """A snapshot in several frames saves memory; a lost descriptor affects no other."""
    records: list[Record] = [BEGUN, *(added(number) for number in range(3, 2503))]
    journal = Journal(iter(records))
    with journal.fd:
        assert len(list(frames(os.pread(journal.fd.fileno(), journal.size, 0)))) == 3
        history = replay(journal.fd)
    history.forget_unfinished(lambda name: name != "~2000")
    assert list(history.entries) == list(range(3, 2503))


def test_a_frame_longer_than_one_read() -> None:
    data = frame([BEGUN]) + frame([added(3, opaque="x" * (1 << 20))]) + frame([added(4)])
    assert list(follow(data).entries) == [3, 4]


def test_a_replaced_descriptor_stays_until_its_replacement_is_stored() -> None:
    """Killed between the frame and the message with its descriptor: the older descriptor comes
    back, at its place in the order.
    """

    def entry(name: str, number: int, added_at: float) -> SavedFd:
        return SavedFd(name, 0, number, "web", None, added_at, None, False)

    begun: list[Record] = [BEGUN, entry("a", 10, 1.0), entry("b", 11, 2.0)]
    replaced: list[Record] = [entry("c", 12, 3.0), Removed(10)]
    again: list[Record] = [entry("d", 13, 4.0), Removed(12)]
    data = frame(begun) + frame(replaced) + frame(again)

    def numbers(kept: set[str]) -> list[int]:
        history = follow(data)
        history.forget_unfinished(kept.__contains__)
        return history.state(kept.__contains__).stored_numbers

    assert numbers(set("abcd")) == [11, 13]
    assert numbers(set("bd")) == [11, 13]
    assert numbers(set("abc")) == [11, 12]  # the second replacement did not arrive
    assert numbers(set("ab")) == [10, 11]  # nor did the first
    assert numbers(set("b")) == [11]
