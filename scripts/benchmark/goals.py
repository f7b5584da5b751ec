"""What the daemon is held to: ratios within one run, because machines differ."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from .load import Run
from .plan import BATCH, Cell, Results, Scale


@dataclass(frozen=True)
class Goal:
    """One goal, and how it went.

    Args:
        what: the figure.
        wanted: its bound.
        at_least: whether it must not be below the bound, or else not above.
        unit: of the figure.
        measured: the figure; None if a peer is missing.
    """

    what: str
    wanted: float
    measured: float | None
    at_least: bool = False
    unit: str = "x"

    @property
    def met(self) -> bool | None:
        """Whether it is met; None if that is not known."""
        if self.measured is None:
            return None
        return self.measured >= self.wanted if self.at_least else self.measured <= self.wanted


def cpu(run: Run) -> float:
    """CPU time per command."""
    return run.cpu_us


def stored_a_second(run: Run) -> float:
    """Messages of descriptors stored, per second of CPU time."""
    return run.commands / 2 * 1e9 / run.cpu_ns


def turned_over_a_second(run: Run) -> float:
    """Messages of descriptors stored and removed again, per second of CPU time."""
    return run.commands / 2 * 1e9 / (run.cpu_ns + run.removal_cpu_ns)


def _in_flight(results: Results, in_flight: int, wanted: tuple[float, float]) -> list[Goal]:
    """At most so many times the bare C loop, at least so many times less than QEMU."""
    of_loop, of_qemu = wanted
    mine = Cell("qmpfd", 0, "pair", in_flight)
    loop, qemu = (Cell(name, 0, "pair", in_flight) for name in ("loop", "qemu"))
    text = f"add-fd + remove-fd, {in_flight} in flight"
    return [
        Goal(f"{text} / bare C loop", of_loop, results.ratio(mine, loop, cpu)),
        Goal(f"{text}: QEMU / ours", of_qemu, results.ratio(qemu, mine, cpu), at_least=True),
    ]


def _of_s6(results: Results, in_flight: int, wanted: float) -> Goal:
    ratio = results.ratio(Cell("qmpfd", 0, "pair", in_flight), Cell("s6", 0, "pair"), cpu)
    return Goal(f"add-fd + remove-fd, {in_flight} in flight / s6-fdholderd's one", wanted, ratio)


def _batches(results: Results) -> list[Goal]:
    """Descriptors per CPU second: s6-fdholderd takes one a message."""
    mine, its = Cell("qmpfd", 0, "stock"), Cell("s6", 0, "stock")
    found = []
    for text, rate in (("stored", stored_a_second), ("and removed", turned_over_a_second)):
        ratio = results.ratio(mine, its, rate)
        what = f"descriptors per CPU second {text}, {BATCH} a message / s6-fdholderd"
        found.append(Goal(what, 5, ratio and ratio * BATCH, at_least=True))
    return found


def goals(results: Results, scale: Scale) -> list[Goal]:
    """All goals."""
    few, full = Cell("qmpfd", 0, "pair"), Cell("qmpfd", scale.most, "pair")
    many = scale.clients[0]
    crowd, bare = (Cell(name, 0, "pair", clients=many) for name in ("qmpfd", "loop"))
    wait = results.median(Cell("qmpfd", scale.most, "worst wait", clients=2), lambda r: r.max_ns)
    memory = results.memory.get("qmpfd", {})
    idle = memory.get("idle connection")
    starts = zip(*(results.starts.get(n, ()) for n in ("qmpfd ls", "bare Python")), strict=True)
    ratios = [ls / python for ls, python in starts]
    return [
        *_in_flight(results, 1, (6, 10)),
        *_in_flight(results, 8, (4.5, 28)),
        _of_s6(results, 8, 1.25),
        *_in_flight(results, 64, (3.5, 40)),
        _of_s6(results, 64, 1),
        Goal(f"{many} clients / bare C loop with {many}", 8, results.ratio(crowd, bare, cpu)),
        *_batches(results),
        Goal(
            f"round trip (p50) with {scale.most:,} stored / with none",
            1.25,
            results.ratio(full, few, lambda run: run.p50_ns),
        ),
        Goal(f"CPU with {scale.most:,} stored / with none", 1.25, results.ratio(full, few, cpu)),
        Goal(
            f"another's worst wait while {scale.most:,} are listed",
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
