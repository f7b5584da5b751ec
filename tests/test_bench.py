"""``make bench``: every figure comes out, and every reply was right.  Never how long it took."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT

sys.path.append(str(ROOT / "scripts"))

from benchmark.goals import Goal, goals
from benchmark.load import Run
from benchmark.plan import Cell, Results, Scale, cells
from benchmark.report import as_json, tell, tell_goals
from benchmark.servers import KINDS, missing

#: As little as there can be of everything.
_SMALL = ["--quick", "--rounds=1", "--commands=100", "--stored=300", "--clients=4"]


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the bench, as a person would."""
    command = [sys.executable, str(ROOT / "scripts" / "bench.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    """What a small run says, for programs; and for people, under ``text``."""
    absent = missing()
    if absent and os.environ.get("QMPFD_REQUIRE_PEERS"):
        pytest.fail(f"missing: {absent}")
    if "loop" in absent:
        pytest.skip(absent["loop"])
    folder = tmp_path_factory.mktemp("bench")
    file = folder / "bench.json"
    done = bench(*_SMALL, f"--json={file}", f"--report={folder / 'report'}")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert (folder / "report/results.json").read_bytes() == file.read_bytes()
    text = (folder / "report/results.txt").read_text()
    assert done.stdout.startswith(text)
    assert (folder / "report/bench-stored.svg").exists() == ("drawn:" in done.stdout)
    found: dict[str, Any] = json.loads(file.read_text())
    return {**found, "text": text}


@pytest.mark.slow
def test_every_figure_comes_out(report: Mapping[str, Any]) -> None:
    """Each server has one run of each work that it can do; the client has checked the replies."""
    there = [name for name in KINDS if name not in missing()]
    scale = Scale(1, 0, 100, (0, 300), (4,), 1, 1000)
    expected = {
        (cell.server, cell.stored, cell.work, cell.in_flight, cell.clients)
        for cell in cells(scale, there)
    }
    told = {
        tuple(cell[name] for name in ("server", "stored", "work", "in-flight", "clients"))
        for cell in report["cells"]
    }
    assert told == expected
    for cell in report["cells"]:
        (run,) = cell["runs"]
        assert run["commands"] > 0
        assert run["cpu_ns"] > 0
        assert run["p50_ns"] <= run["p99_ns"] <= run["max_ns"]
    assert set(report["memory"]) == set(there)
    assert set(report["starts"]) == {"bare Python", "qmpfd ls"}


@pytest.mark.slow
def test_every_goal_is_told(report: Mapping[str, Any]) -> None:
    """Nothing is left unknown but what a missing peer would tell."""
    if not missing():
        assert None not in [goal["met"] for goal in report["goals"]]
    text = report["text"]
    assert all(goal["what"] in text for goal in report["goals"])
    assert all(len(line) <= 100 for line in text.splitlines()), text
    for name, install in missing().items():
        assert f"{KINDS[name].label} is not installed" in text
        assert install in text


def run(microseconds: float) -> Run:
    """A run of a hundred commands that took so long each."""
    nanoseconds = int(microseconds * 1000)
    return Run(100, nanoseconds * 100, nanoseconds * 100, 10**9, 1, 2, 3, 4)


SCALE = Scale(3, 100, 100, (0, 15000), (50,), 1, 1000)


def test_a_ratio_is_the_median_of_the_rounds() -> None:
    """A round in which the machine was busy does not count."""
    mine, its = Cell("qmpfd", 0, "pair"), Cell("loop", 0, "pair")
    results = Results({mine: [run(10), run(90), run(12)], its: [run(5), run(5), run(4)]})
    assert results.ratio(mine, its, lambda r: r.cpu_us) == 3
    assert results.ratio(mine, Cell("qemu", 0, "pair"), lambda r: r.cpu_us) is None


def test_a_goal_is_met_or_not_or_not_known() -> None:
    """At most, at least, and without the peer it compares with."""
    assert Goal("x", 6, 6).met
    assert not Goal("x", 6, 6.1).met
    assert Goal("x", 10, 10, at_least=True).met
    assert not Goal("x", 10, 9.9, at_least=True).met
    assert Goal("x", 10, None).met is None
    told = tell_goals([Goal("x", 6, 6.1), Goal("y", 6, None)]).splitlines()
    assert told[-2].split() == ["x", "<=", "6", "x", "6.1", "x", "NO"]
    assert told[-1].endswith("not known")


def test_without_peers_there_is_still_a_table() -> None:
    """What is missing is a dash, and no goal about it is known."""
    results = Results({cell: [run(10)] for cell in cells(SCALE, ["qmpfd"])}, {"qmpfd": {}})
    found = goals(results, SCALE)
    assert [goal.met for goal in found if "QEMU" in goal.what] == [None, None, None]
    text = tell(results, SCALE, ["qmpfd"])
    assert "-" in text
    assert json.loads(as_json(results, SCALE, found))["goals"]


def test_a_peer_does_only_what_it_can() -> None:
    """QEMU serves one client a monitor; s6-fdholderd takes one command at a time."""
    plan = cells(SCALE, list(KINDS))
    assert {cell.clients for cell in plan if cell.server == "qemu"} == {1}
    assert {cell.in_flight for cell in plan if cell.server == "s6"} == {1}
    assert {cell.stored for cell in plan if cell.server == "loop"} == {0}


@pytest.mark.parametrize("arguments", [["--only", "nginx"], ["--rounds", "many"]])
def test_bad_usage(arguments: list[str]) -> None:
    """It says so, and does nothing."""
    done = bench(*arguments)
    assert done.returncode == 2
    assert "usage:" in done.stderr


def test_parts_are_documented() -> None:
    """Each file of the bench begins with what it is for."""
    for file in (ROOT / "scripts" / "benchmark").iterdir():
        if file.suffix in (".py", ".c", ".h"):
            assert file.read_text().startswith(('"""', "/* ")), Path(file).name
