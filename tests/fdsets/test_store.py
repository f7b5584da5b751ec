"""The store: fd sets, ids, order, errors and lifetimes.

Tests of fdsets/entry.py and fdsets/expiry.py.
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterator
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from qmpfd.errors import InvalidParameterValue
from qmpfd.fdsets import FdSet, FdSets, Lifetime, StoredFd
from qmpfd.kernel.fd import Fd, close_all


def new_fd() -> Fd:
    return Fd(os.open("/dev/null", os.O_RDONLY))


Listing = list[tuple[int, list[tuple[int, str | None]]]]


def listing(store: FdSets) -> Listing:
    """Return the content of the store in the order of the listing."""
    return [
        (fdset.id, [(number, stored.opaque) for number, stored in fdset.fds.items()])
        for fdset in store
    ]


def close(removed: list[StoredFd]) -> None:
    close_all(stored.fd for stored in removed)


class Store(FdSets):
    """Store with the daemon's calls: select first, then change."""

    def add(self, fd: Fd, *arguments: Any, **named: Any) -> FdSet:
        entries = self.prepare([fd], *arguments, **named)
        self.commit(entries)
        return entries[0].fdset

    def taken(self, entries: list[StoredFd]) -> list[StoredFd]:
        for stored in entries:
            self.pop(stored)
            assert stored.removed
        return entries

    def remove(self, fdset_id: int, number: int | None = None) -> list[StoredFd]:
        fdset = self.get(fdset_id)
        return self.taken([] if fdset is None else fdset.select(number))

    def remove_owned(self, owner: Hashable) -> list[StoredFd]:
        return self.taken(self.owned(owner))

    def remove_expired(self, now: float) -> list[StoredFd]:
        return self.taken(self.expired(now))

    def clear(self) -> list[StoredFd]:
        return self.taken(self.everything())


@pytest.fixture
def store() -> Iterator[Store]:
    store = Store()
    yield store
    close(store.clear())


def add(store: Store, fdset_id: int | None = None, opaque: str | None = None) -> int:
    """Add a descriptor; return its number."""
    fd = new_fd()
    store.add(fd, fdset_id, opaque, create=True)
    return fd.fileno()


def test_lowest_free_id(store: Store) -> None:
    for expected in range(4):
        fd = new_fd()
        assert store.add(fd).id == expected
    close(store.remove(2) + store.remove(1))
    assert [store.add(new_fd()).id for _ in range(3)] == [1, 2, 4]
    add(store, 6)
    assert [store.add(new_fd()).id for _ in range(2)] == [5, 7]


def test_sets_descend_and_fds_are_oldest_first(store: Store) -> None:
    numbers = [add(store, fdset_id, f"o{fdset_id}") for fdset_id in (3, 0, 2**63 - 1, 3, 0)]
    assert listing(store) == [
        (2**63 - 1, [(numbers[2], f"o{2**63 - 1}")]),
        (3, [(numbers[0], "o3"), (numbers[3], "o3")]),
        (0, [(numbers[1], "o0"), (numbers[4], "o0")]),
    ]
    assert len(store) == 3
    assert store.fd_count == 5


def test_a_number_that_is_used_again_is_the_newest(store: Store) -> None:
    first, second = add(store, 0), add(store, 0)
    close(store.remove(0, first))
    assert add(store, 0) == first
    assert listing(store) == [(0, [(second, None), (first, None)])]


@pytest.mark.parametrize("opaque", [None, "", "a\0b", "\U0001f600", "x" * 100_000])
def test_opaque_is_kept(store: Store, opaque: str | None) -> None:
    number = add(store, 0, opaque)
    assert listing(store) == [(0, [(number, opaque)])]


@pytest.mark.parametrize("create", [False, True])
def test_join(store: Store, create: bool) -> None:
    first = add(store, 5)
    fd = new_fd()
    assert store.add(fd, 5, create=create).id == 5
    assert listing(store) == [(5, [(first, None), (fd.fileno(), None)])]


@pytest.mark.parametrize(
    "fdset_id, create, desc",
    [
        (0, False, "Parameter 'fdset-id' expects an existing fdset-id"),
        (-1, False, "Parameter 'fdset-id' expects an existing fdset-id"),
        (-1, True, "Parameter 'fdset-id' expects a non-negative value"),
        (-(2**63), True, "Parameter 'fdset-id' expects a non-negative value"),
    ],
)
def test_add_refused(store: Store, fdset_id: int, create: bool, desc: str) -> None:
    add(store, 3)
    before = listing(store)
    with new_fd() as fd:
        with pytest.raises(InvalidParameterValue) as caught:
            store.add(fd, fdset_id, create=create)
        assert caught.value.desc == desc
        assert not fd.closed  # the caller still owns it
    assert listing(store) == before
    assert store.add(new_fd()).id == 0


