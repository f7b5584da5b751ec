"""Stored descriptors keep their numbers in a restart and a takeover; others are moved.

Tests of kernel/renumber.py.
"""

from __future__ import annotations

import os
import re
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from helpers import open_fds
from supervised import DEADLINE, Supervised, lasting, supervised, until

from qmpfd.client.blocking import BlockingClient
from qmpfd.errors import QMPError

#: Code that opens descriptors in each process: at the start, as a .pth file would, or on the import
#: of ctypes, as Python 3.14 does.
OPENERS = {
    "nothing": "",
    "at start": "import os\nfor _ in range(3): os.open('/dev/null', os.O_RDONLY)\n",
    "with ctypes": """
import os, sys
class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "ctypes":
            sys.meta_path.remove(Finder)
            os.memfd_create("libffi")
sys.meta_path.insert(0, Finder)
""",
}


@pytest.fixture(params=OPENERS)
def opener(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, dict[str, str]]:
    """Return the name of an opener, and the environment that makes all processes run it."""
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(OPENERS[request.param])
    return request.param, {"PYTHONPATH": str(folder)}


def by_opaque(client: BlockingClient) -> dict[str, dict[str, Any]]:
    return {fd["opaque"]: fd for fd in lasting(client.execute("query-fds"))}


def fill(client: BlockingClient, count: int) -> None:
    with open("/dev/null") as null:
        for number in range(count):
            client.execute("add-fd", {"opaque": f"n{number}"}, [null])


def assert_same_but_for(
    lost: int, before: dict[str, dict[str, Any]], after: dict[str, dict[str, Any]], log: str
) -> None:
    """Check that all descriptors are back; at most some numbers differ, and the log names them."""
    assert before.keys() == after.keys()
    moved = {
        (before[name]["fd"], after[name]["fd"])
        for name in before
        if before[name]["fd"] != after[name]["fd"]
    }
    assert len(moved) <= lost
    said = re.findall(r"descriptor (\d+) now has the number (\d+):", log)
    assert {(int(old), int(new)) for old, new in said} == moved
    for each in (*before.values(), *after.values()):
        del each["fd"]
    assert before == after


def test_restart(path: Path, opener: tuple[str, dict[str, str]]) -> None:
    what, env = opener
    with supervised(path, env=env) as daemon:
        with daemon.client() as client:
            fill(client, 300)
            before = by_opaque(client)
        daemon.kill_worker()
        with daemon.client() as client:
            after = by_opaque(client)
        assert_same_but_for(3 if what == "at start" else 0, before, after, daemon.log)


def test_restart_with_clients_at_low_numbers(
    path: Path, opener: tuple[str, dict[str, str]]
) -> None:
    """Connections have the numbers at which the next worker inherits the stored descriptors."""
    what, env = opener
    with supervised(path, env=env) as daemon, ExitStack() as stack:
        *_, client = [stack.enter_context(daemon.client()) for _ in range(60)]
        fill(client, 100)
        for number in range(0, 100, 3):
            client.execute("remove-fd", {"fdset-id": number})
        before = by_opaque(client)
        daemon.kill_worker()
        with daemon.client() as client:
            after = by_opaque(client)
        assert_same_but_for(3 if what == "at start" else 0, before, after, daemon.log)


@pytest.mark.parametrize("connections", [0, 60])
def test_restart_with_a_full_table(path: Path, connections: int) -> None:
    with ExitStack() as stack:
        daemon = stack.enter_context(supervised(path, open_files=400))
        for _ in range(connections):
            stack.enter_context(daemon.client())
        client = stack.enter_context(daemon.client())
        with pytest.raises(QMPError):
            fill(client, 400)
        before = by_opaque(client)
        assert len(before) > 200
        daemon.kill_worker()
        with daemon.client() as again:
            after = by_opaque(again)
        assert_same_but_for(0, before, after, daemon.log)


def test_takeover(path: Path, opener: tuple[str, dict[str, str]]) -> None:
    what, env = opener
    with supervised(path) as old, old.client() as client:
        fill(client, 300)
        before = by_opaque(client)
        with supervised(path, "--takeover", env=env) as new:
            _took_over(new)
            assert_same_but_for(3 if what == "at start" else 0, before, by_opaque(client), new.log)
            before = by_opaque(client)
            new.kill_worker()
            with new.client() as again:
                log = new.log[new.log.index("killed by") :]
                assert_same_but_for(3 if what == "at start" else 0, before, by_opaque(again), log)


def test_takeover_with_an_inherited_descriptor_in_the_way(path: Path) -> None:
    """An inherited descriptor, as a shell's script, is moved aside and stays open."""
    with supervised(path) as old, old.client() as client, open("/dev/zero") as stray:
        fill(client, 100)
        before = by_opaque(client)
        number = before["n50"]["fd"]
        os.dup2(stray.fileno(), number)
        try:
            new = supervised(path, "--takeover", pass_fds=[number])
            with new as successor:
                _took_over(successor)
                assert_same_but_for(0, before, by_opaque(client), successor.log)
                assert "/dev/zero" in open_fds(successor.worker()).values()
        finally:
            os.close(number)


@pytest.mark.parametrize("limit", [64, 6])
def test_too_few_open_files(path: Path, limit: int) -> None:
    with supervised(path, open_files=limit, status=2) as daemon:
        assert daemon.process.wait(DEADLINE) == 2
        assert daemon.log.count("\n") == 1
        assert f"128 open files at least, not {limit} (ulimit -n)" in daemon.log


def test_too_many_inherited_descriptors(path: Path) -> None:
    with ExitStack() as stack:
        inherited = [stack.enter_context(open(os.devnull, "rb")).fileno() for _ in range(100)]
        limit = 128 + inherited[0]
        with supervised(path, status=2, pass_fds=inherited, open_files=limit) as daemon:
            assert daemon.process.wait(DEADLINE) == 2
            assert daemon.log.count("\n") == 1
            assert "inherited descriptors are too many" in daemon.log


def _took_over(successor: Supervised) -> None:
    until(lambda: "took over" in successor.log, "the takeover")
