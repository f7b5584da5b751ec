"""Random walks: the daemon and a real QEMU get the same input, and give the same replies.

`QMPFD_WALK_STEPS` sets the number of commands, and makes each run random:

    QMPFD_WALK_STEPS=20000 .venv/bin/pytest tests/conformance/test_walk.py   # some five minutes

Hypothesis shrinks a walk that ends in a difference.  The same walks run with two QEMUs too, which
verifies that the comparison itself finds no differences.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from installed import QEMU, need

from .compare import FdNames, Reply, canonical
from .peers import Peer, Pool, Wire, pool_of, start_daemon, start_qemu
from .replay import empty, open_fd
from .steps import FORGET_NAMES, Send, Step, negotiations, openings, walks

pytestmark = pytest.mark.qemu  # not slow: a run without QMPFD_WALK_STEPS is short

PER_WALK = 10
"""Lower bound of the average number of steps in a walk, which has 1 to 40."""

ASKED = os.environ.get("QMPFD_WALK_STEPS")
COMMANDS = int(ASKED or 1200)
NO_SUCH_FD = 99999
NOT_SUPPLIED = "No file descriptor supplied via SCM_RIGHTS"

_FD_MARK = re.compile(rb"@(fd|alias)(\d+)@")
_PURGE = b'{"execute":"getfd","arguments":{"fdname":"purge"}}'
_PURGED = b'{"execute":"closefd","arguments":{"fdname":"purge"}}'


@dataclass
class Side:
    """One of the two peers, in one walk."""

    peer: Peer
    wires: list[Wire]
    fds: FdNames = field(default_factory=FdNames)


class Walk:
    """One walk on two peers."""

    def __init__(self, peers: tuple[Peer, Peer], stack: ExitStack) -> None:
        self._fd = open_fd(stack)
        self._out_of_band = False
        self.sides = []
        for peer in peers:
            empty(peer)
            wires = [stack.enter_context(peer.connect(number)) for number in (0, 1)]
            self.sides.append(Side(peer, wires))
        for number in (0, 1):
            self._same("the greeting", [side.wires[number].lines(1) for side in self.sides])

    def negotiate(self, *commands: bytes) -> None:
        """Send the first command of each connection, and close the named fds that QEMU has kept."""
        for number, command in enumerate(commands):
            self.go(Step((Send(command),), connection=number))
            # With out-of-band execution, nine errors at once can abort QEMU 7.2 (an assertion on
            # the length of its queue): steps with errors use the other connection.
            self._out_of_band |= b"oob" in command
            for side in self.sides:
                side.wires[number].call(FORGET_NAMES)

    def go(self, step: Step) -> None:
        """Run one step on both sides, and compare the replies."""
        if self._out_of_band and not step.clean:
            step = replace(step, connection=1)
        for side in self.sides:
            try:
                self._send(step, side)
            except BrokenPipeError:
                pass  # `lines` below has the replies before that, and "(closed)"
        lines = [side.wires[step.connection].until_probe() for side in self.sides]
        self._same(str(step), lines)
        if step.has_fds:
            self._purge(step)

    def _send(self, step: Step, side: Side) -> None:
        wire = side.wires[step.connection]
        for send in step.sends:
            wire.send(self._filled_in(send, side), [self._fd] * send.fds)
        wire.send_probe(reset=not step.clean)

    def finish(self) -> None:
        """Compare the listings of both sides on both connections."""
        listing = Send(b'{"execute":"query-fdsets"}')
        self.go(Step((listing,)))
        self.go(Step((listing,), connection=1))

    def _filled_in(self, send: Send, side: Side) -> bytes:
        def number(found: re.Match[bytes]) -> bytes:
            index = int(found[2])
            # Only if the number is unambiguous on both sides: not used again after a close.
            if any(
                index >= len(each.fds.numbers) or not each.fds.is_current(index)
                for each in self.sides
            ):
                return b"%d" % NO_SUCH_FD
            return b"%d" % (side.fds.numbers[index] + (2**32 if found[1] == b"alias" else 0))

        return _FD_MARK.sub(number, send.data)

    def _same(self, what: str, both: list[list[bytes]]) -> None:
        replies: list[list[Reply | str]] = [
            [_canonical(line, side.fds) for line in lines]
            for side, lines in zip(self.sides, both, strict=True)
        ]
        if replies[0] != replies[1]:
            output = [
                "\n  ".join([f"{side.peer.name}, {side.peer.said()}:", *map(repr, lines)])
                for side, lines in zip(self.sides, both, strict=True)
            ]
            raise AssertionError("\n".join(["they differ after", f"  {what}", *output]))

    def _purge(self, step: Step) -> None:
        """Make QEMU close the fd that it keeps after a refused command; qmpfd must have none."""
        for side in self.sides:
            wire = side.wires[step.connection]
            answers = [json.loads(line) for line in wire.call(_PURGE)]
            wire.call(_PURGED)
            if not side.peer.is_qemu:
                desc = answers[0].get("error", {}).get("desc")
                assert desc == NOT_SUPPLIED, f"an fd was still waiting after {step}"


def _canonical(line: bytes, names: FdNames) -> Reply | str:
    try:
        return canonical(line, names)
    except AssertionError as malformed:  # a text that equals no other: reported with its step
        return f"{malformed} {id(malformed)}"


@pytest.fixture(scope="module")
def qemus() -> Iterator[Pool]:
    need(QEMU)
    yield from pool_of(start_qemu)


@pytest.fixture(scope="module")
def other_qemus() -> Iterator[Pool]:
    yield from pool_of(start_qemu)


@pytest.fixture(scope="module")
def daemons() -> Iterator[Pool]:
    yield from pool_of(start_daemon)


def walk_side_by_side(pools: tuple[Pool, Pool], commands: int) -> None:
    sent = 0

    # No database, and the same examples each time unless QMPFD_WALK_STEPS is set.
    @settings(
        max_examples=max(1, commands // PER_WALK),
        deadline=None,
        database=None,
        derandomize=ASKED is None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
    @given(openings, negotiations, walks())
    def side_by_side(opening: list[Step], negotiation: bytes, walk: list[Step]) -> None:
        nonlocal sent
        with ExitStack() as stack:
            both = Walk((pools[0].get(), pools[1].get()), stack)
            for step in opening:
                both.go(step)
            both.negotiate(negotiation, b'{"execute":"qmp_capabilities"}')
            for step in walk:
                both.go(step)
                sent += 1
            both.finish()

    side_by_side()
    assert sent >= commands, "PER_WALK is too high"


@pytest.mark.timeout(60 + COMMANDS // 20)
def test_the_daemon_and_qemu_go_the_same_way(daemons: Pool, qemus: Pool) -> None:
    walk_side_by_side((daemons, qemus), COMMANDS)


@pytest.mark.timeout(60 + COMMANDS // 20)
def test_two_qemus_go_the_same_way(qemus: Pool, other_qemus: Pool) -> None:
    walk_side_by_side((other_qemus, qemus), COMMANDS // 8)
