"""Descriptors get the numbers that they had in another process, whoever is in the way."""

from __future__ import annotations

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qmpfd.kernel.fd import Fd, close_all
from qmpfd.server.renumber import place

BASE = 300  # above whatever the tests have open


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_any_arrangement(data: st.DataObject) -> None:
    """Any of them anywhere, in rings and rows, and some that only have to make way."""
    count = data.draw(st.integers(1, 9))
    sources = data.draw(st.permutations(range(BASE, BASE + 12)))[:count]
    targets: list[int | None] = list(data.draw(st.permutations(range(BASE, BASE + 12)))[:count])
    for index in data.draw(st.sets(st.integers(0, count - 1))):
        targets[index] = None
    fds, inodes = [], []
    for number in sources:
        memory = os.memfd_create("x")
        inodes.append(os.fstat(memory).st_ino)
        os.dup2(memory, number, inheritable=False)
        os.close(memory)
        fds.append(Fd(number))
    before = len(os.listdir("/proc/self/fd"))
    placed = place(fds, targets)
    try:
        assert len(os.listdir("/proc/self/fd")) == before
        assert [os.fstat(fd.fileno()).st_ino for fd in placed] == inodes
        for fd, target in zip(placed, targets, strict=True):
            assert target in (None, fd.fileno())
            assert not os.get_inheritable(fd.fileno())
        wanted = {target for target in targets if target is not None}
        others = [fd.fileno() for fd, target in zip(placed, targets, strict=True) if target is None]
        assert not wanted & set(others)
    finally:
        close_all(placed)


def test_somebody_elses_number() -> None:
    r, w = os.pipe()
    fd = Fd(os.dup(r))
    try:
        with pytest.raises(ValueError, match=f"descriptor {w} is in use"):
            place([fd], [w])
    finally:
        fd.close()
        os.close(r)
        os.close(w)
