"""Format the results: tables for people, JSON for programs."""

from __future__ import annotations

import os
import platform
import re
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import msgspec

from .goals import Goal, cpu, p50, p99, shape, stored_a_second, turned_over_a_second
from .load import Run
from .plan import BATCH, IN_FLIGHT, Cell, Results, Scale, pairs
from .servers import KINDS, OTHER, SAME

#: A row of a table: its label, and its cell without a server.
Row = tuple[str, Cell]

_NOTHING = "-"

_GOALS = ("", "at most", "measured", "met")

#: Width of the columns in all tables of servers: the columns of all tables are aligned.
_COLUMN = 9


def table(
    title: str, head: Sequence[str], rows: Sequence[Sequence[str]], column: int = _COLUMN
) -> str:
    """Return an aligned table: the first column to the left, the others to the right.

    The first column is as wide as its texts, each other one at least *column* characters.
    """
    lines = [head, *rows]
    widths = [max(column if n else 0, *(len(line[n]) for line in lines)) for n in range(len(head))]
    output = [title]
    for line in lines:
        cells = [line[0].ljust(widths[0])]
        cells += [text.rjust(width) for text, width in zip(line[1:], widths[1:], strict=True)]
        output.append("  " + "  ".join(cells).rstrip())
    return "\n".join(output)


def _figure(value: float | None) -> str:
    if value is None:
        return _NOTHING
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _rows(scale: Scale, place: str) -> list[Row]:
    """Return the rows of add-fd and remove-fd."""
    return [(shape(cell), cell) for cell in pairs(scale, place)]


def _stored_rows(scale: Scale, work: str, first: int) -> list[Row]:
    return [(f"{n:,} stored", Cell("", n, work)) for n in scale.steps[first:]]


def _open_rows(scale: Scale) -> list[Row]:
    return [(f"1 x {n}", Cell("", scale.steps[1], "open", n)) for n in IN_FLIGHT]


def _server_table(
    results: Results,
    names: list[str],
    title: str,
    rows: list[Row],
    values: Sequence[Callable[[Run], float]],
) -> str:
    """Return a table with a column for each server and the medians of *values* in each field."""

    def field(cell: Cell) -> str:
        medians = [results.median(cell, value) for value in values]
        return _NOTHING if None in medians else " / ".join(map(_figure, medians))

    fields = [[text, *(field(replace(cell, server=name)) for name in names)] for text, cell in rows]
    return table(title, ["", *(KINDS[name].label for name in names)], fields)


def _batch_rows(results: Results, names: list[str]) -> str:
    rows = []
    for text, rate in (("stored", stored_a_second), ("and removed", turned_over_a_second)):
        row = [text]
        for name in names:
            found = results.median(Cell(name, 0, "stock"), rate)
            batch = BATCH if KINDS[name].batches else 1
            row.append(_figure(found and found * batch / 1e3))
        rows.append(row)
    title = f"Thousands of descriptors per CPU second, {BATCH} a message (s6: one)"
    return table(title, ["", *(KINDS[name].label for name in names)], rows)


def _memory(results: Results, names: list[str]) -> str:
    spent = ("idle connection", "stored fd", "stored fd, a set each")
    rows = [[what, *(_figure(results.memory[name].get(what)) for name in names)] for what in spent]
    return table("Memory, bytes", ["", *(KINDS[name].label for name in names)], rows)


def _starts(results: Results) -> str:
    rows = [[name, f"{statistics.median(each) * 1e3:.1f}"] for name, each in results.starts.items()]
    return table("Starts, ms of CPU", ["", "from start to end"], rows)


def _waits(results: Results, scale: Scale) -> list[str]:
    """Return the tables of the longest waits, if those were measured."""
    tables = []
    rows = [
        [f"{what}, {scale.outage:,} stored", *(_figure(statistics.median(each) * 1e3),)]
        for what, each in results.outages.items()
    ]
    if rows:
        tables.append(table("Longest wait of a client, ms", ["", "median"], rows))
    rows = [[what, _figure(seconds * 1e3)] for what, seconds in results.attacks.items()]
    if rows:
        title = "Longest wait of one who asks once a millisecond, ms, but for that for a CPU"
        tables.append(table(title, ["beside this attack", ""], rows))
    return tables


def _path(results: Results) -> list[str]:
    found = results.walk
    if found is None:
        return []
    total = sum(count for _, count in found.bytecodes)
    rows = [[part, str(count), f"{100 * count / total:.0f} %"] for part, count in found.bytecodes]
    title = f"One add-fd in Python: {len(found.calls)} calls, {found.changes} changes of file"
    return [table(title, ["", "bytecodes", "of all"], rows)]


