"""Help, completion, tables, and advice of the command line.

Tests of cli/completion.py and cli/output.py.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import PATIENCE, ROOT, daemon_process
from installed import need
from terminal import on_a_terminal

from qmpfd.cli import main
from qmpfd.cli.main import _VERBS, _parser
from qmpfd.cli.output import print_table
from qmpfd.client.blocking import BlockingClient

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


# -- tables ------------------------------------------------------------------------------------

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


# -- completion --------------------------------------------------------------------------------


def completion(shell: str, folder: Path) -> Path:
    ran = subprocess.run(
        [sys.executable, "-m", "qmpfd", "completion", shell],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    file = folder / f"completion.{shell}"
    file.write_text(ran.stdout)
    return file


#: $PATH with qmpfd, which the completion scripts run.
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"


def bash_completes(file: Path, *words: str, env: dict[str, str] | None = None) -> list[str]:
    """Return bash's completions of the last word; bash splits ``--socket=PATH`` into three."""
    code = (
        f'source "{file}"; COMP_LINE=$1; COMP_POINT=${{#1}}; _qmpfd qmpfd "$2"; '
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    line = " ".join(words).replace(" = ", "=")
    ran = subprocess.run(
        ["bash", "-c", code, "bash", line, words[-1]],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=True,
        env={**os.environ, "PATH": PATH, **(env or {})},
    )
    assert ran.stderr == ""
    return ran.stdout.split()


def test_bash(tmp_path: Path, path: Path) -> None:
    file = completion("bash", tmp_path)
    assert {*_VERBS} <= {*bash_completes(file, "qmpfd", "")}
    assert bash_completes(file, "qmpfd", "s") == ["serve", "shell", "status"]
    assert bash_completes(file, "qmpfd", "--timeout", "1", "st") == ["status"]
    assert bash_completes(file, "qmpfd", "add", "--mo") == ["--mode"]
    assert bash_completes(file, "qmpfd", "add", "--mode", "r") == ["r", "rw"]
    assert bash_completes(file, "qmpfd", "completion", "") == ["bash", "zsh", "fish"]
    assert bash_completes(file, "qmpfd", "add", "--opaque", "") == []
    assert bash_completes(file, "qmpfd", "add", f"{tmp_path}/compl") == [str(file)]
    env = {"QMPFD_SOCKET": str(path)}
    assert bash_completes(file, "qmpfd", "rm", "", env=env) == []
    with daemon_process(path), open(os.devnull) as null, BlockingClient(path, PATIENCE) as client:
        client.execute("add-fd", {}, [null])
        assert bash_completes(file, "qmpfd", "rm", "", env=env) == ["0"]
        for name in ("vm1:disk", "web", "two words", "$(date)", "a:r", "a:rw", "a:wronly"):
            client.execute("add-fd", {"fdset-id": 0, "opaque": name}, [null])
        assert bash_completes(file, "qmpfd", "rm", "", env=env) == ["0", "@vm1:disk", "@web"]
        assert bash_completes(file, "qmpfd", "rm", "@w", env=env) == ["@web"]


def test_bash_asks_the_daemon_that_the_line_names(tmp_path: Path, path: Path) -> None:
    """Completion reads ``--socket=PATH``, which bash splits, without evaluating the word."""
    file = completion("bash", tmp_path)
    env = {"QMPFD_SOCKET": "/nowhere", "HOME": str(path.parent)}
    with daemon_process(path), open(os.devnull) as null, BlockingClient(path, PATIENCE) as client:
        client.execute("add-fd", {}, [null])
        for word in (str(path), f"'{path}'", f"~/{path.name}"):
            for named in (["--socket", word], ["--socket", "=", word]):
                assert bash_completes(file, "qmpfd", "rm", *named, "", env=env) == ["0"]
        bad = f"$(touch {tmp_path}/run)"
        assert bash_completes(file, "qmpfd", "rm", "--socket", bad, "", env=env) == []
        assert not (tmp_path / "run").exists()
    options = ("qmpfd", "rm", "--socket")
    assert bash_completes(file, *options, f"{tmp_path}/compl") == [str(file)]
    assert bash_completes(file, *options, "=", f"{tmp_path}/compl") == [str(file)]
    assert "gzip" in bash_completes(file, "qmpfd", "exec", "0", "--", "gzi")
    assert bash_completes(file, "qmpfd", "exec", "0", "--", "cat", f"{tmp_path}/c") == [str(file)]


def test_fish(tmp_path: Path, path: Path) -> None:
    need("fish")
    file = completion("fish", tmp_path)

    def completes(line: str) -> list[str]:
        ran = subprocess.run(
            ["fish", "--no-config", "-c", f"source {file}; complete -C '{line}'"],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=True,
            env={
                **os.environ,
                "QMPFD_SOCKET": "/nowhere",
                "HOME": str(tmp_path),
                "PATH": PATH,
            },
        )
        return [each.partition("\t")[0] for each in ran.stdout.splitlines()]

    assert completes("qmpfd sta") == ["status"]
    assert completes("qmpfd add --mode=r") == ["--mode=r", "--mode=rw"]
    assert completes(f"qmpfd serve --policy {tmp_path}/compl") == [str(file)]
    assert completes(f"qmpfd serve --policy={tmp_path}/compl") == [f"--policy={file}"]
    assert "gzip" in completes("qmpfd exec 0 -- gzi")
    with daemon_process(path), open(os.devnull) as null, BlockingClient(path, PATIENCE) as client:
        client.execute("add-fd", {}, [null])
        assert completes("qmpfd rm ") == []
        assert completes(f"qmpfd rm --socket {path} ") == ["0"]
        assert completes(f"qmpfd rm --socket={path} ") == ["0"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_can_read_it(shell: str, tmp_path: Path) -> None:
    file = completion(shell, tmp_path)
    need(shell)
    subprocess.run([shell, "-n", str(file)], check=True, timeout=PATIENCE)


def _complete(line: str) -> subprocess.CompletedProcess[str]:
    """Run the completion of *line* for bash."""
    return subprocess.run(
        [sys.executable, "-m", "qmpfd", "completion", "bash", "--", line],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


@pytest.mark.parametrize(
    "line, found",
    [
        ("qmpfd --t", ["--timeout"]),
        ("qmpfd --json --", ["--help", "--version", "--socket", "--timeout", "--json"]),
        ("qmpfd --socket ", [":files"]),
        ("qmpfd --socket=x", [":files"]),
        ("qmpfd --timeout ", []),
        ("qmpfd --socket x che", ["check-policy"]),
        ("qmpfd --socket ls ad", ["add"]),
        ("qmpfd --json add --mode ", ["r", "w", "rw"]),
    ],
)
def test_options_before_the_verb(line: str, found: list[str]) -> None:
    ran = _complete(line)
    assert (ran.returncode, ran.stderr, ran.stdout.splitlines()) == (0, "", found)


@pytest.mark.parametrize("line", ["", "qmpf"])
def test_a_line_in_which_the_command_is_not_typed_yet(line: str) -> None:
    """Completion of a line without the command's name gives nothing and no error."""
    ran = _complete(line)
    assert (ran.returncode, ran.stderr) == (0, "")
