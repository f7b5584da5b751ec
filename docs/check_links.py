"""Finds links of the built documentation that lead nowhere: ``make docs`` runs it.

It needs no network: a link to another site is checked by ``make links``.
"""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    """The links of a page, and what can be linked to on it.

    Args:
        path: the HTML file.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.anchors: set[str] = set()
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """HTMLParser calls this for each tag."""
        for name, value in attrs:
            if name == "id" and value:
                self.anchors.add(value)
            elif name in ("href", "src") and value:
                self.links.add(value)


def dead_links(folder: Path) -> list[str]:
    """Each link between the pages of *folder* that leads nowhere, with its page."""
    pages = {path: Page(path) for path in sorted(folder.rglob("*.html"))}
    found = []
    for path, page in pages.items():
        for link in sorted(page.links):
            parts = urlsplit(link)
            if parts.scheme:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            leads = target.is_file()
            if leads and parts.fragment and target in pages:
                leads = unquote(parts.fragment) in pages[target].anchors
            if not leads:
                found.append(f"{path.relative_to(folder)}: {link}")
    return found


if __name__ == "__main__":
    if dead := dead_links(Path(sys.argv[1]).resolve()):
        sys.exit("links that lead nowhere:\n" + "\n".join(dead))
