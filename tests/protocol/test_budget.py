"""Budget: which connection is the victim when the sum is too large."""

from __future__ import annotations

from functools import partial

from qmpfd.protocol.budget import Budget

PART = 1000


def test_the_oldest_of_the_user_that_has_the_most() -> None:
    """The victim is the oldest connection of the uid with the most, never another uid's."""
    budget = Budget(100 * PART)
    victims: list[tuple[int, int]] = []
    budget.charge(partial(victims.append, (0, 0)), 0, PART)
    for number in range(700):
        budget.charge(partial(victims.append, (1000, number)), 1000, PART)
    assert victims == [(1000, number) for number in range(700 - 99)]
    budget.charge(partial(victims.append, (1001, 0)), 1001, PART)
    assert victims[-1] == (1000, 601)


def test_a_refunded_charge_does_not_count() -> None:
    budget = Budget(100 * PART)
    victims: list[int] = []
    users = [partial(victims.append, n) for n in range(151)]
    for user in users[:100]:
        budget.charge(user, 0, PART)
    for user in users[:50]:
        budget.charge(user, 0, 0)
        budget.charge(user, 0, 0)  # no effect
    for user in users[100:150]:
        budget.charge(user, 1, PART)
    assert victims == []
    budget.charge(users[150], 1, PART)
    assert victims == [100]


def test_a_second_charge_replaces_the_first() -> None:
    budget = Budget(3 * PART)
    victims: list[int] = []
    first, second = (partial(victims.append, n) for n in range(2))
    budget.charge(first, 0, PART)
    budget.charge(second, 0, PART)
    budget.charge(first, 0, 2 * PART)
    assert (victims, budget.used) == ([], 3 * PART)
    budget.charge(first, 0, 3 * PART)
    assert (victims, budget.used) == ([1], 3 * PART)
