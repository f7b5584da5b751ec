"""The pages of the documentation: links, names and words."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from helpers import ROOT

DOCS = ROOT / "docs"
if TYPE_CHECKING:
    import check_links
else:
    sys.path.append(str(DOCS))
    check_links = importlib.import_module("check_links")

PAGES = {
    path.relative_to(ROOT).as_posix(): path
    for path in (*sorted(ROOT.glob("*.md")), *sorted(DOCS.rglob("*.md")))
}
TEXTS = {name: path.read_text() for name, path in PAGES.items()}

_CODE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`[^`]*`")
_LINK = re.compile(r"\[((?:[^][]|\[[^][]*\])*)\]\(([^()\s]+)\)")
_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)


def prose(text: str) -> str:
    """Return a page with examples, comments and names in backquotes replaced by blanks: positions
    are those of the page.
    """
    for pattern in (_CODE, _COMMENT, _INLINE):
        text = pattern.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), text)
    return text


def anchors(text: str) -> set[str]:
    """Return the anchors of a page: its headings, as GitHub and MyST spell them."""
    headings = re.findall(r"^#+ (.+)$", _CODE.sub("", text), re.MULTILINE)
    plain = (_LINK.sub(r"\1", heading).replace("`", "").lower() for heading in headings)
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in plain}


def links(name: str) -> list[str]:
    """Return the targets of a page's links."""
    return [target for _, target in _LINK.findall(_CODE.sub("", TEXTS[name]))]


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_to_a_page_and_a_heading(name: str) -> None:
    for target in links(name):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        page = (PAGES[name].parent / path).resolve() if path else PAGES[name]
        assert page.exists(), target
        if anchor:
            assert anchor in anchors(page.read_text()), target


def test_each_page_is_listed() -> None:
    listed = {f"docs/{target}" for target in links("docs/index.md")}
    assert listed >= {name for name in PAGES if name.startswith("docs/")} - {"docs/index.md"}


def test_a_heading_that_is_not_there_is_seen() -> None:
    assert anchors("# Fd set\n## The `spec` dialect, 2012\n```\n# no\n```\n") == {
        "fd-set",
        "the-spec-dialect-2012",
    }


def test_dead_links_of_the_built_pages_are_seen(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text('<h1 id="one"><a href="b.html#two"><a href="https://x.y/#z">')
    (tmp_path / "b.html").write_text(
        '<h1 id="two"><a href="#one"><a href="a.html#one"><img src="c">'
    )
    assert check_links.dead_links(tmp_path) == ["b.html: #one", "b.html: c"]


@pytest.mark.parametrize("name", PAGES)
def test_files_that_are_named_exist(name: str) -> None:
    """Named files exist, below the root or a folder that the page has named before."""
    folders = [ROOT / name for name in ("", "qmpfd", "qmpfd/server", "scripts", "tests/faults")]
    named = re.findall(
        r"`((?:[\w.-]+/)*(?:test_\w+\.py|\w+/|\w+\.py))`", _CODE.sub("", TEXTS[name])
    )
    for file in named:
        assert any((folder / file).exists() for folder in folders), file


@pytest.mark.parametrize("name", PAGES)
def test_targets_of_make_exist(name: str) -> None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for target in re.findall(r"(?:`|^)make ([a-z]+)", TEXTS[name], re.MULTILINE):
        assert target in targets


# -- words ---------------------------------------------------------------------------------------

#: Terms of the glossary: a page that uses one must link to its entry, except pages in reference/,
#: which become manual pages.
EXPLAINED = (
    "barrier",
    "dialect",
    "fd set",
    "fd store",
    "journal",
    "opaque",
    "open file description",
    "out-of-band",
    "pipelining",
    "selector",
    "supervised",
    "worker",
)

#: Words that pages may not use, and what they use instead.
PRIVATE = {
    r"newcomers?": "the new daemon",
    r"keepers?": "the fd store, the parent, systemd",
    r"hoarders?": "the client that does so",
    r"whoever|whomever": "a client that, a user who",
    r"(?:those|he|they|one) who": "clients that, users who",
    r"gates?": "a queue",
    r"laps?|in turns|(?:its|their) turns?": "a bounded piece of work",
    r"mirror(?:s|ed)?": "the second copy",
    r"lets? go of|(?:has|have) let go": "hand over, close",
    r"says? goodbye": "close",
    r"the house": "the package",
    r"garbage|leftovers?": "the descriptors that no command took",
}


@pytest.mark.parametrize("name", PAGES)
def test_no_page_speaks_a_private_language(name: str) -> None:
    text = prose(TEXTS[name])
    for word, instead in PRIVATE.items():
        found = re.search(rf"\b(?:{word})\b", text, re.IGNORECASE)
        assert not found, f"line {text.count(chr(10), 0, found.start()) + 1}: {found[0]}: {instead}"


@pytest.mark.parametrize("term", EXPLAINED)
@pytest.mark.parametrize(
    "name", [name for name in PAGES if name.startswith("docs/") and "reference" not in name]
)
def test_a_page_links_the_terms_that_it_uses_to_the_glossary(name: str, term: str) -> None:
    text = prose(TEXTS[name])
    plain = re.sub(r"^#.*$|\]\([^)]*\)", "", text, flags=re.MULTILINE)
    first = re.search(rf"\b{term}s?\b", plain)
    if first is None or name == "docs/glossary.md":
        return
    linked = [
        label
        for label, target in _LINK.findall(text)
        if target.endswith(f"glossary.md#{term.replace(' ', '-')}")
    ]
    assert linked, f"{name} links {term!r} to the glossary"


def test_the_glossary_is_in_order() -> None:
    terms = re.findall(r"^## (.+)$", TEXTS["docs/glossary.md"], re.MULTILINE)
    assert terms == sorted(terms, key=str.lower)
    assert set(EXPLAINED) <= set(terms)


def test_each_term_of_the_glossary_is_used() -> None:
    others = " ".join(text for name, text in TEXTS.items() if name != "docs/glossary.md").lower()
    for term in re.findall(r"^## (.+)$", TEXTS["docs/glossary.md"], re.MULTILINE):
        assert re.search(rf"\b{re.escape(term.lower())}", others), term


@pytest.mark.parametrize("name", [name for name in PAGES if "/howto/" in name])
def test_a_how_to_says_what_it_needs_and_cleans_up(name: str) -> None:
    head = TEXTS[name].partition("\n## ")[0]
    assert re.search(r"[Yy]ou need|This page needs", head)
    last = re.findall(r"^## (.+)$", TEXTS[name], re.MULTILINE)[-1]
    assert last in ("Clean up", "Uninstall")


def test_what_supervise_costs_is_the_same_on_both_pages() -> None:
    section = TEXTS["docs/howto/crashes.md"].partition("## What it costs\n")[2]
    costs, _, _ = section.partition("[Performance]")
    assert "CPU time" in costs
    assert " ".join(costs.split()) in " ".join(TEXTS["docs/performance.md"].split())
