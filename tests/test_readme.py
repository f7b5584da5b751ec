"""The README's examples do what it says, run in its order against one daemon."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from helpers import PATIENCE, ROOT, daemon_process, send_now

from qmpfd.cli.main import _parser
from qmpfd.commands import TABLE

README = (ROOT / "README.md").read_text()


class Block(NamedTuple):
    """A fenced block: its language, its text, the number of its first line."""

    language: str
    text: str
    line: int


def blocks(markdown: str) -> list[Block]:
    """The fenced blocks of a text."""
    return [
        Block(match[1], match[2], markdown.count("\n", 0, match.start(2)) + 1)
        for match in re.finditer(r"^```(\w*)\n(.*?)^```$", markdown, re.MULTILINE | re.DOTALL)
    ]


#: A descriptor's number, as QMP, the command line, its table, and Python write it.
_FD = re.compile(r'(?<="fd": )\d+|(?<=, fd )\d+|(?<=fd=)\d+|(?<=^\d {6})\d+', re.MULTILINE)


def without_numbers(text: str) -> str:
    """*text* with descriptor numbers replaced by which number it is, the first, the second."""
    seen: dict[str, str] = {}
    named = _FD.sub(lambda match: seen.setdefault(match[0], f"FD{len(seen)}"), text)
    return re.sub(" {2,}", "  ", named)  # the columns of a table are as wide as the numbers


def run_console(text: str, folder: Path, env: dict[str, str]) -> str:
    """Run the commands of a console block; the block as it looks now."""
    seen = ""
    for line in text.splitlines(keepends=True):
        if not line.startswith("$ "):
            continue
        done = subprocess.run(
            ["bash", "-c", line[2:]],
            cwd=folder,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        seen += line + done.stdout
    return seen


def run_qmp(text: str, path: Path, folder: Path) -> str:
    """Send the requests of a session; the session as it looks now."""
    seen = ""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(PATIENCE)
        sock.connect(os.fspath(path))
        with sock.makefile("r", newline="\r\n") as replies:
            seen += replies.readline()
            opened_before = [os.O_RDONLY, os.O_RDWR]
            for line in text.splitlines(keepends=True):
                request = json.loads(line)
                if "execute" not in request:
                    continue
                if request["execute"] == "add-fd" and opened_before:
                    flags = opened_before.pop(0) | os.O_CREAT
                    fd = os.open(folder / "disk.img", flags, 0o600)
                    try:
                        send_now(sock, line.encode(), [fd])
                    finally:
                        os.close(fd)
                else:
                    sock.sendall(line.encode())
                seen += line + replies.readline()
    return seen.replace("\r\n", "\n")


def test_the_examples(tmp_path: Path) -> None:
    ran = []
    path = tmp_path / "q.sock"
    env = {**os.environ, "QMPFD_SOCKET": str(path)}
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
    with daemon_process(path):
        for block in blocks(README):
            where = f"README.md, line {block.line}"
            if block.language == "python":
                name = re.match(r"# (\w+\.py)\n", block.text)
                assert name, f"{where}: the first line of an example names its file"
                (tmp_path / name[1]).write_text(block.text)
                continue
            if block.language == "console":
                seen = run_console(block.text, tmp_path, env)
            elif block.language == "json":
                seen = run_qmp(block.text, path, tmp_path)
            else:
                assert block.language == "sh", f"{where}: what language is that?"
                continue
            assert without_numbers(seen) == without_numbers(block.text), where
            ran.append(block.language)
    assert sorted(set(ran)) == ["console", "json"]


def test_every_program_is_run() -> None:
    programs = [block.text for block in blocks(README) if block.language == "python"]
    assert programs
    for program in programs:
        name = program.removeprefix("# ").partition("\n")[0]
        assert f"$ python {name}\n" in README


def test_every_make_target_is_there() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^make (\w+)", README, re.MULTILINE)
    assert targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_every_command_is_named_and_no_other() -> None:
    section = README.partition("| QMP commands |")[2].partition("\n\n")[0]
    named = re.findall(r"`([\w-]+)`", "".join(row.split("|")[1] for row in rows(section)))
    assert sorted(named) == sorted(TABLE.commands)


def test_every_verb_is_named_and_no_other() -> None:
    section = README.partition("| in the shell |")[2].partition("\n\n")[0]
    named = re.findall(r"`qmpfd ([\w-]+)`", "".join(row.split("|")[1] for row in rows(section)))
    listed = re.findall(r"^    ([\w-]+)(?= |$)", _parser("").format_help(), re.MULTILINE)
    assert sorted(named) == sorted(listed)


def rows(table: str) -> list[str]:
    """The rows of a Markdown table, below its head."""
    return [line for line in table.splitlines() if line.startswith("| ")]


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!https:)([^)#]+)", README):
        assert (ROOT / target).exists(), target
