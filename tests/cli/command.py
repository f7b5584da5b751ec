"""The command line as a process, for the tests of its verbs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from helpers import PATIENCE, ROOT

from qmpfd.client.blocking import BlockingClient

DONE, REFUSED, USAGE, NO_DAEMON = range(4)

#: As a user has it: output to a pipe or file is buffered.
ENV = {name: text for name, text in os.environ.items() if name != "PYTHONUNBUFFERED"}

#: Prints the numbers of its open descriptors and what they are; its own listing's is closed.
SHOW_PROGRAM = """
import json, os
found = {}
for number in os.listdir("/proc/self/fd"):
    try:
        found[number] = os.readlink(f"/proc/self/fd/{number}")
    except OSError:
        pass
print(json.dumps(found))
"""
SHOW = [sys.executable, "-c", SHOW_PROGRAM]


def run(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run ``qmpfd`` with these words to its end."""
    return subprocess.run(
        [sys.executable, "-m", "qmpfd", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
        **options,
    )


#: The command line as nobody, who may not read any more of this Python than there is by then.
_AS_NOBODY = """
import copy, locale, os, shutil, sys
import qmpfd.cli.exec, qmpfd.cli.status
os.setgroups([]); os.setgid(65534); os.setuid(65534)
sys.exit(qmpfd.cli.main(sys.argv[1:]))
"""


def run_as_nobody(*words: str) -> subprocess.CompletedProcess[str]:
    """As :func:`run`, as another user; for a test that is marked with root."""
    return subprocess.run(
        [sys.executable, "-c", _AS_NOBODY, *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


def run_on_full_disk(argv: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a program whose output cannot be written to its end; what it says on standard error."""
    with open("/dev/full", "w") as full:
        return subprocess.run(
            argv,
            cwd=ROOT,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=PATIENCE,
            check=False,
            **options,
        )


class Cli:
    """The command line as a process."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def argv(self, verb: str, *words: object) -> list[str]:
        """How it is started."""
        command = [sys.executable, "-m", "qmpfd", verb, "--socket", str(self.path)]
        return [*command, *map(str, words)]

    def __call__(
        self, verb: str, *words: object, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run it to its end."""
        options = {"stdin": subprocess.DEVNULL, "env": ENV, **options}
        return run(verb, "--socket", str(self.path), *map(str, words), **options)

    def done(self, verb: str, *words: object, **options: Any) -> str:
        """What it says when it succeeds."""
        ran = self(verb, *words, **options)
        assert (ran.returncode, ran.stderr) == (DONE, "")
        return ran.stdout

    def fails(self, status: int, verb: str, *words: object, **options: Any) -> str:
        """What it says when it fails so: one line."""
        ran = self(verb, *words, **options)
        assert (ran.returncode, ran.stdout) == (status, ""), ran
        assert re.fullmatch(r"qmpfd[^\n]*: [^\n]+\n", ran.stderr), ran.stderr
        return ran.stderr

    def add(self, file: Path, flags: int, fdset_id: int | None = None, **more: object) -> int:
        """Open *file* and add it; its number in the daemon."""
        number = os.open(file, flags | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            with BlockingClient(self.path, PATIENCE) as client:
                members = {**more, **({} if fdset_id is None else {"fdset-id": fdset_id})}
                return int(client.execute("add-fd", members, [number])["fd"])
        finally:
            os.close(number)


def shown(out: str) -> dict[int, str]:
    """What SHOW printed, without the standard streams."""
    return {int(n): link for n, link in json.loads(out).items() if int(n) > 2}
