"""Writes what the program knows of itself into the pages: ``make reference``.

Between ``<!-- generated: NAME -->`` and ``<!-- end -->`` a page has what the function of that name
returns.  The pages are checked in, so that they can be read in the repository; a test compares
them with the program.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS), str(DOCS.parent)]

import command_line  # noqa: E402 - it is in this folder
import python_api  # noqa: E402 - likewise
import wire  # noqa: E402 - likewise

#: What a page can ask for.
GENERATED: dict[str, Callable[[], str]] = {
    "commands": wire.commands,
    "events": wire.events,
    "errors": wire.errors,
    "rights": wire.rights,
    "rule": wire.rule,
    "options": command_line.options,
    "verbs": command_line.verbs,
    **{name: partial(python_api.section, name) for name in python_api.SECTIONS},
}

_PART = re.compile(r"^<!-- generated: (\w+) -->\n.*?^<!-- end -->$", re.MULTILINE | re.DOTALL)


def _fill(match: re.Match[str]) -> str:
    name = match[1]
    return f"<!-- generated: {name} -->\n\n{GENERATED[name]().strip()}\n\n<!-- end -->"


def filled(text: str) -> str:
    """A page's text with its generated parts as they have to be now."""
    return _PART.sub(_fill, text)


def asked_for(text: str) -> set[str]:
    """The names of the generated parts of a page."""
    return {match[1] for match in _PART.finditer(text)}


def main() -> None:
    """Write all pages that are stale."""
    for page in sorted(DOCS.rglob("*.md")):
        text = page.read_text()
        if (new := filled(text)) != text:
            page.write_text(new)
            sys.stdout.write(f"written: {page.relative_to(DOCS.parent)}\n")


if __name__ == "__main__":
    main()
