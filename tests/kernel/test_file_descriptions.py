"""Find descriptors of the same open file description, with kcmp(2) or without."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qmpfd.kernel import file_descriptions as descriptions
from qmpfd.kernel.fd import Fd, close_all
from qmpfd.kernel.file_descriptions import Descriptions, compare, is_same


@contextmanager
def copies(counts: list[int]) -> Iterator[list[list[int]]]:
    """Yield groups of duplicates: *counts* has the size of each group."""
    fds: list[list[Fd]] = []
    try:
        for count in counts:
            first = Fd(os.open("/dev/null", os.O_RDONLY))
            fds.append([first])
            for _ in range(count - 1):
                fds[-1].append(first.dup())
        yield [[fd.fileno() for fd in group] for group in fds]
    finally:
        for group in fds:
            close_all(group)


def test_compare() -> None:
    with copies([2, 1]) as [(one, same), (other,)]:
        assert compare(one, same) == 0
        assert compare(one, other) == -compare(other, one) != 0
        assert is_same(one, same)
        assert not is_same(one, other)


def test_what_is_not_open() -> None:
    with pytest.raises(OSError, match="descriptor"):
        compare(0, 100_000)


@pytest.mark.parametrize("kcmp", [True, False], ids=["kcmp", "fcntl"])
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_any_order_of_events(kcmp: bool, data: st.DataObject) -> None:
    counts = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=8))
    with copies(counts) as groups:
        known = Descriptions()
        known._ordered = kcmp
        there: dict[int, int] = {}  # by group
        for _ in range(data.draw(st.integers(0, 25))):
            group = data.draw(st.integers(0, len(groups) - 1))
            number = data.draw(st.sampled_from(groups[group]))
            assert known.find(number) == there.get(group)
            if group not in there:
                known.add(number)
                there[group] = number
            elif data.draw(st.booleans()):
                known.replace(there.pop(group), None)
            else:
                known.replace(there[group], number)
                there[group] = number


def test_without_any_means(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without kcmp(2) and its replacement the fd store is not used: systemd drops duplicates."""

    def fails(*_: int) -> int:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(descriptions, "compare", fails)
    monkeypatch.setattr(descriptions, "is_same", fails)
    with pytest.raises(OSError, match="not implemented"):
        Descriptions()
