"""Sphinx's configuration: ``make docs``.

What the program knows of itself is written into the pages when they are built: a line
``% generated: NAME`` in a page stands for what the function of that name returns.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

_HERE = Path(__file__).parent
sys.path[:0] = [str(_HERE), str(_HERE.parent)]

import command_line  # noqa: E402 - it is in this folder
import wire  # noqa: E402

from qmpfd import __version__  # noqa: E402

project = "qmpfd"
author = "The qmpfd authors"
project_copyright = author
version = release = __version__

# sphinxcontrib-trio shows "await" and "async with" in signatures.  It works with Sphinx 9.0.
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinxcontrib_trio"]
myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3
exclude_patterns = ["*.txt"]

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True

html_theme = "furo"
html_title = f"qmpfd {release}"
html_show_sphinx = False
html_copy_source = False
html_show_copyright = False

man_pages = [
    ("reference/command-line", "qmpfd", "keeps file descriptors in fd sets, over QMP", [author], 1),
    ("reference/policy-file", "qmpfd.toml", "who may do what with qmpfd", [author], 5),
]
man_show_urls = True


def others() -> str:
    """The pages that the table of contents does not name: whoever adds one need not."""
    index = (_HERE / "index.md").read_text()
    known = {"index", *re.findall(r"^[\w/-]+$", index, re.MULTILINE)}
    found = (path.relative_to(_HERE).with_suffix("").as_posix() for path in _HERE.rglob("*.md"))
    lines = sorted(name for name in found if name not in known)
    if not lines:
        return ""
    return "\n".join(["```{toctree}", ":caption: More", ":maxdepth: 1", "", *lines, "```"])


GENERATED = {
    "commands": wire.commands,
    "events": wire.events,
    "errors": wire.errors,
    "rights": wire.rights,
    "rule": wire.rule,
    "options": command_line.options,
    "verbs": command_line.verbs,
    "others": others,
}

_PLACE = re.compile(r"^% generated: (\w+)$", re.MULTILINE)


def fill_in(app: Any, docname: str, source: list[str]) -> None:
    """Put what is generated in its place; *source* is a page's text, in a list of one."""
    source[0] = _PLACE.sub(lambda match: GENERATED[match[1]](), source[0])


_INT64 = re.compile(r"Annotated\[int, msgspec\.Meta\([^)]*\)\]")


def tidy(
    app: Any,
    what: str,
    name: str,
    obj: Any,
    options: Any,
    signature: str | None,
    returns: str | None,
) -> tuple[str | None, str | None]:
    """QMP's integers are plain ones to who reads; the bounds that msgspec checks are noise."""
    return signature and _INT64.sub("int", signature), returns


def setup(app: Any) -> None:
    """Sphinx calls this."""
    app.connect("source-read", fill_in)
    app.connect("autodoc-process-signature", tidy)
