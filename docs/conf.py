"""Sphinx's configuration: ``make docs``."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

_HERE = Path(__file__).parent
sys.path[:0] = [str(_HERE), str(_HERE.parent)]

from qmpfd import __version__  # noqa: E402 - the line above finds it

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
today = f"qmpfd {release}"  # in the place of a date, so that a page changes with its text only


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
    app.connect("autodoc-process-signature", tidy)
