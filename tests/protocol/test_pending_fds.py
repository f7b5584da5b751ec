"""Pending descriptors, without bytes: which message takes them, and when they are closed."""

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
def pending() -> PendingFds:
    return PendingFds()


@pytest.fixture
def fds_to_close(pending: PendingFds) -> list[Fd]:
    return pending.fds_to_close


def test_nothing_waits_at_first(pending: PendingFds, fds_to_close: list[Fd]) -> None:
    assert len(pending.fds) == 0
    assert pending.take(253) == ([], "")
    pending.end_segment(inside_message=False)
    pending.end_message()
    assert fds_to_close == []


def test_in_order_within_the_segment(
    pending: PendingFds, fds: list[Fd], fds_to_close: list[Fd]
) -> None:
    pending.begin_segment(fds, "")
    assert pending.take(1) == (fds[:1], "")
    assert pending.take(2) == (fds[1:3], "")
    assert len(pending.fds) == 2
    pending.end_segment(inside_message=False)
    assert fds_to_close == fds[3:]
    assert pending.take(1) == ([], "")


def test_behind_the_segment_the_first_takes_and_the_rest_goes(
    pending: PendingFds, fds: list[Fd], fds_to_close: list[Fd]
) -> None:
    pending.begin_segment(fds, "")
    pending.end_segment(inside_message=False)
    assert len(pending.fds) == 5
    pending.end_message()
    assert len(pending.fds) == 5
    assert pending.take(2) == (fds[:2], "")
    assert fds_to_close == fds[2:]


def test_a_message_that_straddles_is_in_the_segment(
    pending: PendingFds, fds: list[Fd], fds_to_close: list[Fd]
) -> None:
    pending.begin_segment(fds, "")
    assert pending.take(1) == (fds[:1], "")
    pending.end_segment(inside_message=True)
    assert fds_to_close == []
    assert pending.take(1) == (fds[1:2], "")
    pending.end_message()
    assert fds_to_close == fds[2:]


def test_a_message_that_straddles_and_takes_none(
    pending: PendingFds, fds: list[Fd], fds_to_close: list[Fd]
) -> None:
    pending.begin_segment(fds, "")
    pending.end_segment(inside_message=True)
    pending.end_message()
    assert fds_to_close == []
    assert pending.take(1) == (fds[:1], "")
    assert fds_to_close == fds[1:]


def test_newer_ones_displace_older_ones(
    pending: PendingFds, fds: list[Fd], fds_to_close: list[Fd]
) -> None:
    pending.begin_segment(fds[:2], "")
    pending.begin_segment(fds[2:], "")
    assert fds_to_close == fds[:2]
    assert pending.take(1) == (fds[2:3], "")


def test_descriptors_with_losses_are_all_closed(
    pending: PendingFds, fds: list[Fd], fds_to_close: list[Fd]
) -> None:
    pending.begin_segment(fds, "full")
    assert fds_to_close == fds
    assert pending.take(1) == ([], "full")
    assert pending.take(1) == ([], "")  # the loss is reported once


@pytest.mark.parametrize("newer", [False, True])
def test_a_loss_is_forgotten_with_what_was_lost(
    pending: PendingFds, fds: list[Fd], newer: bool
) -> None:
    pending.begin_segment([], "full")
    pending.end_segment(inside_message=False)
    if newer:
        pending.begin_segment(fds, "")
    else:
        pending.discard()
    assert pending.take(1) == (fds[:1] if newer else [], "")


def test_discard(pending: PendingFds, fds: list[Fd], fds_to_close: list[Fd]) -> None:
    pending.begin_segment(fds, "")
    pending.discard()
    pending.discard()
    assert fds_to_close == fds
    assert len(pending.fds) == 0
