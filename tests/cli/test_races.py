"""Verbs that list or open descriptors first, while another client replaces them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from functools import partial
from pathlib import Path

import trio
from helpers import PATIENCE, ROOT, daemon_process

from qmpfd.cli.tapping import tapped
from qmpfd.client.blocking import BlockingClient

from .command import DONE, REFUSED, Cli


def _replaced(
    path: Path, trigger: str, name: str, file: Path, *words: object
) -> subprocess.CompletedProcess[str]:
    """Run a verb through a relay.  Before the relay passes on the first request with *trigger*,
    another client removes all that is stored, and adds *file* under *name*, with the same numbers.
    """
    relay, meanwhile = path.with_name("relay.sock"), [True]

    def show(from_client: bool, line: str, _: int) -> None:
        if from_client and trigger in line and meanwhile.pop(0):
            meanwhile.append(False)
            with BlockingClient(path, PATIENCE) as other, file.open("rb") as opened:
                [before] = other.execute("remove-fds", {"fdset-id": 0})
                after = other.execute("add-fd", {"opaque": name}, [opened])
                assert after == {"fdset-id": 0, "fd": before["fds"][0]["fd"]}

    async def main() -> subprocess.CompletedProcess[str]:
        async with tapped(path, relay, show):
            verb = partial(Cli(relay), *map(str, words))
            return await trio.to_thread.run_sync(verb)

    ran = trio.run(main)
    assert meanwhile == [False]
    return ran


def test_what_was_removed_before_an_interrupt(path: Path, tmp_path: Path) -> None:
    relay, requests = path.with_name("relay.sock"), 0
    started: list[subprocess.Popen[str]] = []

    def show(from_client: bool, line: str, _: int) -> None:
        nonlocal requests
        if from_client and '"remove-fds"' in line:
            requests += 1
            if requests == 2:
                started[0].send_signal(signal.SIGINT)

    async def main() -> tuple[str, str]:
        async with tapped(path, relay, show):
            argv = Cli(relay).argv("rm", "@*")
            pipe = subprocess.PIPE
            started.append(subprocess.Popen(argv, stdout=pipe, stderr=pipe, text=True, cwd=ROOT))
            return await trio.to_thread.run_sync(started[0].communicate)

    with daemon_process(path):
        for name in ("old", "middle", "new"):
            Cli(path).add(tmp_path / "file", os.O_RDONLY, opaque=name)
        out, error = trio.run(main)
        assert (started[0].returncode, error) == (130, "")
        assert out.startswith("removed fd set 2, fd ")
        assert out.endswith("  new\n")
        assert "new" not in _stored(path)
        assert "old" in _stored(path)


def _stored(path: Path) -> list[str]:
    sets = json.loads(Cli(path).done("ls", "--json"))
    return [fd["opaque"] for fdset in sets for fd in fdset["fds"]]


def test_what_was_replaced_meanwhile(path: Path, tmp_path: Path) -> None:
    """A verb affects descriptors of the name that it was given, and no other that has got their
    numbers.
    """
    first, second = tmp_path / "first", tmp_path / "second"
    first.write_text("first\n")
    second.write_text("second\n")
    take = ("exec", "--take", "@job=0", "--", "cat")
    with daemon_process(path), daemon_process(path.with_name("to.sock")):
        Cli(path).add(first, os.O_RDONLY, opaque="job")
        # Both jobs are taken once: the first by the other client, the second by this one.
        ran = _replaced(path, "remove", "job", second, *take)
        assert (ran.returncode, ran.stdout, _stored(path)) == (DONE, "second\n", [])
        Cli(path).add(first, os.O_RDONLY, opaque="job")
        ran = _replaced(path, "remove", "stranger", second, *take)
        assert (ran.returncode, ran.stdout, _stored(path)) == (REFUSED, "", ["stranger"])
        assert "FdNotFound" in ran.stderr

        ran = _replaced(path, '"remove-fd', "other", second, "rm", "@strange*")
        assert (ran.returncode, ran.stdout, _stored(path)) == (DONE, "", ["other"])
        push = ("push", "@other", "--to", path.with_name("to.sock"))
        ran = _replaced(path, '"open-fdset"', "third", second, *push)
        assert (ran.returncode, ran.stdout, _stored(path)) == (REFUSED, "", ["third"])
        assert _stored(path.with_name("to.sock")) == []
