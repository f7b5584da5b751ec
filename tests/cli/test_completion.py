"""``qmpfd completion``: scripts that complete command lines in bash, zsh and fish."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import PATIENCE, ROOT, daemon_process
from installed import need

from qmpfd.cli.main import _VERBS
from qmpfd.client.blocking import BlockingClient


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
