"""Run the command line as a process, for the tests of its verbs."""

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

#: Environment without PYTHONUNBUFFERED: a user's Python buffers output to pipes and files.
ENV = {name: text for name, text in os.environ.items() if name != "PYTHONUNBUFFERED"}

#: Program that prints its open descriptors as JSON: number and link in /proc/self/fd.
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
    """Run ``qmpfd`` with these arguments to its end."""
    return subprocess.run(
        [sys.executable, "-m", "qmpfd", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
        **options,
    )


#: Program that runs the command line as nobody.  It imports everything first: nobody may be unable
#: to read this Python.
_AS_NOBODY = """
import copy, locale, os, shutil, sys
import qmpfd.cli.exec, qmpfd.cli.status
os.setgroups([]); os.setgid(65534); os.setuid(65534)
sys.exit(qmpfd.cli.main(sys.argv[1:]))
"""


def run_as_nobody(*words: str) -> subprocess.CompletedProcess[str]:
    """As :func:`run`, as user nobody; the test must have the mark ``root``."""
    return subprocess.run(
        [sys.executable, "-c", _AS_NOBODY, *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


def run_on_full_disk(argv: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a program with /dev/full as its standard output, where write(2) fails with ENOSPC."""
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
    """Runs the command line against one daemon."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def argv(self, verb: str, *words: object) -> list[str]:
        """Return the command line of a verb."""
        command = [sys.executable, "-m", "qmpfd", verb, "--socket", str(self.path)]
        return [*command, *map(str, words)]

    def __call__(
        self, verb: str, *words: object, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run a verb to its end."""
        options = {"stdin": subprocess.DEVNULL, "env": ENV, **options}
        return run(verb, "--socket", str(self.path), *map(str, words), **options)

    def done(self, verb: str, *words: object, **options: Any) -> str:
        """Run a verb that must succeed; return its output."""
        ran = self(verb, *words, **options)
        assert (ran.returncode, ran.stderr) == (DONE, "")
        return ran.stdout

    def fails(self, status: int, verb: str, *words: object, **options: Any) -> str:
        """Run a verb that must fail with *status* and one line of error; return that line."""
        ran = self(verb, *words, **options)
        assert (ran.returncode, ran.stdout) == (status, ""), ran
        assert re.fullmatch(r"qmpfd[^\n]*: [^\n]+\n", ran.stderr), ran.stderr
        return ran.stderr

    def add(self, file: Path, flags: int, fdset_id: int | None = None, **more: object) -> int:
        """Open *file* and add its descriptor; return its number in the daemon."""
        number = os.open(file, flags | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            with BlockingClient(self.path, PATIENCE) as client:
                members = {**more, **({} if fdset_id is None else {"fdset-id": fdset_id})}
                return int(client.execute("add-fd", members, [number])["fd"])
        finally:
            os.close(number)


def shown(out: str) -> dict[int, str]:
    """Return the descriptors that SHOW has printed, without the standard streams."""
    return {int(n): link for n, link in json.loads(out).items() if int(n) > 2}
