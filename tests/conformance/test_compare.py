"""``compare.py``: the comparison ignores the documented differences, and no others."""

from __future__ import annotations

import pytest

from .compare import FdNames, canonical


def same(one: str, other: str) -> bool:
    return canonical_text(one) == canonical_text(other)


def canonical_text(*replies: str) -> list[dict[str, str]]:
    names = FdNames()
    return [canonical(f"{reply}\r\n".encode(), names) for reply in replies]


@pytest.mark.parametrize(
    "one, other",
    [
        ('{"return": {}, "id": 1}', '{"id": 1, "return": {}}'),
        ('{"return": {}, "id": 1e5}', '{"return": {}, "id": 100000}'),
        ('{"return": {}, "id": "\\u00E9"}', '{"return": {}, "id": "\\u00e9"}'),
        (
            '{"error": {"class": "GenericError", "desc": "JSON parse error, expecting value"}}',
            '{"error": {"class": "GenericError", "desc": "JSON parse error, duplicate key"}}',
        ),
        ('{"return": {"fd": 3, "fdset-id": 0}}', '{"return": {"fd": 9, "fdset-id": 0}}'),
    ],
    ids=["key order", "number", "escape", "wording of a parse error", "fd number"],
)
def test_what_is_the_same(one: str, other: str) -> None:
    assert same(one, other)


@pytest.mark.parametrize(
    "one, other",
    [
        ('{"return": {}, "id": 1}', '{"return": {}}'),
        ('{"return": {}, "id": 1}', '{"return": {}, "id": true}'),
        ('{"return": {}, "id": 0}', '{"return": {}, "id": false}'),
        ('{"return": {}, "id": 1}', '{"return": {}, "id": "1"}'),
        ('{"return": {}, "id": null}', '{"return": {}}'),
        (
            '{"return": {}, "id": 18446744073709551615}',
            '{"return": {}, "id": 1.8446744073709552e19}',
        ),
        ('{"return": {}}', '{"return": []}'),
        ('{"error": {"class": "A", "desc": "x"}}', '{"error": {"class": "B", "desc": "x"}}'),
        ('{"error": {"class": "A", "desc": "x"}}', '{"error": {"class": "A", "desc": "y"}}'),
        (
            '{"error": {"class": "A", "desc": "JSON parse error, x"}}',
            '{"error": {"class": "A", "desc": "x"}}',
        ),
        ('{"return": {"fd": 3, "fdset-id": 0}}', '{"return": {"fd": 3, "fdset-id": 1}}'),
    ],
)
def test_what_is_not(one: str, other: str) -> None:
    assert not same(one, other)


def test_descriptors_are_told_apart_by_the_order_they_came_in() -> None:
    added = [f'{{"return": {{"fd": {fd}, "fdset-id": 0}}}}' for fd in (5, 6, 8, 9)]
    listed = '{"return": [{"fdset-id": 0, "fds": [{"fd": %d}, {"fd": %d}]}]}'
    ours = canonical_text(*added[:2], listed % (5, 6))
    assert ours == canonical_text(*added[2:], listed % (8, 9))
    assert ours != canonical_text(*added[2:], listed % (9, 8))
    assert ours != canonical_text(*added[2:], listed % (8, 7))


def test_a_number_may_come_back_or_not() -> None:
    added = '{"return": {"fd": %d, "fdset-id": 0}}'
    gone = '{"error": {"class": "A", "desc": "named \'fdset-id:0, fd:%d\' not found"}}'
    assert canonical_text(added % 5, added % 5, gone % 5) == canonical_text(
        added % 5, added % 6, gone % 6
    )


@pytest.mark.parametrize(
    "line",
    [
        b'{"return": {}}\n',
        b'{"return": "\xc3\xa9"}\r\n',
        b'{"return": {}, "id": NaN}\r\n',
        b'{"return": {}, "return": {}}\r\n',
        b"[]\r\n",
        b"(silence)",
    ],
)
def test_what_no_server_may_send(line: bytes) -> None:
    with pytest.raises(AssertionError):
        canonical(line, FdNames())