def _few_digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _judged(goal: Goal) -> tuple[str, str, str, str]:
    """Return the texts for a goal: its figure, its bound, the value, and whether it is met."""
    unit = f" {goal.unit}" if goal.unit else ""
    measured = _NOTHING if goal.measured is None else _few_digits(goal.measured) + unit
    met = {True: "yes", False: "NO", None: "not known"}[goal.met]
    return goal.what, f"{goal.wanted:g}{unit}", measured, met


def format_goals(found: list[Goal]) -> str:
    """Return the table of goals."""
    return table("Goals", _GOALS, [_judged(goal) for goal in found], column=0)


def goals_page(text: str, found: list[Goal]) -> str:
    """Return the Markdown page *text* with its table of goals replaced.

    Raises:
        ValueError: the page has no table of goals, or several.
    """
    lines = ["| goal | at most | measured | met |", "|---|---|---|---|"]
    lines += [f"| {' | '.join(_judged(goal))} |" for goal in found]
    page, count = re.subn(
        r"^\| goal \|.*?\n\n", "\n".join([*lines, "", ""]), text, flags=re.MULTILINE | re.DOTALL
    )
    if count != 1:
        raise ValueError(f"{count} tables begin with '| goal |'")
    return page


def format_results(results: Results, scale: Scale, names: list[str]) -> str:
    """Return all results as tables."""
    tables = []
    work = "add-fd + remove-fd, by clients x requests in flight"
    for place, where in {SAME: "the server's CPU", OTHER: "another CPU"}.items():
        if not any(cell.place == place for cell in results.runs):
            continue
        for what, value in {
            "CPU us per command": cpu,
            "Round trip us, p50": lambda run: p50(run) / 1e3,
            "Round trip us, p99": lambda run: p99(run) / 1e3,
            "Commands per second": lambda run: run.per_second,
        }.items():
            title = f"{what}, client on {where}"
            tables.append(_server_table(results, names, title, _rows(scale, place), [value]))
    if scale.most:
        tables += _stored_tables(results, scale, [name for name in names if KINDS[name].keeps])
    return "\n\n".join([f"{work}:", *tables, *_waits(results, scale), *_path(results)])


def _stored_tables(results: Results, scale: Scale, names: list[str]) -> list[str]:
    """Return the tables that depend on the number of stored fds, for servers that store any."""
    wait = Cell("", scale.most, "worst wait", clients=2)

    def rows_table(title: str, rows: list[Row], *values: Callable[[Run], float]) -> str:
        return _server_table(results, names, title, rows, values)

    return [
        rows_table(
            "CPU us per command, add-fd + remove-fd, 1 x 1", _stored_rows(scale, "pair", 1), cpu
        ),
        rows_table("CPU us per command, query-fdsets, 1 x 1", _stored_rows(scale, "query", 0), cpu),
        rows_table(
            f"CPU us per command, open-fdset, {scale.steps[1]:,} stored", _open_rows(scale), cpu
        ),
        _batch_rows(results, names),
        rows_table(
            f"Worst wait of another while {scale.most:,} are listed, ms / ms of server CPU",
            [("by the clock / CPU", wait)],
            lambda run: run.max_ns / 1e6,
            lambda run: run.max_cpu_ns / 1e6,
        ),
        _memory(results, names),
        _starts(results),
    ]


def as_json(results: Results, scale: Scale, found: list[Goal]) -> bytes:
    """Return all results as JSON."""
    whole: dict[str, Any] = {
        "machine": {
            "cpus": os.cpu_count(),
            "kernel": platform.release(),
            "architecture": platform.machine(),
            "python": platform.python_version(),
        },
        "scale": scale,
        "cells": [
            {"server": cell.server, "stored": cell.stored, "work": cell.work}
            | {"in-flight": cell.in_flight, "clients": cell.clients, "cpu": cell.place}
            | {"runs": runs}
            for cell, runs in results.runs.items()
        ],
        "memory": results.memory,
        "starts": results.starts,
        "outages": results.outages,
        "attacks": results.attacks,
        "path": results.walk,
        "goals": [
            {"what": g.what, "wanted": g.wanted, "unit": g.unit}
            | {"measured": g.measured, "met": g.met}
            for g in found
        ],
    }
    lines = [f"{name}: {text}" for name, text in _lines(whole)]
    return "{{\n{}\n}}\n".format(",\n".join(lines)).encode()


def _lines(whole: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the members of an object as JSON; each item of a list is a line, for diff(1)."""
    for name, value in whole.items():
        text = msgspec.json.encode(value).decode()
        if isinstance(value, list):
            items = ",\n".join(f"  {msgspec.json.encode(item).decode()}" for item in value)
            text = f"[\n{items}\n]"
        yield f'"{name}"', text
