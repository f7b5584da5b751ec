"""Quotas of a uid, and what they leave for others."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

import qmpfd
from qmpfd.commands.quotas import Quotas
from qmpfd.errors import GenericError
from qmpfd.kernel.close_pool import ClosePool


@pytest.fixture
def quotas() -> Iterator[Quotas]:
    """Quotas for 100 pending descriptors."""
    closer = ClosePool()
    made = Quotas(qmpfd.Limits(), lambda: 0.0, closer)
    made.waiting_limit = 100
    yield made
    closer.shut_down()


def hoard(quotas: Quotas, uid: int) -> int:
    """Charge pending descriptors to *uid* up to its quota; return their number."""
    count = 0
    while True:
        try:
            quotas.check_waiting(uid, 1)
        except GenericError:
            return count
        quotas.charge_waiting(uid, 1)
        count += 1


def test_however_many_hoard_something_is_left(quotas: Quotas) -> None:
    """Each uid gets half of what is left; root and the daemon's user get all of it."""
    assert hoard(quotas, 1001) == 50
    assert hoard(quotas, 1002) == 25
    assert hoard(quotas, 1003) == 12
    quotas.check_waiting(1004, 1)
    assert hoard(quotas, 0) == 13
    with pytest.raises(GenericError, match="the limit is 100"):
        quotas.check_waiting(os.geteuid(), 1)


def test_a_refund_makes_room(quotas: Quotas) -> None:
    assert hoard(quotas, 1001) == 50
    quotas.charge_waiting(1001, -50)
    assert (quotas.waiting, quotas.waiting_by_uid) == (0, {})
    assert hoard(quotas, 1002) == 50


def test_many_at_once(quotas: Quotas) -> None:
    """The descriptors of a message are charged all or not at all."""
    quotas.check_waiting(1001, 50)
    with pytest.raises(GenericError, match="uid 1001"):
        quotas.check_waiting(1001, 51)
    quotas.check_waiting(0, 100)
    with pytest.raises(GenericError):
        quotas.check_waiting(0, 101)
