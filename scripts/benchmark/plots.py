"""Dot plots for the documentation, as SVG with a light and a dark theme."""

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

#: Colour of each server and outline of its mark around the origin.  The colours are grey and Okabe
#: and Ito's, which the colour-blind can tell apart; all are visible on white and on black.
_MARKS = {
    "loop": ("#888888", "M-4,-4h8v8h-8z"),
    "s6": ("#0072b2", "M0,-5.5L5.5,0L0,5.5L-5.5,0z"),
    "trio": ("#e69f00", "M-4,-4h8v8h-8z"),
    "qmpfd": ("#009e73", "M-5,0a5,5 0 1,0 10,0a5,5 0 1,0 -10,0z"),
    "supervised": ("#56b4e9", "M0,-5.5L5,4H-5z"),
    "asyncio": ("#cc79a7", "M0,5.5L5,-4H-5z"),
    "qemu": ("#d55e00", "M0,-5.5L5.5,0L0,5.5L-5.5,0z"),
}

#: The picture has a background of its own: the page's theme may differ from the system's.
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
        label: text to the left of the row.
        values: value of each server, by its name in KINDS.
    """

    label: str
    values: Mapping[str, float]


def dot_plot(title: str, axis: str, rows: Sequence[Row]) -> str:
    """Return a dot plot as SVG: one mark for each server in each row, on a logarithmic scale.

    Args:
        title: title of the plot.
        axis: label of the scale, with its unit.
        rows: the rows from top to bottom; at least one has a value.
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


def _mark(name: str, x: float, y: float, title: str) -> str:
    """Return the mark of a server, with a title for the pointer and for screen readers."""
    colour, outline = _MARKS[name]
    at = f'transform="translate({x:.1f},{y})"'
    return f'<path {at} d="{outline}" fill="{colour}"><title>{title}</title></path>'


def _legend(names: Sequence[str]) -> list[str]:
    parts, at = [], float(_MARGIN)
    for name in names:
        label = KINDS[name].label
        parts.append(_mark(name, at + 5, 42, label))
        parts.append(f'<text x="{at + 14}" y="46">{label}</text>')
        at += 26 + 7.2 * len(label)
    return parts


def _ticks(low: float, high: float) -> list[float]:
    """Return ticks at 1, 2, 5, 10 and so on, or at powers of ten if the scale spans many."""
    steps = (1, 2, 5) if high - low < 2.6 else (1,)
    powers = range(math.floor(low), math.ceil(high) + 1)
    values = [step * 10.0**power for power in powers for step in steps]
    return [value for value in values if low <= math.log10(value) <= high]


# -- the plots of the benchmark ------------------------------------------------------------------


def draw(results: Results, scale: Scale, names: list[str], folder: Path) -> list[Path]:
    """Draw all plots that have values into *folder*; return the files.  *names* without a mark are
    in the tables only.
    """
    names = [name for name in names if name in _MARKS]
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
