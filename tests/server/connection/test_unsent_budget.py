"""Who is disconnected when too much waits to be sent in all."""

from __future__ import annotations

from functools import partial

from qmpfd.limits import MAX_UNSENT_BYTES
from qmpfd.server.connection.unsent_budget import UnsentBudget

PART = MAX_UNSENT_BYTES // 100


def test_the_oldest_of_the_user_that_has_the_most() -> None:
    """However many do not read, another user's connection is not disconnected for them."""
    budget = UnsentBudget()
    victims: list[tuple[int, int]] = []
    budget.begin(0, PART, partial(victims.append, (0, 0)))
    for number in range(700):
        budget.begin(1000, PART, partial(victims.append, (1000, number)))
    assert victims == [(1000, number) for number in range(700 - 99)]
    budget.begin(1001, PART, partial(victims.append, (1001, 0)))
    assert victims[-1] == (1000, 601)


def test_what_was_sent_does_not_count() -> None:
    budget = UnsentBudget()
    victims: list[int] = []
    tokens = [budget.begin(0, PART, partial(victims.append, n)) for n in range(100)]
    for token in tokens[:50]:
        budget.end(0, token)
        budget.end(0, token)  # harmless
    for number in range(100, 150):
        budget.begin(1, PART, partial(victims.append, number))
    assert victims == []
    budget.begin(1, PART, partial(victims.append, 150))
    assert victims == [100]


def test_one_alone_may_have_more() -> None:
    budget = UnsentBudget()
    victims: list[int] = []
    token = budget.begin(0, 2 * MAX_UNSENT_BYTES, partial(victims.append, 0))
    assert victims == []
    budget.end(0, token)
    budget.begin(0, PART, partial(victims.append, 1))
    assert victims == []
