"""Output of the verbs: JSON, tables, errors; escaping and colours for a terminal."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, TextIO

from ..kernel.fd import Fd

#: Result of a verb that has changed the store, while print_result prints it; for the error message.
unprinted = ""


def print_json(value: Any) -> None:
    """Print *value* as one line of JSON."""
    print(json.dumps(value), flush=True)  # flush: events must appear when they happen


def print_result(result: Any) -> None:
    """Print the result of a verb that has changed the store.  If printing fails, :data:`unprinted`
    has the text: the change was made all the same.

    Args:
        result: a text, or a value to print as JSON.
    """
    global unprinted  # noqa: PLW0603 - for the one place that reports a failed print
    unprinted = result if isinstance(result, str) else json.dumps(result)
    print(unprinted, flush=True)
    unprinted = ""


class Nowhere(io.TextIOBase):
    """Discards output; replaces a closed stream.  /dev/null would occupy the stream's number."""

    def write(self, text: str) -> int:
        return len(text)


def print_error(text: str) -> None:
    """Print a line to standard error, and ignore a failure: the verb goes on, and its exit status
    says how it ended.
    """
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        drop(sys.stderr)


def drop(stream: TextIO | Nowhere) -> None:
    """Redirect *stream* to /dev/null: the interpreter flushes its buffer at exit, and would report
    the same error again.
    """
    if not isinstance(stream, Nowhere):
        number = stream.fileno()
        Fd(number).close()  # close before open: this process may be out of descriptors
        os.dup2(os.open(os.devnull, os.O_WRONLY), number)


def printable(text: str) -> str:
    """Return *text* with line breaks and control characters escaped."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def duration(seconds: int) -> str:
    """Format a time span in its two largest units: ``2d4h``, ``3m20s``."""
    parts = []
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        count, seconds = divmod(seconds, size)
        if count:
            parts.append(f"{count}{unit}")
    return "".join(parts[:2]) or "0s"


def size(count: int) -> str:
    """Format a number of bytes, above 1023 in three digits at most: ``512``, ``4.0K``, ``20M``."""
    if count < 1024:
        return str(count)
    amount, units = count / 1024, iter("KMGTPE")
    unit = next(units)
    while amount >= 1023.5:
        amount, unit = amount / 1024, next(units)
    return f"{amount:.1f}{unit}" if amount < 9.95 else f"{amount:.0f}{unit}"


def terminal_width() -> int:
    """Return the number of columns of the terminal, 80 without one.  shutil.get_terminal_size is
    not used: importing shutil takes a tenth of a short verb's time.
    """
    with suppress(ValueError):
        if (named := int(os.environ.get("COLUMNS", ""))) > 0:
            return named
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns or 80
    except (OSError, ValueError):
        return 80


#: Minimum width of a shortened column.
_LEAST = 12

#: Tables with no more columns are not shortened: lines that wrap stay readable.
_FEW = 3


#: Styles of the columns that are coloured.
_STYLES = {"FDSET": "1;36", "FD": "36", "NAME": "32", "PID": "36", "COMMAND": "32"}


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table with aligned columns.

    On a terminal, the header is bold and some columns are coloured.  If the table is too wide, the
    widest columns are shortened, down to _LEAST; if it still does not fit, each row is printed as a
    block of lines.  Control characters are escaped.
    """
    rows = [[*map(printable, row)] for row in rows]
    widths = [max(map(_width, column)) for column in zip(header, *rows, strict=True)]
    if sys.stdout.isatty() and len(widths) > _FEW:
        fitting = _fit(widths, terminal_width())
        if fitting is None:
            for number, row in enumerate(rows):
                if number:
                    print()
                print_pairs([*zip(header, row, strict=True)])
            return
        if fitting != widths:
            widths = fitting
            rows = [_shortened(row, widths) for row in rows]
    paint = painter()
    styles = [_STYLES.get(name, "") for name in header]
    padded = (name + " " * (width - len(name)) for name, width in zip(header, widths, strict=True))
    print(paint("1", "  ".join(padded).rstrip()))
    for row in rows:
        cells = zip(row, widths, styles, strict=True)
        padded = (paint(style, text) + " " * (width - _width(text)) for text, width, style in cells)
        print("  ".join(padded).rstrip())


def _fit(widths: Sequence[int], room: int) -> list[int] | None:
    """Reduce the widest of *widths* until the row fits; return None if that leaves too little."""
    fitting = [min(width, room) for width in widths]
    while sum(fitting) + 2 * (len(fitting) - 1) > room:
        widest = max(fitting)
        if widest <= _LEAST:
            return None
        fitting[fitting.index(widest)] -= 1
    return fitting


def print_pairs(pairs: Sequence[tuple[str, str]]) -> None:
    """Print a line for each name and its value, aligned; on a terminal, with bold names.  Control
    characters in the values are escaped.
    """
    paint = painter()
    width = max(len(name) for name, _ in pairs)
    for name, value in pairs:
        print(f"{paint('1', name)}{' ' * (width - len(name))}  {printable(value)}".rstrip())


def painter() -> Callable[[str, str], str]:
    """Return a function that formats text in one of the terminal's styles (``1``: bold, ``32``:
    green; console_codes(4)), or not at all with $NO_COLOR (https://no-color.org) or no terminal.
    """
    wanted = not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    if not wanted or not sys.stdout.isatty():
        return lambda style, text: text
    return lambda style, text: f"\x1b[{style}m{text}\x1b[0m" if style and text else text


def _width(text: str) -> int:
    """Return the number of terminal columns that *text* takes."""
    if text.isascii():
        return len(text)
    import unicodedata

    return sum(
        0 if unicodedata.combining(char) else 1 + (unicodedata.east_asian_width(char) in "WF")
        for char in text
    )


def _shortened(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    """Shorten the cells at their end, but the last at its start: the end of a path says most."""
    cells = [_beginning(cell, width) for cell, width in zip(row[:-1], widths, strict=False)]
    return [*cells, _beginning(row[-1][::-1], widths[-1])[::-1]]


def _beginning(text: str, width: int) -> str:
    """Shorten *text* to *width* columns."""
    if _width(text) <= width:
        return text
    text = text[:width]
    while _width(text) >= width:
        text = text[:-1]
    return f"{text}\u2026"
