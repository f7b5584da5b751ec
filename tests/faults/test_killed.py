"""Clients are killed or stopped while they send commands."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

from helpers import pipes, request, value

from .harness import SECONDS, Harness, Program, assert_service_unharmed


def test_killed(path: Path) -> None:
    dice = random.Random(1)

    def scenario(harness: Harness) -> None:
        ends = time.monotonic() + 2 * SECONDS
        running: list[Program] = []
        while time.monotonic() < ends:
            running.append(harness.attack("life", dice.randrange(1000)))
            time.sleep(dice.uniform(0, 0.03))
            if len(running) > 2:
                running.pop(dice.randrange(len(running))).process.kill()

    assert_service_unharmed(path, scenario)


def test_stopped(path: Path) -> None:
    """Clients are stopped for longer than --write-timeout, and continue."""
    dice = random.Random(2)

    def scenario(harness: Harness) -> None:
        lives = [harness.attack("life", number) for number in range(3)]
        ends = time.monotonic() + 2 * SECONDS
        while time.monotonic() < ends:
            victim = dice.choice(lives).process
            victim.send_signal(signal.SIGSTOP)
            time.sleep(dice.uniform(0, 0.4))
            victim.send_signal(signal.SIGCONT)
            time.sleep(dice.uniform(0, 0.05))

    assert_service_unharmed(path, scenario, "--write-timeout", "0.2")


def test_stopped_while_it_holds_descriptors(path: Path) -> None:
    """Unread descriptors of a stopped client do not delay others that open the same one."""

    def scenario(harness: Harness) -> None:
        harness.attack("deaf:opened", 40).process.send_signal(signal.SIGSTOP)
        caller = harness.caller()
        ends = time.monotonic() + SECONDS
        with pipes(1) as [pipe]:
            info = value(caller.call("add-fd", None, [pipe]))
            while time.monotonic() < ends:
                caller.send(request("open-fdset", {"fdset-id": info["fdset-id"]}))
                _, _, _, _ = caller.sock.recvmsg(1 << 12)

    assert_service_unharmed(path, scenario)


def test_killed_with_a_queue_of_requests(path: Path) -> None:
    """The daemon executes all commands of a client that has disconnected."""

    def scenario(harness: Harness) -> None:
        caller = harness.caller()
        with pipes(50) as made:
            victim = harness.caller()
            with harness.stopped():
                for pipe in made:
                    victim.send(request("add-fd"), [pipe])
                    pipe.release()
                victim.close()
            while len(value(caller.call("query-fdsets"))) < len(made):
                pass
            for number in range(len(made)):
                value(caller.call("remove-fd", {"fdset-id": number}))
            assert not any(pipe.held() for pipe in made)

    assert_service_unharmed(path, scenario)
