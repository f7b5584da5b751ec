"""Sphinx's configuration: ``make docs``."""

from __future__ import annotations

import sys
from pathlib import Path

_HERE = Path(__file__).parent
sys.path[:0] = [str(_HERE), str(_HERE.parent)]

from qmpfd import __version__  # noqa: E402 - the line above finds it

project = "qmpfd"
author = "The qmpfd authors"
project_copyright = author
version = release = __version__

extensions = ["myst_parser", "sphinx_copybutton"]
myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3
exclude_patterns = ["*.txt"]

smartquotes = False  # options keep both of their dashes, and error texts their quotes

html_theme = "furo"
html_title = f"qmpfd {release}"
html_show_sphinx = False
html_copy_source = False
html_show_copyright = False
html_static_path = ["_static"]
html_css_files = ["qmpfd.css"]
copybutton_prompt_text = "$ "  # of an example with prompts, the button copies what is typed only

man_pages = [
    ("reference/command-line", "qmpfd", "keeps file descriptors in fd sets, over QMP", [author], 1),
    ("reference/policy-file", "qmpfd.toml", "who may do what with qmpfd", [author], 5),
]
man_show_urls = True
today = f"qmpfd {release}"  # in the place of a date, so that a page changes with its text only
