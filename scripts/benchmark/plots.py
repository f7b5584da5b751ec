"""The plots of the documentation: dot plots, as SVG that follows the light or dark theme."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path

from .goals import cpu, p99, shape
from .load import Run
from .plan import Cell, Results, Scale, pairs
from .servers import KINDS, OTHER, SAME

#: Of each server: its colour, of those that differ for the colour-blind too and show on white and
#: on black (Okabe and Ito's, and grey), and the outline of its mark, around the origin.
_MARKS = {
    "loop": ("#888888", "M-4,-4h8v8h-8z"),
    "s6": ("#0072b2", "M0,-5.5L5.5,0L0,5.5L-5.5,0z"),
    "trio": ("#e69f00", "M-4,-4h8v8h-8z"),
    "qmpfd": ("#009e73", "M-5,0a5,5 0 1,0 10,0a5,5 0 1,0 -10,0z"),
    "supervised": ("#56b4e9", "M0,-5.5L5,4H-5z"),
    "asyncio": ("#cc79a7", "M0,5.5L5,-4H-5z"),
    "qemu": ("#d55e00", "M0,-5.5L5.5,0L0,5.5L-5.5,0z"),
}

#: The picture has its own background: a page may have another theme than its reader's system.
_STYLE = """
svg { font: 13px system-ui, sans-serif; color-scheme: light dark }
.page { fill: #ffffff } text { fill: #222222 } .grid { stroke: #dddddd }
.title { font-weight: 600 }
@media (prefers-color-scheme: dark) {
  .page { fill: #131416 } text { fill: #dddddd } .grid { stroke: #3a3d42 }
}
""".strip()

_WIDTH, _MARGIN, _LEFT, _TOP, _ROW = 520, 16, 84, 74, 26


@dataclass(frozen=True)
class Row:
    """A row of a dot plot.

    Args:
        label: what it is about.
        values: by server.
    """

    label: str
    values: Mapping[str, float]


def dot_plot(title: str, axis: str, rows: Sequence[Row]) -> str:
    """An SVG picture: a row for each of *rows*, a mark for each server, a logarithmic scale.

    Args:
        title: what is shown.
        axis: what the scale says, with its unit.
        rows: from the top; at least one value in all.
    """
    every = [value for row in rows for value in row.values.values()]
    low, high = math.log10(min(every) / 1.2), math.log10(max(every) * 1.2)

    def x(value: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _MARGIN) * (math.log10(value) - low) / (high - low)

    bottom = _TOP + _ROW * len(rows)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {bottom + 44}"',
        f' role="img" aria-label="{escape(title)}">',
        f"<style>{_STYLE}</style>",
        f'<rect class="page" width="{_WIDTH}" height="{bottom + 44}"/>',
        f'<text class="title" x="{_MARGIN}" y="22">{escape(title)}</text>',
        *_legend([name for name in _MARKS if any(name in row.values for row in rows)]),
    ]
    for value in _ticks(low, high):
        at = f"{x(value):.1f}"
        parts.append(f'<path class="grid" d="M{at},{_TOP - 8}V{bottom}"/>')
        parts.append(f'<text x="{at}" y="{bottom + 17}" text-anchor="middle">{value:,g}</text>')
    parts.append(
        f'<text x="{_WIDTH / 2}" y="{bottom + 36}" text-anchor="middle">{escape(axis)}</text>'
    )
    for number, row in enumerate(rows):
        y = _TOP + _ROW * (number + 0.5)
        parts.append(f'<path class="grid" d="M{_LEFT},{y}H{_WIDTH - _MARGIN}"/>')
        parts.append(f'<text x="{_LEFT - 10}" y="{y + 4}" text-anchor="end">{row.label}</text>')
        for name, value in row.values.items():
            parts.append(_mark(name, x(value), y, f"{KINDS[name].label}: {value:,.3g}"))
    return "\n".join([*parts, "</svg>", ""])


def _mark(name: str, x: float, y: float, told: str) -> str:
    """The mark of a server, with what it says to the pointer and to a screen reader."""
    colour, outline = _MARKS[name]
    at = f'transform="translate({x:.1f},{y})"'
    return f'<path {at} d="{outline}" fill="{colour}"><title>{told}</title></path>'


def _legend(names: Sequence[str]) -> list[str]:
    parts, at = [], float(_MARGIN)
    for name in names:
        label = KINDS[name].label
        parts.append(_mark(name, at + 5, 42, label))
        parts.append(f'<text x="{at + 14}" y="46">{label}</text>')
        at += 26 + 7.2 * len(label)
    return parts


def _ticks(low: float, high: float) -> list[float]:
    """1, 2, 5, 10 and so on; over many decades, powers of ten only."""
    steps = (1, 2, 5) if high - low < 2.6 else (1,)
    powers = range(math.floor(low), math.ceil(high) + 1)
    values = [step * 10.0**power for power in powers for step in steps]
    return [value for value in values if low <= math.log10(value) <= high]


# -- the plots of the benchmark ------------------------------------------------------------------


def draw(results: Results, scale: Scale, names: list[str], folder: Path) -> list[Path]:
    """Draw all plots into *folder*; the files."""
    where = {SAME: "client on the server's CPU", OTHER: "client on another CPU"}
    shapes = "microseconds; clients x requests in flight; less is better"
    pictures: dict[str, tuple[str, str, list[Row]]] = {}
    for place, text in where.items():
        labelled = [(shape(cell), cell) for cell in pairs(scale, place)]
        for name, value, what in (
            ("cpu", cpu, "CPU time per command"),
            ("p99", _p99_us, "99 % of the round trips within"),
        ):
            rows = _rows(results, names, labelled, value)
            pictures[f"{name}-{place}"] = f"{what}, {text}", shapes, rows
    stored = [(f"{n:,}", Cell("", n, "pair")) for n in scale.steps] if scale.most else []
    pictures["stored"] = (
        "CPU time per command, by how many descriptors are stored",
        "microseconds; one client, one request in flight; less is better",
        _rows(results, [name for name in names if KINDS[name].keeps], stored, cpu),
    )
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for name, (title, axis, rows) in pictures.items():
        if any(row.values for row in rows):
            drawn.append(folder / f"{name}.svg")
            drawn[-1].write_text(dot_plot(title, axis, rows))
    return drawn


def _p99_us(run: Run) -> float:
    return p99(run) / 1e3


def _rows(
    results: Results,
    names: Sequence[str],
    labelled: Sequence[tuple[str, Cell]],
    value: Callable[[Run], float],
) -> list[Row]:
    rows = []
    for label, cell in labelled:
        found = {name: results.median(replace(cell, server=name), value) for name in names}
        rows.append(Row(label, {name: v for name, v in found.items() if v is not None}))
    return rows
