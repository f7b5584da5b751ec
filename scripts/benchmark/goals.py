"""Upper bounds for the daemon's figures: mostly ratios within one run, because machines differ."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace

from .load import Run
from .plan import Cell, Results, Scale
from .servers import OTHER, SAME

#: Upper bounds of qmpfd's CPU time divided by bare Trio's, by requests in flight: one client, on
#: the server's CPU.
_IN_FLIGHT = {1: 2.0, 8: 1.4, 64: 1.0}
#: Upper bounds of the CPU time of ``--supervise`` (parent and worker) divided by the unsupervised
#: daemon's, by clients and requests in flight.  None: the first number of the scale's clients.
_SUPERVISED = {(1, 1): 2.5, (None, 1): 2.0, (1, 64): 1.8}

#: Half of the 75 calls and 52 changes of file that one add-fd took in the previous version.
_CALLS, _CHANGES = 37, 26


@dataclass(frozen=True)
class Goal:
    """One goal, and the value measured.

    Args:
        what: description of the figure.
        wanted: upper bound of the figure.
        measured: the value; None if a peer is not installed.
        unit: unit of both values.
    """

    what: str
    wanted: float
    measured: float | None
    unit: str = "x"

    @property
    def met(self) -> bool | None:
        """Whether the value is within the bound; None if it was not measured."""
        return None if self.measured is None else self.measured <= self.wanted


def cpu(run: Run) -> float:
    """Return the server's CPU time per command, in microseconds."""
    return run.cpu_us


def p50(run: Run) -> float:
    """Return the median round trip in nanoseconds."""
    return run.p50_ns


def p99(run: Run) -> float:
    """Return the 99th percentile of the round trips in nanoseconds."""
    return run.p99_ns


def stored_a_second(run: Run) -> float:
    """Return the number of add commands per second of CPU time."""
    return run.commands / 2 * 1e9 / run.cpu_ns


def turned_over_a_second(run: Run) -> float:
    """Return the number of pairs of add and remove commands per second of CPU time."""
    return run.commands / 2 * 1e9 / (run.cpu_ns + run.removal_cpu_ns)


def shape(cell: Cell) -> str:
    """Return a label: clients x requests in flight of each."""
    return f"{cell.clients:,} x {cell.in_flight}"


_FIGURES: dict[Callable[[Run], float], str] = {cpu: "CPU", p50: "p50", p99: "p99"}


def _against(
    results: Results, cell: Cell, peer: str, value: Callable[[Run], float], wanted: float
) -> Goal:
    """Return the goal that *cell*'s value is at most *wanted* times the peer's."""
    where = {SAME: "same CPU", OTHER: "other CPU"}[cell.place]
    label = {"trio": "bare Trio", "loop": "bare C", "qmpfd": "unsupervised"}[peer]
    subject = "supervised, " if cell.server == "supervised" else ""
    what = f"{subject}{shape(cell)}, {where}: {_FIGURES[value]} / {label}"
    return Goal(what, wanted, results.ratio(cell, replace(cell, server=peer), value))


def _commands(results: Results, scale: Scale) -> list[Goal]:
    """Return the goals for CPU time and round trips of add-fd and remove-fd."""
    one = Cell("qmpfd", 0, "pair")
    alone, crowds = (
        replace(one, place=OTHER),
        [replace(one, clients=clients) for clients in scale.clients],
    )
    return [
        *(_against(results, replace(c, place=OTHER), "trio", cpu, 1.5) for c in crowds),
        *(_against(results, crowd, "trio", p99, 2) for crowd in crowds),
        _against(results, alone, "trio", cpu, 1.4),
        _against(results, alone, "loop", p50, 1.25),
        *(
            _against(results, replace(one, in_flight=in_flight), "trio", cpu, wanted)
            for in_flight, wanted in _IN_FLIGHT.items()
        ),
        *(
            _against(
                results,
                Cell("supervised", 0, "pair", in_flight, clients or scale.clients[0], OTHER),
                "qmpfd",
                cpu,
                wanted,
            )
            for (clients, in_flight), wanted in _SUPERVISED.items()
        ),
    ]


def _path(results: Results) -> list[Goal]:
    """Return the goals for the Python calls of one add-fd."""
    found = results.walk
    calls, changes = (None, None) if found is None else (len(found.calls), found.changes)
    return [
        Goal("Python calls of one add-fd", _CALLS, calls, unit=""),
        Goal("changes of file of one add-fd", _CHANGES, changes, unit=""),
    ]


def _waits(results: Results, scale: Scale) -> list[Goal]:
    """Return the goals for the longest waits: medians of the rounds, and the worst attack."""
    slowest = max(results.attacks.values(), default=None)
    found = []
    for what, wanted in {"takeover": 100, "supervised crash": 200}.items():
        each = results.outages.get(what)
        waited = statistics.median(each) * 1e3 if each else None
        found.append(Goal(f"longest wait: {what}, {scale.outage:,} stored", wanted, waited, "ms"))
    what = "longest wait: one a millisecond, beside each attack"
    return [*found, Goal(what, 100, slowest and slowest * 1e3, "ms")]


def _stored(results: Results, scale: Scale) -> list[Goal]:
    """Return the goals for a full store, memory, and the start of ``qmpfd ls``."""
    few, full = Cell("qmpfd", 0, "pair"), Cell("qmpfd", scale.most, "pair")
    wait = results.median(Cell("qmpfd", scale.most, "worst wait", clients=2), lambda r: r.max_ns)
    memory = results.memory.get("qmpfd", {})
    idle = memory.get("idle connection")
    starts = zip(*(results.starts.get(n, ()) for n in ("qmpfd ls", "bare Python")), strict=True)
    ratios = [ls / python for ls, python in starts]
    return [
        Goal(
            f"round trip (p50) with {scale.most:,} stored / with none",
            1.25,
            results.ratio(full, few, p50),
        ),
        Goal(f"CPU with {scale.most:,} stored / with none", 1.25, results.ratio(full, few, cpu)),
        Goal(
            f"longest wait: {scale.most:,} are listed",
            10,
            None if wait is None else wait / 1e6,
            unit="ms",
        ),
        Goal("memory per idle connection", 12, idle and idle / 1024, unit="KiB"),
        *(
            Goal(f"memory per {what}", 400, memory.get(what), unit="B")
            for what in ("stored fd", "stored fd, a set each")
        ),
        Goal(
            "qmpfd ls, in starts of a bare Python",
            3.5,
            statistics.median(ratios) if ratios else None,
        ),
    ]


def goals(results: Results, scale: Scale) -> list[Goal]:
    """Return all goals that the results at this scale can be judged by."""
    found = _commands(results, scale) + _path(results)
    return found + _waits(results, scale) + _stored(results, scale) if scale.most else found
