"""Run the fenced blocks of a Markdown page, and compare their output with the page."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from helpers import PATIENCE, daemon_process, send_now


class Block(NamedTuple):
    """A fenced block: language, text, number of its first line, and the reason not to run it, which
    the page gives in a comment before the block.
    """

    language: str
    text: str
    line: int
    not_run: str | None = None


_BLOCK = re.compile(
    r"^(?:<!-- not run: ([^\n]+) -->\n)?^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL
)


def blocks(markdown: str) -> list[Block]:
    """Return the fenced blocks of a text."""
    return [
        Block(match[2], match[3], markdown.count("\n", 0, match.start(3)) + 1, match[1])
        for match in _BLOCK.finditer(markdown)
    ]


#: The number of a descriptor, in the output of QMP, the command line, its table, and Python.
_FD = re.compile(
    r'(?<="fd": )\d+|(?<=, fd )\d+|(?<=: fd )\d+|(?<=: fd \d\d, )\d+|(?<=fd=)\d+|(?<=^\d {6})\d+',
    re.MULTILINE,
)


def without_numbers(text: str) -> str:
    """Return *text* with descriptor numbers replaced by FD0, FD1 and so on, as they first occur."""
    seen: dict[str, str] = {}
    named = _FD.sub(lambda match: seen.setdefault(match[0], f"FD{len(seen)}"), text)
    return re.sub(" {2,}", "  ", named)  # the columns of a table are as wide as the numbers


def run_console(text: str, folder: Path, env: dict[str, str]) -> str:
    """Run the commands of a console block; return the block with the actual output."""
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
    """Send the requests of a session; return the session with the actual replies."""
    seen = ""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(PATIENCE)
        sock.connect(os.fspath(path))
        with sock.makefile("r", newline="\r\n") as replies:
            seen += replies.readline()
            lines = text.splitlines(keepends=True)
            for line, expected in zip(lines, [*lines[1:], "{}"], strict=True):
                request = json.loads(line)
                if "execute" not in request:
                    continue
                # The page cannot show descriptors: each add-fd that shall succeed gets one.
                if request["execute"] == "add-fd" and "return" in json.loads(expected):
                    opaque = request.get("arguments", {}).get("opaque", "")
                    flags = os.O_RDWR if opaque.startswith("rdwr") else os.O_RDONLY
                    fd = os.open(folder / "disk.img", flags | os.O_CREAT, 0o600)
                    try:
                        send_now(sock, line.encode(), [fd])
                    finally:
                        os.close(fd)
                else:
                    sock.sendall(line.encode())
                seen += line + replies.readline()
    return seen.replace("\r\n", "\n")


#: Languages of blocks that are not run: shell commands for a checkout, and text that is no program.
_SHOWN = ("sh", "text", "ini")


@contextmanager
def ended_afterwards(folder: Path, env: dict[str, str]) -> Iterator[None]:
    """Kill the processes that the examples have left running, by their ``*.pid`` files."""
    try:
        yield
    finally:
        for file in folder.glob("*.pid"):
            pid = int(file.read_text())
            try:
                environ = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                if f"QMPFD_SOCKET={env['QMPFD_SOCKET']}".encode() in environ:
                    os.kill(pid, signal.SIGKILL)
            except (FileNotFoundError, ProcessLookupError):  # the process has ended by itself
                continue


def run_page(page: Path, folder: Path) -> list[str]:
    """Run the examples of a page in order, against one daemon, and compare their output.

    The numbers of descriptors may differ.  A block of Python or TOML is a file, and its first line
    has the file's name.

    Returns:
        The languages of the blocks that were run.
    """
    path = folder / "q.sock"
    env = {**os.environ, "QMPFD_SOCKET": str(path), "PYTHONWARNINGS": "error"}
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
    ran = []
    with daemon_process(path), ended_afterwards(folder, env):
        for block in blocks(page.read_text()):
            where = f"{page.name}, line {block.line}"
            if block.not_run or block.language in _SHOWN or block.language.startswith("{"):
                continue  # in braces: a directive of Sphinx
            if block.language in ("python", "toml"):
                name = re.match(r"# (\w+\.\w+)\n", block.text)
                assert name, f"{where}: the first line of an example names its file"
                (folder / name[1]).write_text(block.text)
                continue
            if block.language == "console":
                seen = run_console(block.text, folder, env)
            else:
                assert block.language == "json", f"{where}: what language is that?"
                seen = run_qmp(block.text, path, folder)
            same = without_numbers(seen) == without_numbers(block.text)
            assert same, f"{where}: that is now\n{seen}"
            ran.append(block.language)
    return ran


def unused_files(page: Path) -> list[str]:
    """Return the files that a page shows, but that none of its commands names."""
    found = blocks(page.read_text())
    commands = [block.text for block in found if block.language == "console" and not block.not_run]
    files = [
        block.text.removeprefix("# ").partition("\n")[0]
        for block in found
        if block.language in ("python", "toml") and not block.not_run
    ]
    return [name for name in files if not any(f" {name}" in each for each in commands)]
