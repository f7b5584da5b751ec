"""Floods of bytes, requests, errors, descriptors, incomplete messages and connections."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from helpers import request, value

from .attacks import STREAMS
from .harness import SECONDS, Harness, assert_service_unharmed

#: Connections of each attacking process; more processes would leave the daemon no CPU.
_CONNECTIONS = 6


#: Streams of the usual run; with QMPFD_FAULT_SECONDS set, all are tested.
_QUICK = (
    *("lines", "closers", "tokens", "schemas", "unclaimed", "adds", "opened", "watching"),
    *("ids", "text", "members"),
)


@pytest.mark.parametrize("kind", STREAMS if "QMPFD_FAULT_SECONDS" in os.environ else _QUICK)
def test_taken_as_fast_as_they_come(kind: str, path: Path) -> None:
    """Clients flood the daemon and read the replies: nothing slows them down."""

    def scenario(harness: Harness) -> None:
        harness.attack(f"reading:{kind}", _CONNECTIONS)
        time.sleep(SECONDS)

    assert_service_unharmed(path, scenario)


@pytest.mark.parametrize("kind", ["requests", "schemas", "closers", "opened", "watching"])
def test_never_read(kind: str, path: Path) -> None:
    """Clients flood the daemon and read no replies."""

    def scenario(harness: Harness) -> None:
        # Few clients: the daemon executes what killed clients have sent, which takes time.
        harness.attack(f"deaf:{kind}", {"closers": 6, "watching": 6}.get(kind, 50))
        time.sleep(SECONDS)

    assert_service_unharmed(path, scenario)


def test_many_never_read(path: Path) -> None:
    """200 clients open descriptors and read no replies."""

    def scenario(harness: Harness) -> None:
        harness.attack("deaf:opened", 200)
        time.sleep(2 * SECONDS)

    assert_service_unharmed(path, scenario)


@pytest.mark.parametrize("each", [1, 250], ids=["many sets", "large sets"])
def test_long_listings(each: int, path: Path) -> None:
    """Forty clients list 5000 descriptors repeatedly; half of them read the replies."""

    def scenario(harness: Harness) -> None:
        caller = harness.caller()
        for _ in range(5000 // each):
            value(caller.call("add-fds", None, [0] * each))
        harness.attack("reading:listings", 20)
        harness.attack("deaf:listings", 20)
        time.sleep(2 * SECONDS)

    assert_service_unharmed(path, scenario)


def test_many_watch(path: Path) -> None:
    """100 clients watch a set of 4000 descriptors come and go; half of them read the events."""

    def scenario(harness: Harness) -> None:
        caller = harness.caller()
        for number in range(100):
            watcher = harness.caller()
            watcher.send(request("watch-fdsets", {"enable": True}))
            if number % 2:  # the others read nothing
                assert value(watcher.reply()) == {}
        info = value(caller.call("add-fds", None, [0] * 250))
        for _ in range(15):
            value(caller.call("add-fds", {"fdset-id": info["fdset-id"]}, [0] * 250))
        value(caller.call("remove-fd", {"fdset-id": info["fdset-id"]}))
        time.sleep(SECONDS)

    assert_service_unharmed(path, scenario)


def test_thousands_end_together(path: Path) -> None:
    def scenario(harness: Harness) -> None:
        harness.attack("fleeting", 4000)
        time.sleep(1 + 2 * SECONDS)

    assert_service_unharmed(path, scenario)


def test_never_read_long_listings(path: Path) -> None:
    """80 clients do not read listings of 2 MB: the daemon must limit the sum of unsent replies."""

    def scenario(harness: Harness) -> None:
        caller = harness.caller()
        for _ in range(40):
            value(caller.call("add-fd", {"opaque": "x" * 50_000}, [0]))
        for _ in range(80):
            harness.caller().send(request("query-fdsets"))
        time.sleep(SECONDS)
        assert len(value(caller.call("query-fdsets"))) == 40

    assert_service_unharmed(path, scenario)


def test_never_read_and_cut_off(path: Path) -> None:
    def scenario(harness: Harness) -> None:
        harness.attack("deaf:schemas", _CONNECTIONS)
        time.sleep(0.7 + SECONDS)

    assert_service_unharmed(path, scenario, "--write-timeout", "0.5")


def test_half_messages(path: Path) -> None:
    """80 incomplete requests of up to 1 MiB each: more than the limit on all of them."""

    def scenario(harness: Harness) -> None:
        harness.attack("half", 80)
        time.sleep(2 * SECONDS)

    assert_service_unharmed(path, scenario)


def test_connections(path: Path) -> None:
    def scenario(harness: Harness) -> None:
        for _ in range(2):
            harness.attack("connections")
        time.sleep(SECONDS)

    assert_service_unharmed(path, scenario)


def test_more_connections_than_there_may_be(path: Path) -> None:
    def scenario(harness: Harness) -> None:
        harness.attack("holding", 300)
        for _ in range(2):
            harness.attack("connections")
        time.sleep(SECONDS)

    assert_service_unharmed(path, scenario, "--max-connections", "200")


def test_connections_held(path: Path) -> None:
    def scenario(harness: Harness) -> None:
        harness.attack("holding", 1500)
        time.sleep(SECONDS / 2)

    assert_service_unharmed(path, scenario)


def test_everything_at_once(path: Path) -> None:
    def scenario(harness: Harness) -> None:
        for kind in ("reading:closers", "deaf:schemas", "half"):
            harness.attack(kind, 6)
        time.sleep(2 * SECONDS)

    assert_service_unharmed(path, scenario)
