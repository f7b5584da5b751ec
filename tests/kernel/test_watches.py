"""Whether an epoll instance is watched by another one."""

from __future__ import annotations

import os
import select
from collections.abc import Iterator
from contextlib import closing

import pytest

from qmpfd.kernel.fd import Fd
from qmpfd.kernel.watches import WatchDetector


@pytest.fixture
def detector() -> Iterator[WatchDetector]:
    with closing(WatchDetector()) as made:
        yield made


def test_only_a_watched_one_is_watched(detector: WatchDetector) -> None:
    with select.epoll() as epoll, select.epoll() as other, select.epoll() as watching:
        for _ in range(3):
            assert not detector.is_watched(epoll)
            watching.register(epoll, 0)
            assert detector.is_watched(epoll)
            assert not detector.is_watched(other)
            watching.unregister(epoll)
        assert not detector.is_watched(epoll)


def test_a_duplicate_that_is_open_is_not_watched(detector: WatchDetector) -> None:
    """Whether a duplicate is watched counts, and not whether one is open (in another process)."""
    with (
        select.epoll() as epoll,
        select.epoll() as watching,
        Fd(os.dup(epoll.fileno())) as duplicate,
    ):
        assert not detector.is_watched(epoll)
        watching.register(duplicate, 0)
        assert detector.is_watched(epoll)
        watching.unregister(duplicate)
        assert not detector.is_watched(epoll)


def test_another_error_shows_nothing(detector: WatchDetector) -> None:
    """An error of epoll_ctl(2) that is not about the depth, such as ENOMEM."""
    with select.epoll() as epoll:
        detector.close()
        assert not detector.is_watched(epoll)  # EBADF
