"""The README's examples work, in order, against one daemon."""

from __future__ import annotations

import re
from pathlib import Path

from examples import run_page, unused_files
from helpers import ROOT

from qmpfd.cli.main import _parser
from qmpfd.commands import TABLE

PAGE = ROOT / "README.md"

#: The page that lists the commands and verbs.
INDEX = (ROOT / "docs" / "index.md").read_text()


def test_the_examples(tmp_path: Path) -> None:
    assert sorted(set(run_page(PAGE, tmp_path))) == ["console", "json"]


def test_every_program_is_run() -> None:
    assert unused_files(PAGE) == []


def test_every_command_is_named_and_no_other() -> None:
    section = INDEX.partition("| QMP commands |")[2].partition("\n\n")[0]
    named = re.findall(r"`([\w-]+)`", "".join(row.split("|")[1] for row in rows(section)))
    assert sorted(named) == sorted(TABLE.commands)


def test_every_verb_is_named_and_no_other() -> None:
    section = INDEX.partition("| in the shell |")[2].partition("\n\n")[0]
    named = re.findall(r"`qmpfd ([\w-]+)`", "".join(row.split("|")[1] for row in rows(section)))
    listed = re.findall(r"^    ([\w-]+)(?= |$)", _parser("").format_help(), re.MULTILINE)
    assert sorted(named) == sorted(listed)


def rows(table: str) -> list[str]:
    """Return the rows of a Markdown table without its head."""
    return [line for line in table.splitlines() if line.startswith("| ")]
