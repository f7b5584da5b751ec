"""Output in colours, by rich: the extra ``qmpfd[rich]``.

It takes 80 ms to import, twice what all of ``qmpfd ls`` takes: so for a terminal only.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

#: The colours of the columns that the eye looks for.
_STYLES = {"FDSET": "bold cyan", "FD": "cyan", "NAME": "green", "PID": "cyan", "COMMAND": "green"}


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> None:
    """Aligned columns; what is too long for the line goes on below."""
    table = _grid()
    for name in header:
        table.add_column(Text(name, "bold"), style=_STYLES.get(name, ""), overflow="fold")
    table.show_header = True
    _print(table, rows, width)


def print_pairs(pairs: Sequence[tuple[str, str]], width: int) -> None:
    """A line for each name and its value."""
    table = _grid()
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    _print(table, pairs, width)


def _grid() -> Table:
    return Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))


def _print(table: Table, rows: Sequence[Sequence[str]], width: int) -> None:
    for row in rows:
        table.add_row(*map(Text, row))  # as it is: neither markup nor emoji codes
    Console(highlight=False, width=width).print(table)
