"""``make bench``: all figures are measured, and all replies are valid.  No times are checked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from helpers import ROOT

sys.path.append(str(ROOT / "scripts"))

from benchmark.goals import Goal, goals
from benchmark.load import Run
from benchmark.path import Call, Walk, walk
from benchmark.plan import Cell, Results, Scale, cells
from benchmark.plots import Row, dot_plot
from benchmark.report import as_json, format_goals, format_results, goals_page
from benchmark.servers import KINDS, OTHER, SAME, missing, placement
from benchmark.waits import attacks

#: Options for the smallest run.
_SMALL = ["--quick", "--rounds=1", "--commands=100", "--stored=300", "--clients=4", "--attacks=2"]


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the benchmark as a process."""
    command = [sys.executable, str(ROOT / "scripts" / "bench.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    """JSON of a small run, with the tables as ``text``."""
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
    for drawn in ("cpu-same", "p99-same", "stored"):
        ElementTree.parse(folder / f"report/{drawn}.svg")
    found: dict[str, Any] = json.loads(file.read_text())
    return {**found, "text": text}


@pytest.mark.slow
def test_every_figure_comes_out(report: Mapping[str, Any]) -> None:
    """Each server has one run of each work that it supports; the client has checked the replies."""
    there = [name for name in KINDS if name not in missing()]
    scale = Scale(1, 0, 100, (0, 300), (4,), 1, 1000, 300, 2, 0)
    expected = {
        (cell.server, cell.stored, cell.work, cell.in_flight, cell.clients, cell.place)
        for cell in cells(scale, there, placement())
    }
    output = {
        tuple(cell[name] for name in ("server", "stored", "work", "in-flight", "clients", "cpu"))
        for cell in report["cells"]
    }
    assert output == expected
    for cell in report["cells"]:
        (run,) = cell["runs"]
        assert run["commands"] > 0
        assert run["cpu_ns"] > 0
        assert run["p50_ns"] <= run["p99_ns"] <= run["max_ns"]
    assert set(report["memory"]) == set(there)
    assert set(report["starts"]) == {"bare Python", "qmpfd ls"}
    assert set(report["outages"]) == {"takeover", "supervised crash"}
    assert set(report["attacks"]) == {attack.name for attack in attacks()[:2]}
    assert report["path"]["calls"]


@pytest.mark.slow
def test_every_goal_is_told(report: Mapping[str, Any]) -> None:
    """Only goals that need a missing peer, or a second CPU, are unknown."""
    if not missing() and OTHER in placement():
        assert None not in [goal["met"] for goal in report["goals"]]
    text = report["text"]
    assert all(goal["what"] in text for goal in report["goals"])
    assert all(len(line) <= 100 for line in text.splitlines()), text
    for name, install in missing().items():
        assert f"{KINDS[name].label} is not installed" in text
        assert install in text


def run(microseconds: float) -> Run:
    """Return a run of a hundred commands of *microseconds* each."""
    nanoseconds = int(microseconds * 1000)
    return Run(100, nanoseconds * 100, nanoseconds * 100, 10**9, 1, 2, 3, 4)


SCALE = Scale(3, 100, 100, (0, 15000), (50,), 1, 1000, 10000, 0, 0)


def test_a_ratio_is_the_median_of_the_rounds() -> None:
    """The median ignores a round in which the machine was busy."""
    mine, its = Cell("qmpfd", 0, "pair"), Cell("loop", 0, "pair")
    results = Results({mine: [run(10), run(90), run(12)], its: [run(5), run(5), run(4)]})
    assert results.ratio(mine, its, lambda r: r.cpu_us) == 3
    assert results.ratio(mine, Cell("qemu", 0, "pair"), lambda r: r.cpu_us) is None


def test_a_goal_is_met_or_not_or_not_known() -> None:
    """A goal is met up to its bound, and unknown without its peer."""
    assert Goal("x", 6, 6).met
    assert not Goal("x", 6, 6.1).met
    assert Goal("x", 10, None).met is None
    output = format_goals([Goal("x", 6, 6.1), Goal("y", 6, None)]).splitlines()
    assert output[-2].split() == ["x", "6", "x", "6.1", "x", "NO"]
    assert output[-1].endswith("not known")


def test_each_goal_compares_runs_of_one_shape_and_place() -> None:
    """With equally fast servers, each ratio of two servers is 1."""
    plan = cells(SCALE, list(KINDS), [SAME, OTHER])
    found = goals(Results({cell: [run(10)] for cell in plan}), SCALE)
    ratios = [goal for goal in found if " / " in goal.what]
    assert len(ratios) == 12
    assert {goal.measured for goal in ratios} == {1}


def test_the_page_has_the_goals_of_the_last_figures() -> None:
    """``make figures`` writes page and figures together."""
    figures = json.loads((ROOT / "docs/bench/results.json").read_bytes())
    found = [Goal(g["what"], g["wanted"], g["measured"], g["unit"]) for g in figures["goals"]]
    page = (ROOT / "docs/performance.md").read_text()
    assert goals_page(page, found) == page


def test_a_dot_plot_names_its_figures() -> None:
    """A dot plot has its values as text, for screen readers."""
    rows = [Row("1 x 1", {"qmpfd": 20, "loop": 2.25}), Row("1 x 8", {"qmpfd": 10})]
    picture = ElementTree.fromstring(dot_plot("CPU & time", "us", rows))
    assert picture.attrib["aria-label"] == "CPU & time"
    output = {each.text for each in picture.iter("{http://www.w3.org/2000/svg}title")}
    assert output == {"bare C", "qmpfd", "qmpfd: 20", "bare C: 2.25", "qmpfd: 10"}


def test_without_peers_there_is_still_a_table() -> None:
    """Without peers, their figures are dashes, and their goals unknown."""
    plan = cells(SCALE, ["qmpfd"], [SAME])
    results = Results({cell: [run(10)] for cell in plan}, {"qmpfd": {}})
    found = goals(results, SCALE)
    of_peers = [goal.met for goal in found if "bare" in goal.what or "supervised" in goal.what]
    assert set(of_peers) == {None}
    text = format_results(results, SCALE, ["qmpfd"])
    assert "-" in text
    assert json.loads(as_json(results, SCALE, found))["goals"]


def test_pairs_alone_have_goals_of_their_own() -> None:
    """``--pairs`` measures and judges only pairs of add-fd and remove-fd."""
    scale = Scale(3, 100, 100, (0,), (20,), 0, 0, 0, 0, 0)
    plan = cells(scale, ["trio", "qmpfd"], [SAME])
    assert {cell.work for cell in plan} == {"pair"}
    assert not [g for g in goals(Results(), scale) if "stored" in g.what or "wait" in g.what]


def test_a_peer_does_only_what_it_can() -> None:
    """QEMU serves one client on a monitor; s6-fdholderd takes one command at a time."""
    plan = cells(SCALE, list(KINDS), [SAME])
    assert {cell.clients for cell in plan if cell.server == "qemu"} == {1}
    assert {cell.in_flight for cell in plan if cell.server == "s6"} == {1}
    assert {cell.stored for cell in plan if cell.server in ("loop", "trio")} == {0}


def test_the_path_of_an_add_fd_goes_through_the_floors() -> None:
    """The trace has the calls into the package, from the connection's task to the store."""
    found = walk()
    assert {call.file.split("/")[0] for call in found.calls} >= {"server", "commands", "fdsets"}
    assert found.steps >= 1


def test_a_change_of_file_is_a_call_into_another_one() -> None:
    """Consecutive calls into one file are no change of file."""
    calls = tuple(Call(file, "f") for file in ("a", "a", "b", "a", "c", "c"))
    assert Walk(calls, 1).changes == 3


@pytest.mark.parametrize("arguments", [["--only", "nginx"], ["--rounds", "many"]])
def test_bad_usage(arguments: list[str]) -> None:
    """Bad options give an error, and no run."""
    done = bench(*arguments)
    assert done.returncode == 2
    assert "usage:" in done.stderr


def test_parts_are_documented() -> None:
    """Each file of the benchmark begins with a description."""
    for file in (ROOT / "scripts" / "benchmark").iterdir():
        if file.suffix in (".py", ".c", ".h"):
            assert file.read_text().startswith(('"""', "/* ")), Path(file).name
