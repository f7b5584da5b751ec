"""The measurements of the benchmark: which work, on which servers, with how many fds stored."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from pathlib import Path

from . import load, waits
from .load import Run
from .path import Walk, walk
from .servers import KINDS, SAME, Failed, Server, Servers, environment

#: Numbers of commands in flight of a single client.
IN_FLIGHT = (1, 8, 64)
#: Descriptors of one ``add-fds``: the most that one message can carry (unix(7), SCM_MAX_FD).
BATCH = 253


@dataclass(frozen=True)
class Scale:
    """Amount of work in one benchmark.

    Args:
        rounds: number of rounds; each round measures every cell once.
        milliseconds: approximate duration of one run.
        commands: most commands in one run.
        steps: numbers of descriptors stored, ascending from 0.
        clients: numbers of clients with one command in flight each.
        starts: starts of a bare Python, and of ``qmpfd ls``, in a round.
        slow_most: most descriptors stored in a server whose commands get slower with each.
        outage: number of descriptors stored during a takeover and a crash.
        attacks: number of kinds of attacks.
        attack: duration of one attack in seconds.
    """

    rounds: int
    milliseconds: int
    commands: int
    steps: tuple[int, ...]
    clients: tuple[int, ...]
    starts: int
    slow_most: int
    outage: int
    attacks: int
    attack: float

    @property
    def most(self) -> int:
        """Largest number of descriptors stored."""
        return self.steps[-1]


@dataclass(frozen=True)
class Cell:
    """One cell of the result tables: a kind of work on a server.

    Args:
        server: name in KINDS.
        stored: number of descriptors that the server holds.
        work: a WORK of ``load.c``, or ``worst wait``.
        in_flight: commands in flight of each client.
        clients: number of clients.
        place: CPU of the clients, SAME or OTHER.
    """

    server: str
    stored: int
    work: str
    in_flight: int = 1
    clients: int = 1
    place: str = SAME


@dataclass
class Results:
    """All measurements: a run for each cell and round, and the other figures by name."""

    runs: dict[Cell, list[Run]] = field(default_factory=dict)
    #: Bytes, by server and by kind of object.
    memory: dict[str, dict[str, float]] = field(default_factory=dict)
    #: CPU seconds of each start of a bare Python, and of ``qmpfd ls``.
    starts: dict[str, list[float]] = field(default_factory=dict)
    #: The longest wait of a client, in seconds, of each round: in a takeover, and in a crash.
    outages: dict[str, list[float]] = field(default_factory=dict)
    #: The longest wait of a client, in seconds, by the attack beside it.
    attacks: dict[str, float] = field(default_factory=dict)
    #: The Python calls of one add-fd; None if they were not counted.
    walk: Walk | None = None

    def each(self, cell: Cell, value: Callable[[Run], float]) -> list[float]:
        """Return the value of each run of *cell*; an empty list if the cell was not measured."""
        return [value(run) for run in self.runs.get(cell, ())]

    def median(self, cell: Cell, value: Callable[[Run], float]) -> float | None:
        """Return the median of a value over all rounds; None if the cell was not measured."""
        values = self.each(cell, value)
        return statistics.median(values) if values else None

    def ratio(self, cell: Cell, other: Cell, value: Callable[[Run], float]) -> float | None:
        """Return the median, over the rounds, of *cell*'s value divided by *other*'s."""
        mine, its = self.each(cell, value), self.each(other, value)
        if not mine or not its:
            return None
        return statistics.median(a / b for a, b in zip(mine, its, strict=True))


def pairs(scale: Scale, place: str) -> list[Cell]:
    """Return the cells of add-fd and remove-fd, by clients and requests in flight."""
    one = [Cell("", 0, "pair", in_flight, place=place) for in_flight in IN_FLIGHT]
    return one + [Cell("", 0, "pair", clients=clients, place=place) for clients in scale.clients]


def cells(scale: Scale, names: list[str], places: Collection[str]) -> list[Cell]:
    """Return all cells that the servers support, ordered by work, then by server: a server can
    close the connections of its last run before it is measured again.
    """
    wanted = [cell for place in places for cell in pairs(scale, place)]
    if scale.most:
        wanted += [
            *(Cell("", stored, "pair") for stored in scale.steps[1:]),
            *(Cell("", stored, "query") for stored in scale.steps),
            *(Cell("", scale.steps[1], "open", in_flight) for in_flight in IN_FLIGHT),
            Cell("", 0, "stock"),
            Cell("", scale.most, "worst wait", clients=2),
        ]
    found = []
    for cell in wanted:
        for name in names:
            kind = KINDS[name]
            work = "query" if cell.work == "worst wait" else cell.work
            if work not in kind.works or cell.clients > kind.most_clients:
                continue
            if cell.in_flight > 1 and not kind.pipelines:
                continue
            if cell.stored > scale.slow_most and kind.slow_when_full:
                continue
            if cell.stored and not kind.keeps:
                continue
            found.append(replace(cell, server=name))
    return found


def stocked(servers: Servers, name: str, stored: int, batch: int = 1) -> Server:
    """Start a server and store descriptors in it, *batch* in each set."""
    server = servers.start(name, stored)
    fill(servers, server, stored, batch)
    return server


def fill(servers: Servers, server: Server, stored: int, batch: int = 1) -> None:
    """Store *stored* descriptors in a server, *batch* in each set."""
    if stored:
        in_flight = 32 if server.kind.pipelines else 1
        shape = {"commands": stored // batch, "fds": batch, "in_flight": in_flight}
        load.run(servers, server, "fill", SAME, **shape)


def measure(servers: Servers, server: Server, cell: Cell, scale: Scale) -> Run:
    """Run one cell once."""
    limits = {"milliseconds": scale.milliseconds, "commands": scale.commands}
    expect = {"expect": cell.stored} if server.kind.keeps else {}
    if cell.work == "worst wait":
        lasting = {"milliseconds": scale.milliseconds + 50, **expect}
        return load.run_beside(servers, server, lasting, **limits)
    if cell.work == "stock":
        messages, batch = (4, BATCH) if server.kind.batches else (BATCH, 1)
        limits.update(commands=messages, fds=batch)
        return load.run(servers, server, "stock", SAME, **limits)
    if cell.work == "query":
        limits.update(expect)
    shape = {"clients": cell.clients, "in_flight": cell.in_flight}
    return load.run(servers, server, cell.work, cell.place, **limits, **shape)


def measure_memory(servers: Servers, name: str, scale: Scale) -> dict[str, float]:
    """Return the bytes per idle connection and per stored descriptor of freshly started servers."""
    kind = KINDS[name]
    clients = min(scale.clients[-1], kind.most_clients - 1)
    found: dict[str, float] = {}
    if clients > 1:
        server = _warm(servers, name)
        before = server.resident()
        with load.idle(servers, server, clients):
            server.settle()
            found["idle connection"] = (server.resident() - before) / clients
    if kind.keeps:
        most = min(scale.most, 2000) if kind.slow_when_full else scale.most
        whole = -(-most // BATCH) * BATCH
        for what, batch in (("stored fd", BATCH), ("stored fd, a set each", 1)):
            if batch == 1 or kind.batches:
                server = _warm(servers, name)
                before = server.resident()
                fill(servers, server, whole, batch)
                server.settle()
                found[what] = (server.resident() - before) / whole
    return found


def _warm(servers: Servers, name: str) -> Server:
    server = servers.start(name, 0)
    load.run(servers, server, "pair", commands=400)
    server.settle()
    return server


def measure_starts(servers: Servers, server: Server, scale: Scale) -> dict[str, list[float]]:
    """Return the CPU seconds of runs of a bare Python and of ``qmpfd ls``, in alternation."""
    script = Path(sys.executable).with_name("qmpfd")
    qmpfd = [str(script)] if script.exists() else [sys.executable, "-m", "qmpfd"]
    commands = {
        "bare Python": [sys.executable, "-c", "pass"],
        "qmpfd ls": [*qmpfd, "ls", "--socket", str(server.path)],
    }
    found: dict[str, list[float]] = {name: [] for name in commands}
    for turn in range(scale.starts + 1):
        for name, command in commands.items():
            taken = _cpu_of(command)
            if turn:  # the first run may have written bytecode files
                found[name].append(taken)
    return found


def _cpu_of(command: list[str]) -> float:
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=environment()
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise Failed(f"{command[-1]} ends with status {process.returncode}")
    return usage.ru_utime + usage.ru_stime


def measure_outages(
    servers: Servers, scale: Scale, results: Results, progress: Callable[[str], None]
) -> None:
    """Measure the longest waits in takeovers, each by the successor of the last, and in crashes."""
    server = stocked(servers, "qmpfd", scale.outage)
    supervised = stocked(servers, "supervised", scale.outage)
    results.outages = {"takeover": [], "supervised crash": []}
    for number in range(scale.rounds):
        progress(f"round {number + 1} of {scale.rounds}: takeover and crash")
        waited, server = waits.takeover(servers, server)
        results.outages["takeover"].append(waited)
        results.outages["supervised crash"].append(waits.crash(servers, supervised))


def measure_all(
    servers: Servers, scale: Scale, names: list[str], progress: Callable[[str], None]
) -> Results:
    """Run all measurements: the cells round by round, then memory, outages, attacks, the trace."""
    results = Results()
    plan = cells(scale, names, servers.cpus)
    running: dict[tuple[str, int], Server] = {}
    for cell in plan:
        key = (cell.server, cell.stored)
        if key not in running:
            progress(f"starting {cell.server} with {cell.stored} descriptors stored")
            running[key] = stocked(servers, *key)
    for number in range(scale.rounds):
        for cell in plan:
            what = f"{cell.work}, {cell.clients} x {cell.in_flight}, {cell.stored} stored"
            progress(f"round {number + 1} of {scale.rounds}: {cell.server}: {what}")
            server = running[cell.server, cell.stored]
            results.runs.setdefault(cell, []).append(measure(servers, server, cell, scale))
        if "qmpfd" in names and scale.starts:
            progress(f"round {number + 1} of {scale.rounds}: qmpfd ls")
            taken = measure_starts(servers, running["qmpfd", 0], scale)
            for name, values in taken.items():
                results.starts.setdefault(name, []).append(statistics.median(values))
    if scale.most:
        for name in names:
            progress(f"memory of {name}")
            results.memory[name] = measure_memory(servers, name, scale)
        if "qmpfd" in names:
            measure_outages(servers, scale, results, progress)
            for attack in waits.attacks()[: scale.attacks]:
                progress(f"attack: {attack.name}")
                server = stocked(servers, "qmpfd", attack.stored)
                results.attacks[attack.name] = waits.beside(servers, server, attack, scale.attack)
                servers.end(server)
    if "qmpfd" in names:
        progress("the calls of one add-fd")
        results.walk = walk()
    return results


def timed(since: float) -> str:
    """Return the time since *since* (time.monotonic) as text."""
    return f"{time.monotonic() - since:.0f} s"
