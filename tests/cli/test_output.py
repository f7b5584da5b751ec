"""Tables: aligned, coloured, and fitted to the width of a terminal."""

from __future__ import annotations

import re

import pytest
from terminal import on_a_terminal

from qmpfd.cli.output import print_table

HEADER = ("A", "LONG", "C", "TARGET")
ROWS = [("1", "x", "caf\u00e9 \u6f22\u5b57", "/a/path/that/is/quite/long"), ("22", "", "c", "/b")]


SHOW = f"from qmpfd.cli.output import print_table; print_table({HEADER!r}, {ROWS!r})"


def shown(columns: int) -> str:
    """Return the table above as printed on a terminal of that width."""
    return on_a_terminal([], columns, code=SHOW)


def bare(text: str) -> list[str]:
    """Return the lines of *text* without colours and trailing blanks."""
    return [line.rstrip() for line in re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()]


def test_a_table_that_fits(capfd: pytest.CaptureFixture[str]) -> None:
    print_table(HEADER, ROWS)
    plain = capfd.readouterr().out
    header, first, second = plain.splitlines()
    assert header == "A   LONG  C          TARGET"
    assert first == "1   x     caf\u00e9 \u6f22\u5b57  /a/path/that/is/quite/long"
    assert second == "22        c          /b"
    assert shown(80) == plain.replace(header, f"\x1b[1m{header}\x1b[0m")


def test_colours_change_nothing_else() -> None:
    """Some columns are coloured if the terminal permits; the text is the same."""
    code = SHOW.replace("'LONG'", "'NAME'")
    colourful = on_a_terminal([], code=code)
    assert "\n1   \x1b[32mx\x1b[0m     caf" in colourful
    for env in ({"NO_COLOR": "1"}, {"TERM": "dumb"}):
        plain = on_a_terminal([], code=code, env=env)
        assert "\x1b" not in plain
        assert bare(colourful) == plain.splitlines()


def test_a_table_that_nearly_fits() -> None:
    lines = bare(shown(40))
    assert lines[1].endswith("  \u2026that/is/quite/long")
    assert lines[2].endswith("  /b")


def test_a_table_that_does_not_fit() -> None:
    lines = bare(shown(30))
    assert lines[3].startswith("TARGET  /a/path/that/is/quite")
    assert lines[lines.index("") + 1 :] == ["A       22", "LONG", "C       c", "TARGET  /b"]


def test_a_long_text_leaves_a_table() -> None:
    """A long text makes way for the other columns of a table."""
    code = (
        "from qmpfd.cli.output import print_table\n"
        "print_table(('A', 'B', 'C', 'D'), [('1', 'x' * 1000, 'y', '/' * 50), ('2', *'abc')])"
    )
    first = bare(on_a_terminal([], 60, code=code))[1]
    assert len(first) == 60
    assert re.fullmatch(r"1  x+\u2026  y  \u2026/+", first)
