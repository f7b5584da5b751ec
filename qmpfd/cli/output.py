"""Output for people, and for programs."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from typing import Any


def print_json(value: Any) -> None:
    """*value* as one line of JSON."""
    print(json.dumps(value), flush=True)  # an event is to be seen when it happens


def printable(text: str) -> str:
    """*text* with what would disturb a terminal escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def duration(seconds: int) -> str:
    """A time span in its two largest units: ``2d4h``, ``3m20s``."""
    parts = []
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        count, seconds = divmod(seconds, size)
        if count:
            parts.append(f"{count}{unit}")
    return "".join(parts[:2]) or "0s"


def terminal_width() -> int:
    """Columns of the terminal; 80 if there is none.  The stdlib's own is in shutil, which takes a
    tenth of a short verb's time to import.
    """
    named = os.environ.get("COLUMNS", "")
    if named.isdecimal() and int(named):
        return int(named)
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns or 80
    except (OSError, ValueError):
        return 80


#: The least that is worth showing of a column that does not fit.
_LEAST = 16


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Aligned columns.

    On a terminal, a bold header; and where the columns are too wide for it, the end of the last
    is shown alone, or, if that leaves too little, each row as a block of lines.
    """
    widths = [max(map(_width, column)) for column in zip(header, *rows, strict=True)]
    terminal = sys.stdout.isatty()
    if terminal:
        room = terminal_width() - sum(widths[:-1]) - 2 * (len(widths) - 1)
        if len(widths) > _FEW and room < min(widths[-1], _LEAST):
            _print_blocks(header, rows)
            return
        if len(widths) > _FEW and room < widths[-1]:
            rows = [(*row[:-1], _end(row[-1], room)) for row in rows]
    styled = terminal and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    bold, plain = ("\x1b[1m", "\x1b[0m") if styled else ("", "")
    print(f"{bold}{_line(header, widths)}{plain}")
    for row in rows:
        print(_line(row, widths))


#: Columns that may run over the end of a line: it can still be read.
_FEW = 3


def _print_blocks(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    width = max(map(_width, header))
    for number, row in enumerate(rows):
        if number:
            print()
        for name, cell in zip(header, row, strict=True):
            print(f"{name:<{width}}  {cell}".rstrip())


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    sized = zip(cells, widths, strict=True)
    padded = (cell + " " * (width - _width(cell)) for cell, width in sized)
    return "  ".join(padded).rstrip()


def _width(text: str) -> int:
    """Columns of a terminal that *text* takes."""
    if text.isascii():
        return len(text)
    import unicodedata

    return sum(
        0 if unicodedata.combining(char) else 1 + (unicodedata.east_asian_width(char) in "WF")
        for char in text
    )


def _end(text: str, width: int) -> str:
    """The end of *text*, which tells most of a path, if it is too long."""
    if _width(text) <= width:
        return text
    while _width(text) >= width:
        text = text[1:]
    return f"\u2026{text}"
