"""Descriptors get the numbers that they had in another process; others there are moved."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
from contextlib import ExitStack

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qmpfd.kernel.fd import Fd, close_all, open_numbers
from qmpfd.kernel.renumber import keep_free, renumber

BASE = 300  # above all descriptors of the tests


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_any_arrangement(data: st.DataObject) -> None:
    """Any permutation, with cycles and chains, and descriptors that are only moved aside."""
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
    pairs = list(zip(targets, fds, strict=True))
    wanted = {target: fd for target, fd in pairs if target is not None}
    renumber(wanted, [fd for target, fd in pairs if target is None])
    try:
        assert len(os.listdir("/proc/self/fd")) == before
        assert [os.fstat(fd.fileno()).st_ino for fd in fds] == inodes
        for fd, target in zip(fds, targets, strict=True):
            assert target in (None, fd.fileno())
            assert not os.get_inheritable(fd.fileno())
        others = [fd.fileno() for target, fd in pairs if target is None]
        assert not wanted.keys() & set(others)
    finally:
        close_all(fds)


def test_numbers_in_use_or_beyond_the_limit(caplog: pytest.LogCaptureFixture) -> None:
    """A number that is in use by others, or beyond the limit: the descriptor keeps another one, and
    the log says so.  All other descriptors get their numbers.
    """
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    memory = [os.memfd_create("x") for _ in range(5)]
    inodes = [os.fstat(number).st_ino for number in memory]
    with Fd(memory.pop()) as stranger, ExitStack() as stack:
        fds = [stack.enter_context(Fd(number)) for number in memory]
        targets = [stranger.fileno(), most, BASE, fds[0].fileno()]
        renumber(dict(zip(targets, fds, strict=True)))
        assert [os.fstat(fd.fileno()).st_ino for fd in [*fds, stranger]] == inodes
        assert fds[2].fileno() == BASE
        numbers = [fds[index].fileno() for index in (0, 1)]
        assert fds[3].fileno() == targets[3]
    moved = [re.findall(r"\d+", record.getMessage()) for record in caplog.records]
    lost = targets[:2]
    assert moved == [[str(t), str(n), str(t)] for t, n in zip(lost, numbers, strict=True)]


def test_a_full_table() -> None:
    """Only the target numbers are free, and one of them is a bystander's, which is moved."""
    program = """
import os, resource, sys
from qmpfd.kernel.fd import Fd
from qmpfd.kernel.renumber import keep_free, renumber
os.closerange(3, 1000)
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
fds = [Fd(os.memfd_create(f"{number}")) for number in range(30)]
bystander = Fd(os.memfd_create("bystander"))
assert bystander.fileno() == 33
targets = list(range(33, 63))
while True:
    try:
        number = os.memfd_create("foreign")
    except OSError:
        break
for number in (*targets[1:],):
    os.close(number)
renumber(dict(zip(targets, fds)), [bystander])
assert [fd.fileno() for fd in fds] == targets
names = [os.readlink(f"/proc/self/fd/{fd.fileno()}").split(":")[1].split()[0] for fd in fds]
assert names == [str(number) for number in range(30)], names
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=30)


@given(
    wanted=st.sets(st.integers(BASE, BASE + 40), min_size=1),
    mine=st.sets(st.integers(BASE, BASE + 40), max_size=8),
    strangers=st.sets(st.integers(BASE, BASE + 40), max_size=8),
)
@settings(max_examples=50, deadline=None)
def test_numbers_that_are_kept_free(wanted: set[int], mine: set[int], strangers: set[int]) -> None:
    """The next descriptors get the free numbers, in order; ours are moved, others' are not."""
    strangers -= mine
    with ExitStack() as stack:
        null = stack.enter_context(Fd(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)))
        memory = {number: os.memfd_create(f"{number}") for number in mine | strangers}
        for number, fd in memory.items():
            os.dup2(fd, number, inheritable=False)
            os.close(fd)
        movable = {number: stack.enter_context(Fd(number)) for number in mine}
        others = [stack.enter_context(Fd(number)) for number in strangers]
        targets, fillers = keep_free(wanted, movable.values())
        stack.callback(close_all, fillers)
        assert targets == sorted(wanted - strangers)
        for target in targets:
            assert stack.enter_context(null.dup()).fileno() == target
        for number, moved in movable.items():
            assert os.readlink(f"/proc/self/fd/{moved.fileno()}").startswith(f"/memfd:{number} ")
        assert {fd.fileno() for fd in others} == strangers


def test_the_highest_number_is_not_kept_free() -> None:
    """There is no number beyond the highest for the source of the fillers: none stays open."""
    most, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, hard))
    try:
        before = open_numbers()
        assert keep_free([99], []) == ([], [])
        assert open_numbers() == before
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def test_a_number_far_above_all_others_is_not_kept_free() -> None:
    """A number far above all others is not kept free: that would take thousands of fillers."""
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert keep_free([most, most + 1, -1], []) == ([], [])
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard > 100_000:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        try:
            assert keep_free([90_000], []) == ([], [])
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
