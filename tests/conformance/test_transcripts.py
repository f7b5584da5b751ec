"""The daemon answers, in the `qemu` dialect, as the recorded QEMU 7.2.22.

The cases are replayed on a real QEMU too, which verifies the cases and the comparison.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator

import pytest
from installed import QEMU, need

from .compare import SHARED_COMMANDS, FdNames, canonical
from .peers import Peer, Pool, pool_of, start_daemon, start_qemu
from .replay import (
    CASES,
    DROPPED,
    RACY_IN_QEMU,
    RECORDED,
    RECORDED_NAMES,
    Replay,
    empty,
    exit_status,
)


@pytest.fixture(scope="module")
def daemons() -> Iterator[Pool]:
    yield from pool_of(start_daemon)


@pytest.fixture(scope="module")
def qemus() -> Iterator[Pool]:
    need(QEMU)
    yield from pool_of(start_qemu)


def play(peers: Pool, name: str, bytewise: bool) -> None:
    peer = peers.get()
    try:
        _play(peer, name, bytewise)
    except BaseException:
        peers.close()  # its state may spoil the next case
        raise


def _play(peer: Peer, name: str, bytewise: bool) -> None:
    empty(peer)
    Replay(peer, CASES[name], bytewise).run()
    if name.startswith("quit/"):
        assert exit_status(peer) == 0
    else:
        assert peer.process.poll() is None, f"{peer.name} is gone: {peer.said()}"


# Replies may not depend on how the bytes are split: each case is sent in both ways.
cut = pytest.mark.parametrize("bytewise", [False, True], ids=["whole", "bytewise"])
each_case = pytest.mark.parametrize("name", CASES)


@cut
@each_case
def test_the_daemon_answers_as_recorded(daemons: Pool, name: str, bytewise: bool) -> None:
    play(daemons, name, bytewise)


@pytest.mark.qemu
@cut
@each_case
def test_qemu_answers_as_recorded(qemus: Pool, name: str, bytewise: bool) -> None:
    if name in RACY_IN_QEMU:
        pytest.skip("QEMU races with itself here")
    play(qemus, name, bytewise)


@pytest.mark.qemu
def test_the_schema_is_qemus_for_the_commands_of_both(daemons: Pool, qemus: Pool) -> None:
    schemas = []
    for peers in (daemons, qemus):
        with peers.get().session() as wire:
            (line,) = wire.call(b'{"execute":"query-qmp-schema"}')
            schemas.append(json.loads(canonical(line, FdNames())["return"]))
    assert schemas[0].keys() == SHARED_COMMANDS
    assert schemas[0] == schemas[1]


def test_the_daemon_lists_the_commands_of_both(daemons: Pool) -> None:
    with daemons.get().session() as wire:
        (line,) = wire.call(b'{"execute":"query-commands"}')
    assert json.loads(canonical(line, FdNames())["return"]) == sorted(SHARED_COMMANDS)


def test_no_recorded_case_is_lost() -> None:
    dropped = [name for names in DROPPED.values() for name in names]
    names = sorted([*CASES, *dropped])
    assert len(names) == len(set(names)) == RECORDED
    assert hashlib.sha256("\n".join(names).encode()).hexdigest() == RECORDED_NAMES
