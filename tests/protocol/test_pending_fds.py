"""The rule by itself, apart from bytes: what waits, who takes it, when it is given up."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from qmpfd.kernel.fd import Fd, close_all
from qmpfd.protocol.pending_fds import PendingFds


@pytest.fixture
def fds() -> Iterator[list[Fd]]:
    fds = [Fd(os.open("/dev/null", os.O_RDONLY)) for _ in range(5)]
    yield fds
    close_all(fds)


@pytest.fixture
def fds_to_close() -> list[Fd]:
    return []


@pytest.fixture
def unclaimed(fds_to_close: list[Fd]) -> PendingFds:
    return PendingFds(fds_to_close)


def test_nothing_waits_at_first(unclaimed: PendingFds, fds_to_close: list[Fd]) -> None:
    assert len(unclaimed.fds) == 0
    assert unclaimed.claim(253) == ([], False)
    unclaimed.segment_ended(inside_message=False)
    unclaimed.message_ended()
    assert fds_to_close == []


def test_in_order_within_the_segment(
    unclaimed: PendingFds, fds: list[Fd], fds_to_close: list[Fd]
) -> None:
    unclaimed.arrive(fds, False)
    assert unclaimed.claim(1) == (fds[:1], False)
    assert unclaimed.claim(2) == (fds[1:3], False)
    assert len(unclaimed.fds) == 2
    unclaimed.segment_ended(inside_message=False)
    assert fds_to_close == fds[3:]
    assert unclaimed.claim(1) == ([], False)


def test_behind_the_segment_the_first_takes_and_the_rest_goes(
    unclaimed: PendingFds, fds: list[Fd], fds_to_close: list[Fd]
) -> None:
    unclaimed.arrive(fds, False)
    unclaimed.segment_ended(inside_message=False)
    assert len(unclaimed.fds) == 5
    unclaimed.message_ended()
    assert len(unclaimed.fds) == 5
    assert unclaimed.claim(2) == (fds[:2], False)
    assert fds_to_close == fds[2:]


def test_a_message_that_straddles_is_in_the_segment(
    unclaimed: PendingFds, fds: list[Fd], fds_to_close: list[Fd]
) -> None:
    unclaimed.arrive(fds, False)
    assert unclaimed.claim(1) == (fds[:1], False)
    unclaimed.segment_ended(inside_message=True)
    assert fds_to_close == []
    assert unclaimed.claim(1) == (fds[1:2], False)
    unclaimed.message_ended()
    assert fds_to_close == fds[2:]


def test_a_message_that_straddles_and_takes_none(
    unclaimed: PendingFds, fds: list[Fd], fds_to_close: list[Fd]
) -> None:
    unclaimed.arrive(fds, False)
    unclaimed.segment_ended(inside_message=True)
    unclaimed.message_ended()
    assert fds_to_close == []
    assert unclaimed.claim(1) == (fds[:1], False)
    assert fds_to_close == fds[1:]


def test_newer_ones_displace_older_ones(
    unclaimed: PendingFds, fds: list[Fd], fds_to_close: list[Fd]
) -> None:
    unclaimed.arrive(fds[:2], False)
    unclaimed.arrive(fds[2:], False)
    assert fds_to_close == fds[:2]
    assert unclaimed.claim(1) == (fds[2:3], False)


def test_what_was_cut_short_is_given_up_whole(
    unclaimed: PendingFds, fds: list[Fd], fds_to_close: list[Fd]
) -> None:
    unclaimed.arrive(fds, True)
    assert fds_to_close == fds
    assert unclaimed.claim(1) == ([], True)
    assert unclaimed.claim(1) == ([], False)  # told once


@pytest.mark.parametrize("newer", [False, True])
def test_a_loss_is_forgotten_with_what_was_lost(
    unclaimed: PendingFds, fds: list[Fd], newer: bool
) -> None:
    unclaimed.arrive([], True)
    unclaimed.segment_ended(inside_message=False)
    if newer:
        unclaimed.arrive(fds, False)
    else:
        unclaimed.discard()
    assert unclaimed.claim(1) == (fds[:1] if newer else [], False)


def test_discard(unclaimed: PendingFds, fds: list[Fd], fds_to_close: list[Fd]) -> None:
    unclaimed.arrive(fds, False)
    unclaimed.discard()
    unclaimed.discard()
    assert fds_to_close == fds
    assert len(unclaimed.fds) == 0
