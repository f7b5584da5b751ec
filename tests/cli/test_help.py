"""Help and advice of the command line."""

from __future__ import annotations

import argparse
import subprocess
from pathlib import Path

import pytest
from helpers import PATIENCE, daemon_process

from qmpfd.cli import main
from qmpfd.cli.main import _VERBS, _parser

from .command import NO_DAEMON, REFUSED, USAGE, run


def parsers() -> dict[str, argparse.ArgumentParser]:
    [verbs] = [a for a in _parser("")._actions if isinstance(a, argparse._SubParsersAction)]
    return dict(verbs.choices)


# -- help texts --------------------------------------------------------------------------------


def test_every_verb_has_a_parser() -> None:
    assert list(parsers()) == list(_VERBS)


@pytest.mark.parametrize("verb", _VERBS)
def test_help_ends_with_examples_and_exit_statuses(verb: str) -> None:
    epilog = parsers()[verb].format_help().partition("\nexamples:\n")[2]
    examples, _, statuses = epilog.partition("\n\nexit status:\n")
    assert f"qmpfd {verb}" in examples
    assert "2 " in statuses


@pytest.mark.parametrize("verb", _VERBS)
def test_help_explains_every_argument(verb: str) -> None:
    for action in parsers()[verb]._actions:
        assert action.help, action


#: Shell functions for the programs in the examples: qmpfd records its arguments.
_STUBS = "source() { :; }; jq() { :; }; qmpfd() { printf '%s\\n' \"$@\" >> typed; }"


@pytest.mark.parametrize("verb", _VERBS)
def test_examples_can_be_typed(verb: str, tmp_path: Path) -> None:
    """A shell can read the examples, and the parser accepts them."""
    for name in ("commands", "disk.img"):
        (tmp_path / name).touch()
    examples = (parsers()[verb].epilog or "").partition("\n\n")[0].splitlines()[1:]
    assert examples
    for example in examples:
        line = example.partition("#")[0].replace("/dev/net/tun", "disk.img")
        ran = subprocess.run(
            ["bash", "-c", f"{_STUBS}; {line}"],
            cwd=tmp_path,
            capture_output=True,
            timeout=PATIENCE,
            check=False,
        )
        assert ran.stderr == b"", example
        typed = (tmp_path / "typed").read_text().splitlines()
        (tmp_path / "typed").unlink()
        assert typed[0] == verb, example
        if "--" in typed:
            typed = typed[: typed.index("--")]
        parsers()[verb].parse_args(typed[1:])


def test_without_a_verb(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == USAGE
    assert "--help" in capfd.readouterr().err


# -- advice ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, advice",
    [
        (["rm", "7"], "qmpfd ls lists"),
        (["add", "--fdset", "7", "/dev/null"], "without --fdset"),
        (["shell", "-c", "rm"], ""),
        (["shell", "-c", "add-fd --fd \u0660"], "--fd needs the number"),
        (["open"], "unknown verb open (see qmpfd --help)"),
        (["lss"], "did you mean ls?"),
        (["--long"], "--long cannot precede the verb: only --socket, --timeout, --json can"),
        (["rm", "--force", "0"], "qmpfd rm: unrecognized arguments: --force (see qmpfd rm --help)"),
        (["rm", "@a:r"], "a descriptor of this name: @a:[r]"),
        (["add", "--mode", "w", "/"], "a directory needs --mode r"),
        (["add", "--fd", "99"], "qmpfd add --fd 99 99< FILE"),
        (["push", "0", "--to", "/etc/passwd"], "not a socket (name another path)"),
    ],
)
def test_a_refusal_says_what_to_do(words: list[str], advice: str, path: Path) -> None:
    with daemon_process(path):
        ran = run(words[0], "--socket", str(path), *words[1:])
    assert ran.returncode in (REFUSED, USAGE, NO_DAEMON)
    assert advice in ran.stderr
    assert ran.stderr.count("\n") == 1


def test_two_daemons_on_one_socket(path: Path) -> None:
    with daemon_process(path):
        ran = run("serve", "--socket", str(path))
    assert ran.returncode == USAGE
    assert "already listening (qmpfd status shows the daemon" in ran.stderr
