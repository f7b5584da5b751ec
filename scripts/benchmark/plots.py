"""The plots of the documentation, drawn by matplotlib where that is installed."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from .load import Run
from .plan import IN_FLIGHT, Cell, Results, Scale
from .servers import KINDS

#: The command that installs what draws them.
INSTALL = "python -m pip install matplotlib"

_COLOURS = {"loop": "#888888", "s6": "#4477aa", "qmpfd": "#228833", "asyncio": "#ccbb44"}
_COLOURS |= {"trio": "#bbbbbb", "supervised": "#117733", "qemu": "#ee6677"}


def draw(results: Results, scale: Scale, names: list[str], folder: Path) -> list[Path]:
    """Draw all plots into *folder*, as SVG; the files, none if matplotlib is missing."""
    try:
        matplotlib = importlib.import_module("matplotlib")
    except ModuleNotFoundError:
        return []
    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "qmpfd", "font.size": 9})
    pyplot = importlib.import_module("matplotlib.pyplot")
    folder.mkdir(parents=True, exist_ok=True)
    return [
        _commands(pyplot, results, scale, names, folder / "bench-commands.svg"),
        _stored(pyplot, results, scale, names, folder / "bench-stored.svg"),
    ]


def _cpu(run: Run) -> float:
    return run.cpu_us


def _commands(pyplot: Any, results: Results, scale: Scale, names: list[str], path: Path) -> Path:
    """Bars: what a command costs, by how many are in flight."""
    cells = {f"{n} in flight": (n, 1) for n in IN_FLIGHT}
    cells |= {f"{n:,} clients": (1, n) for n in scale.clients}
    figure, axes = pyplot.subplots(figsize=(7, 3.4), layout="constrained")
    width = 0.8 / len(names)
    for place, name in enumerate(names):
        medians = [
            results.median(Cell(name, 0, "pair", in_flight, clients), _cpu)
            for in_flight, clients in cells.values()
        ]
        bars = axes.bar(
            [at + (place + 0.5) * width - 0.4 for at in range(len(cells))],
            [value or 0 for value in medians],
            width,
            label=KINDS[name].label,
            color=_COLOURS[name],
        )
        told = ["" if v is None else f"{v:.1f}" if v < 10 else f"{v:.0f}" for v in medians]
        axes.bar_label(bars, told, fontsize=7)
    axes.set_xticks(range(len(cells)), list(cells))
    axes.set_title("add-fd + remove-fd: CPU time of the server; less is better", pad=24)
    return _save(pyplot, figure, axes, path)


def _stored(pyplot: Any, results: Results, scale: Scale, names: list[str], path: Path) -> Path:
    """Lines: what a command costs, by how many descriptors are stored."""
    figure, axes = pyplot.subplots(figsize=(7, 3.4), layout="constrained")
    for name in names:
        costs = {n: results.median(Cell(name, n, "pair"), _cpu) for n in scale.steps}
        known = {n: cost for n, cost in costs.items() if cost is not None}
        if len(known) > 1:
            label, colour = KINDS[name].label, _COLOURS[name]
            axes.plot(list(known), list(known.values()), "o-", label=label, color=colour)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("descriptors stored")
    axes.set_title(
        "add-fd + remove-fd, one in flight, by how much is stored; less is better", pad=24
    )
    return _save(pyplot, figure, axes, path)


def _save(pyplot: Any, figure: Any, axes: Any, path: Path) -> Path:
    ticker = importlib.import_module("matplotlib.ticker")
    axes.set_yscale("log")
    for which in (axes.yaxis.set_major_locator, axes.yaxis.set_minor_locator):
        which(ticker.LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    axes.set_ylabel("CPU \u00b5s per command")
    axes.legend(fontsize=8, frameon=False, ncols=6, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    return path
