"""Pool of fd set ids: the lowest free id."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from qmpfd.fdsets import IdPool


def lowest_free(used: set[int]) -> int:
    return next(number for number in range(len(used) + 1) if number not in used)


def test_from_zero_without_gaps() -> None:
    used: set[int] = set()
    ids = IdPool(used)
    for number in range(100):
        assert ids.lowest() == ids.lowest() == number
        used.add(number)


def test_lowest_gap_first() -> None:
    used = set(range(10))
    ids = IdPool(used)
    assert ids.lowest() == 10
    for number in (7, 3, 5, 9):
        used.remove(number)
        ids.free(number)
    assert ids.lowest() == 3
    used.add(3)
    assert ids.lowest() == 5
    used.add(5)
    used.add(7)  # named by a command
    assert ids.lowest() == 9


@given(st.lists(st.tuples(st.sampled_from(["auto", "use", "free"]), st.integers(0, 12))))
def test_against_counting(steps: list[tuple[str, int]]) -> None:
    used: set[int] = set()
    ids = IdPool(used)
    for what, number in steps:
        if what == "auto":
            free = ids.lowest()
            assert free == lowest_free(used)
            used.add(free)
        elif what == "use":
            used.add(number)
        elif number in used:
            used.remove(number)
            ids.free(number)
    assert ids.lowest() == lowest_free(used)


def test_cost_does_not_grow_with_what_is_stored() -> None:
    """The number of look-ups stays small; a search from zero would need half a billion."""

    class Counting(set[int]):
        lookups = 0

        def __contains__(self, item: object) -> bool:
            self.lookups += 1
            return super().__contains__(item)

    used = Counting()
    ids = IdPool(used)
    for _ in range(30_000):
        used.add(ids.lowest())
    for number in range(0, 30_000, 3):
        used.remove(number)
        ids.free(number)
    for _ in range(10_000):
        used.add(ids.lowest())
    assert ids.lowest() == 30_000
    assert used.lookups < 200_000


def test_memory_does_not_grow_with_what_was_done() -> None:
    used = {0, 1}
    ids = IdPool(used)
    assert ids.lowest() == 2
    for _ in range(1000):
        used.remove(0)
        ids.free(0)
        used.add(0)  # named by a command: the pool is not called
    assert len(ids._gaps) == len(ids._known_gaps) == 1