def test_add_of_a_closed_fd(store: Store) -> None:
    fd = new_fd()
    fd.close()
    with pytest.raises(ValueError, match="closed"):
        store.add(fd)
    assert listing(store) == []
    assert store.fd_count == 0


def test_remove_returns_what_is_to_be_closed(store: Store) -> None:
    first, second, third = (add(store, 7) for _ in range(3))
    removed = store.remove(7, second)
    assert [stored.fd.fileno() for stored in removed] == [second]
    assert not removed[0].fd.closed
    close(removed)
    assert listing(store) == [(7, [(first, None), (third, None)])]
    removed = store.remove(7)
    assert [stored.fd.fileno() for stored in removed] == [first, third]
    close(removed)
    assert listing(store) == []


def test_a_set_without_fds_is_gone(store: Store) -> None:
    number = add(store, 1)
    close(store.remove(1, number))
    assert len(store) == store.fd_count == 0
    assert store.get(1) is None
    with new_fd() as fd, pytest.raises(InvalidParameterValue):
        store.add(fd, 1)


@pytest.mark.parametrize("fdset_id, number", [(0, None), (-5, None), (4, 0), (4, -1), (4, 2**63)])
def test_not_there(store: Store, fdset_id: int, number: int | None) -> None:
    add(store, 4)
    before = listing(store)
    assert store.remove(fdset_id, number) == []
    assert listing(store) == before


def test_what_is_prepared_changes_nothing(store: Store) -> None:
    add(store, 4, "there")
    before = listing(store)
    for fdset_id in (None, 4, 9):
        with new_fd() as fd, new_fd() as other:
            entries = store.prepare([fd, other], fdset_id, "x", create=True)
            assert [entry.fd for entry in entries] == [fd, other]
            assert (listing(store), store.fd_count, store.next_id) == (before, 1, 0)


def test_clear(store: Store) -> None:
    numbers = {add(store, fdset_id) for fdset_id in (None, None, 1, 9)}
    removed = store.clear()
    assert {stored.fd.fileno() for stored in removed} == numbers
    close(removed)
    assert listing(store) == []
    assert store.fd_count == 0
    assert store.add(new_fd()).id == 0


def test_lifetimes(store: Store) -> None:
    owner = object()
    ours = [store.add(new_fd(), 1, create=True, lifetime=Lifetime(owner=owner)) for _ in range(2)]
    store.add(new_fd(), 1, lifetime=Lifetime(owner=object()))
    store.add(new_fd(), 1, lifetime=Lifetime(expires_at=20.0))
    store.add(new_fd(), 2, create=True, lifetime=Lifetime(owner=owner, expires_at=10.0))
    assert len(ours[0].fds) == 4
    mine, also_mine, other, till_20 = ours[0].fds
    fdset = store.get(2)
    assert fdset is not None
    (till_10,) = fdset.fds
    assert store.expiries.next() == 10.0
    assert store.remove_expired(9.9) == []
    removed = store.remove_expired(10.0)
    assert store.expiries.next() == 20.0
    removed += store.remove_owned(owner)
    assert store.remove_owned(owner) == []
    assert store.remove_owned("nobody") == []
    removed += store.remove(1, other)
    removed += store.remove_expired(1e9)
    numbers = [stored.fd.fileno() for stored in removed]
    assert numbers == [till_10, mine, also_mine, other, till_20]
    assert store.expiries.next() is None
    close(removed)
    assert listing(store) == []


def test_expiries_are_counted_and_do_not_pile_up(store: Store) -> None:
    for time in range(1, 11):
        store.add(new_fd(), 0, create=True, lifetime=Lifetime(expires_at=time))
    fdset = store.get(0)
    assert fdset is not None
    numbers = list(fdset.fds)
    close(store.remove_expired(2))
    assert (len(store.expiries), store.expiries.next()) == (8, 3)
    for removed, number in enumerate(numbers[2:], 1):
        close(store.remove(0, number))
        assert len(store.expiries) == 8 - removed
        assert store.expiries.next() == (None if removed == 8 else 3 + removed)
    remaining = store.add(new_fd(), 1, create=True, lifetime=Lifetime(expires_at=5))
    for _ in range(500):  # without any expiry or query of the next one
        store.add(new_fd(), 0, create=True, lifetime=Lifetime(expires_at=1000))
        close(store.remove(0))
    assert len(store.expiries) == 1
    assert len(store.expiries._heap) <= 3
    assert [stored.fd.fileno() for stored in remaining.fds.values()] != []
    assert store.expiries.next() == 5


