"""The documentation: its examples work, and its reference is complete."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import typing
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from examples import blocks, run_page, unused_files
from helpers import ROOT, daemon_process, open_fds
from installed import QEMU, need

import qmpfd
import qmpfd.testing
from qmpfd.client.blocking import BlockingClient
from qmpfd.commands import TABLE
from qmpfd.commands.context import Context
from qmpfd.commands.events import EVENTS
from qmpfd.commands.shared import SharedState
from qmpfd.errors import PermissionDenied, QMPError
from qmpfd.fdsets import Peer
from qmpfd.kernel.close_pool import ClosePool
from qmpfd.kernel.fd import Fd, close_all
from qmpfd.kernel.hangups import Hangups
from qmpfd.limits import TAKEOVER_FORMAT, Limits
from qmpfd.policy import RIGHTS, Access, Grant, Right

DOCS = ROOT / "docs"

if TYPE_CHECKING:
    import command_line
    import generate
    import wire
else:
    sys.path.append(str(DOCS))
    command_line, generate, wire = map(
        importlib.import_module, ("command_line", "generate", "wire")
    )

#: Pages whose examples another test file runs.
_ELSEWHERE = {"howto/testing.md"}

PAGES = {path.relative_to(DOCS).as_posix(): path for path in sorted(DOCS.rglob("*.md"))}


def has_examples(page: Path) -> bool:
    """Return whether a page has examples that are run."""
    return any(
        b.language in ("console", "json") and not b.not_run for b in blocks(page.read_text())
    )


@pytest.mark.parametrize(
    "name", [n for n, page in PAGES.items() if n not in _ELSEWHERE and has_examples(page)]
)
def test_the_examples(name: str, tmp_path: Path) -> None:
    page = PAGES[name]
    if f"$ {QEMU}" in page.read_text():
        need(QEMU)
    assert run_page(page, tmp_path)


def test_the_python_examples_have_types(tmp_path: Path) -> None:
    """The Python examples pass mypy --strict."""
    examples = []
    for name, page in {**PAGES, "README.md": ROOT / "README.md"}.items():
        for block in blocks(page.read_text()):
            if block.language == "python":
                example = tmp_path / f"{re.sub('[^a-z]', '_', name.lower())}_{block.line}.py"
                example.write_text(block.text)
                examples.append(example)
    assert len(examples) > 5
    command = [sys.executable, "-m", "mypy", "--strict", f"--cache-dir={tmp_path}/cache"]
    ran = subprocess.run(
        [*command, *examples], cwd=ROOT, capture_output=True, text=True, timeout=100, check=False
    )
    assert ran.returncode == 0, ran.stdout


def test_a_wrong_example_is_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```console\n$ qmpfd ls\nno sets\n```\n")
    with pytest.raises(AssertionError, match=r"page\.md, line 2"):
        run_page(page, tmp_path)


@pytest.mark.parametrize("name", [name for name in PAGES if name not in _ELSEWHERE])
def test_every_program_is_used(name: str) -> None:
    assert unused_files(PAGES[name]) == []


# -- generated parts ---------------------------------------------------------------------------

OLDEST = (3, 11)
"""The oldest supported Python, with which `make reference` must be run."""


@pytest.mark.parametrize("name", PAGES)
def test_what_is_generated_is_not_stale(name: str) -> None:
    if name == "reference/command-line.md" and sys.version_info[:2] != OLDEST:
        pytest.skip("argparse writes usage as each Python has it: compared on the oldest")
    text = PAGES[name].read_text()
    assert generate.filled(text) == text, "make reference"


def words_of_a_page(text: str) -> list[str]:
    """Return the words of a Markdown page without title and link targets."""
    for markup in (r"(?s)\A#.*?\n|<!--.*?-->", r"(?m)^```.*$", r"\]\([^)]*\)", r"\\"):
        text = re.sub(markup, "", text)
    return re.findall(r"\w+", text.casefold())


def words_of_a_manual_page(text: str) -> list[str]:
    """Return the words of a manual page between its name and its authors."""
    text = text.partition("\n.SH NAME\n")[2].partition("\n")[2].partition("\n.SH Author\n")[0]
    assert "\n.TS\n" not in text, "a definition list fits a terminal better than a table"
    text = re.sub(r"(?m)^\.(SH|SS|B) |^\..*$", "", text)
    text = re.sub(r"\\(\(..|f.|.)", lambda m: "" if m[1][0] in "f&" else "-", text)
    return re.findall(r"\w+", text.casefold())


@pytest.mark.parametrize(
    "page, manual", [("command-line.md", "qmpfd.1"), ("policy-file.md", "qmpfd.toml.5")]
)
def test_the_manual_pages_are_not_stale(page: str, manual: str) -> None:
    written = words_of_a_manual_page((ROOT / "packaging/man" / manual).read_text())
    assert written == words_of_a_page((DOCS / "reference" / page).read_text()), "make reference"


def test_every_generated_part_has_its_place() -> None:
    text = "\n".join(page.read_text() for page in PAGES.values())
    assert generate.asked_for(text) == set(generate.GENERATED)


def test_every_command_event_and_class_is_there() -> None:
    headings = re.findall(r"^### (\S+)$", wire.commands() + "\n" + wire.events(), re.MULTILINE)
    assert headings == [*TABLE.commands, *EVENTS]
    classes = set(re.findall(r"^\| `(\w+)` \| `\w+` \|", wire.errors(), re.MULTILINE))
    assert classes == {cls.__name__ for cls in QMPError.__subclasses__()}


def test_every_public_name_is_there() -> None:
    text = PAGES["reference/python.md"].read_text()
    headings = set(re.findall(r"^### (\w+)$", text, re.MULTILINE))
    types = {"Dialect", "FileDescriptorLike"}  # of arguments, which say what they take
    assert headings == {*qmpfd.__all__, *qmpfd.testing.__all__} - types - {"__version__"}


def test_every_argument_is_explained() -> None:
    for command in TABLE.commands.values():
        for row in wire.rows(command.arguments):
            assert not row.endswith("|  |"), f"{command.name}: {row}"


def test_every_verb_and_option_is_there() -> None:
    text = command_line.verbs()
    for verb, (_, parser) in command_line.parsers().items():
        section = text.partition(f"## qmpfd {verb}\n")[2].partition("\n## ")[0]
        for action in parser._actions:
            for option in action.option_strings:
                if option not in ("-h", "--help"):
                    assert re.search(rf"`{option}[ `]", section), f"{verb} {option}"


# -- rights and errors of commands -------------------------------------------------------------


def arguments_of(command: str) -> dict[str, Any]:
    """Return arguments that pass all checks before the check of rights."""
    known: dict[str, dict[str, Any]] = {
        "remove-fd": {"fdset_id": 0},
        "open-fdset": {"fdset_id": 0},
        "getfd": {"fdname": "name"},
        "closefd": {"fdname": "name"},
        "watch-fdsets": {"enable": True},
        "takeover": {"format": TAKEOVER_FORMAT},
    }
    return known.get(command, {})


class Negotiated:
    """The part of a connection that commands use."""

    def __init__(self) -> None:
        self.fds_to_close: list[Fd] = []

    def negotiate(self, capabilities: list[str]) -> None:
        """Do nothing."""


@contextmanager
def context_with(*rights: Right) -> Iterator[Context]:
    """Yield the context of a connection whose peer has *rights*, and has sent a descriptor."""
    daemon = SharedState("spec", Limits(), lambda: 0.0, lambda: None, TABLE, ClosePool(), Hangups())
    daemon.add([Fd(os.dup(0))], 0, create=True)
    connection: Any = Negotiated()
    access = Access((Grant(frozenset(rights)),))
    context = Context(daemon, connection, Peer(1, 2, 3), access, lambda: False)
    context.fds.append(Fd(os.dup(0)))
    with ExitStack() as stack:
        stack.callback(lambda: close_all([*context.fds, *connection.fds_to_close]))
        stack.callback(daemon.hangups.close)
        stack.callback(daemon.closer.shut_down)
        stack.callback(lambda: close_all([stored.fd for stored in daemon.store.everything()]))
        stack.callback(context.close)
        yield context


@pytest.mark.parametrize("right", typing.get_args(Right))
@pytest.mark.parametrize("name", TABLE.commands)
def test_the_rights_are_those(name: str, right: Right) -> None:
    command = TABLE.commands[name]
    arguments = command.arguments(**arguments_of(name))
    refusal = None
    with context_with(*(RIGHTS - {right})) as context:
        try:
            command.run(context, arguments)
        except QMPError as exc:
            refusal = exc
    if wire.RIGHTS.get(name) == right:
        assert isinstance(refusal, PermissionDenied)
        assert f"'{right}'" in refusal.desc
    else:
        assert not isinstance(refusal, PermissionDenied)


@pytest.mark.parametrize("full", [False, True])
def test_the_errors_are_those(full: bool, tmp_path: Path) -> None:
    cases = [case for case in (*wire.CASES, *wire.COMMON_CASES) if case.full == full]
    assert cases
    path = tmp_path / "q.sock"
    options = ["--max-fds=1"] if full else []
    with (
        daemon_process(path, *options) as daemon,
        open(tmp_path / "file", "w+b") as file,
        open(tmp_path / "file", "rb") as stored,
        BlockingClient(path, 10.0) as client,
    ):
        client.execute("add-fd", {}, [stored])
        before = open_fds(daemon.pid)
        for case in cases:
            with pytest.raises(QMPError) as refusal:
                client.execute(case.command, case.arguments, [file] * case.fds)
            assert (refusal.value.error_class, refusal.value.desc) == case[3:5], case
        assert open_fds(daemon.pid) == before