class Machine(RuleBasedStateMachine):
    """Random calls, compared with a model of plain lists."""

    ids = st.integers(-1, 6) | st.sampled_from([2**63 - 1])

    def __init__(self) -> None:
        super().__init__()
        self.store = Store()
        self.model: list[tuple[int, Fd, str | None, Hashable, float | None]] = []
        self.now = 0.0

    def used(self) -> set[int]:
        return {entry[0] for entry in self.model}

    def expect(self, removed: list[StoredFd], gone: list[Fd]) -> None:
        assert [stored.fd for stored in removed] == gone
        assert not any(fd.closed for fd in gone)
        self.model = [entry for entry in self.model if entry[1] not in gone]
        close(removed)

    @rule(
        fdset_id=st.none() | ids,
        opaque=st.none() | st.text(max_size=2),
        create=st.booleans(),
        owner=st.none() | st.sampled_from("AB"),
        seconds=st.sampled_from([None, 1, 2, 3, 5, 8]),
    )
    def add(
        self,
        fdset_id: int | None,
        opaque: str | None,
        create: bool,
        owner: str | None,
        seconds: int | None,
    ) -> None:
        fd = new_fd()
        used = self.used()
        expires_at = None if seconds is None else self.now + seconds
        lifetime = Lifetime(owner, expires_at)
        if fdset_id is not None and fdset_id not in used and (fdset_id < 0 or not create):
            with fd, pytest.raises(InvalidParameterValue):
                self.store.add(fd, fdset_id, opaque, create=create, lifetime=lifetime)
            return
        expected = fdset_id
        if expected is None:
            expected = next(n for n in range(len(used) + 1) if n not in used)
            assert self.store.next_id == expected
        fdset = self.store.add(fd, fdset_id, opaque, create=create, lifetime=lifetime)
        assert fdset.id == expected
        self.model.append((expected, fd, opaque, owner, expires_at))

    @rule(fdset_id=ids)
    def remove_set(self, fdset_id: int) -> None:
        gone = [entry[1] for entry in self.model if entry[0] == fdset_id]
        self.expect(self.store.remove(fdset_id), gone)

    @rule(data=st.data())
    def remove_one(self, data: st.DataObject) -> None:
        if not self.model:
            return
        fdset_id, fd, *_ = data.draw(st.sampled_from(self.model))
        self.expect(self.store.remove(fdset_id, fd.fileno()), [fd])

    @rule(fdset_id=ids, data=st.data())
    def remove_from_another_set(self, fdset_id: int, data: st.DataObject) -> None:
        numbers = [fd.fileno() for n, fd, *_ in self.model if n != fdset_id]
        number = data.draw(st.sampled_from([*numbers, -1, 2**31]))
        assert self.store.remove(fdset_id, number) == []

    @rule(owner=st.sampled_from("AB"))
    def end_connection(self, owner: str) -> None:
        gone = [entry[1] for entry in self.model if entry[3] == owner]
        self.expect(self.store.remove_owned(owner), gone)

    @rule(seconds=st.integers(0, 3))
    def wait(self, seconds: int) -> None:
        self.now += seconds
        timed = [entry for entry in self.model if entry[4] is not None and entry[4] <= self.now]
        timed.sort(key=lambda entry: entry[4] or 0.0)
        self.expect(self.store.remove_expired(self.now), [entry[1] for entry in timed])

    @invariant()
    def same(self) -> None:
        expected: Listing = [
            (n, [(fd.fileno(), opaque) for m, fd, opaque, *_ in self.model if m == n])
            for n in sorted(self.used(), reverse=True)
        ]
        assert listing(self.store) == expected
        assert self.store.fd_count == len(self.model)
        assert len(self.store) == len(self.used())
        times = [entry[4] for entry in self.model if entry[4] is not None]
        assert self.store.expiries.next() == min(times, default=None)
        assert len(self.store.expiries) == len(times)

    def teardown(self) -> None:
        close(self.store.clear())
        assert listing(self.store) == []


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
