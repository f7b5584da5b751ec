"""Replay recorded exchanges with QEMU 7.2.22 on another server.

A case is a list of steps; a step has the bytes and descriptors to send, and the expected lines.
`send` is the exact text; bytes that are not UTF-8 are lone surrogates.  The descriptor numbers in
it are those of the recording, and are translated.
"""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .compare import NESTED_TOO_DEEP, NOT_JSON, PARSE_ERROR, FdNames, Reply, canonical
from .peers import DEADLINE, Peer, Wire

HERE = Path(__file__).parent

RECORDED = 239
RECORDED_NAMES = "401264cfb51a24a68e0fcc802591bdb289757cd4de35d0e0ac197e69d4151fc2"
"""SHA-256 of the names of all recorded cases, sorted, one a line: detects a lost case."""

CASES: dict[str, dict[str, Any]] = {
    case["name"]: case
    for case in map(json.loads, (HERE / "transcripts.jsonl").read_text().splitlines())
}

DROPPED: dict[str, list[str]] = json.loads((HERE / "dropped.json").read_text())
"""Recorded cases that are not in `transcripts.jsonl`, by reason."""

RACY_IN_QEMU = frozenset({"oob/pipelined-add-fd-two-writes"})
"""With out-of-band execution, QEMU reads ahead, and may give the first command the descriptor of
the second: 94 of 300 times with 7.2.  qmpfd never does."""

_FD_IN_SEND = re.compile(r'(?<="fd":)\d+')


def _read_end() -> int:
    read, write = os.pipe()
    os.close(write)
    return read


_OPENERS: dict[str, Callable[[], int]] = {
    "null": lambda: os.open("/dev/null", os.O_RDWR),
    "rdonly": lambda: os.open(__file__, os.O_RDONLY),
    "wronly": lambda: os.open("/dev/null", os.O_WRONLY),
    "rdwr": lambda: os.open("/dev/null", os.O_RDWR),
    "nonblock": lambda: os.open("/dev/null", os.O_RDWR | os.O_NONBLOCK),
    "sock": lambda: socket.socket(socket.AF_UNIX).detach(),
    "pipe": _read_end,
}


def open_fd(stack: ExitStack, kind: str = "rdonly") -> int:
    """Return a descriptor of that kind; `stack` closes it."""
    fd = _OPENERS[kind]()
    stack.callback(os.close, fd)
    return fd


def empty(peer: Peer) -> None:
    """Remove every fd set: each case starts without any."""
    with peer.session() as wire:
        (line,) = wire.call(b'{"execute":"query-fdsets"}')
        for fdset in json.loads(line)["return"]:
            number = fdset["fdset-id"]
            command = b'{"execute":"remove-fd","arguments":{"fdset-id":%d}}' % number
            assert wire.call(command) == [b'{"return": {}}\r\n']


@dataclass
class Replay:
    """One case, replayed on `peer`; `run` raises AssertionError at the first difference."""

    peer: Peer
    case: dict[str, Any]
    bytewise: bool
    wires: dict[int, Wire] = field(default_factory=dict)
    recorded_fds: FdNames = field(default_factory=FdNames)
    our_fds: FdNames = field(default_factory=FdNames)

    def run(self) -> None:
        with ExitStack() as stack:
            stack.callback(self._close)
            for number, step in enumerate(self.case["steps"]):
                where = f"step {number}, {step['send'][:200]!r}"
                self._step(step, where)
            for number, wire in self.wires.items():
                self._nothing_more(wire, f"at the end, connection {number}")

    def _close(self) -> None:
        for wire in self.wires.values():
            wire.close()

    def _step(self, step: dict[str, Any], where: str) -> None:
        connection = step.get("conn", 0)
        match step.get("op"):
            case "connect":
                self.wires[connection] = self.peer.connect(step["sock"])
            case "close":
                self.wires.pop(connection).close()
                return
            case "send+shutdown(SHUT_WR)":
                self._send(step)
                self.wires[connection].shut_write()
            case None:
                self._send(step)
            case unknown:
                raise AssertionError(f"{where}: what is {unknown}?")
        wire = self.wires[connection]
        if "recv_filtered" in step:
            self._compare_list(wire, step["recv_filtered"], where)
        else:
            self._compare(wire, step["recv"], where)
        if step.get("eof"):
            assert wire.line() is None, f"{where}: more than there should be"
            self.wires.pop(connection).close()

    def _send(self, step: dict[str, Any]) -> None:
        text = _FD_IN_SEND.sub(lambda found: str(self._number(int(found[0]))), step["send"])
        kinds = step.get("kinds", ["rdonly"] * step["fds"])
        with ExitStack() as stack:
            fds = [open_fd(stack, kind) for kind in kinds]
            wire = self.wires[step.get("conn", 0)]
            wire.send(text.encode("utf-8", "surrogateescape"), fds, bytewise=self.bytewise)

    def _number(self, recorded: int) -> int:
        """Return the peer's number of the descriptor that has the number `recorded` in the case."""
        for offset in (0, 2**32):
            if recorded - offset in self.recorded_fds.numbers:
                index = self.recorded_fds.numbers.index(recorded - offset)
                return self.our_fds.numbers[index] + offset
        return recorded

    def _compare(self, wire: Wire, recorded: list[str], where: str) -> None:
        wanted = [canonical(line.encode(), self.recorded_fds) for line in recorded]
        if not self.peer.is_qemu:
            wanted = [reply for reply in wanted if "event" not in reply]  # qmpfd: only if enabled
        if self.peer.swallows_what_is_nested_too_deep:
            wanted = _up_to_nesting(wanted)
        got = [canonical(line, self.our_fds) for line in wire.lines(len(wanted))]
        if not self.peer.is_qemu:
            # QEMU echoes the id 1e999 as inf, which is no JSON; qmpfd may differ there only.
            wanted = [
                ours if theirs == NOT_JSON and ours != NOT_JSON else theirs
                for theirs, ours in zip(wanted, got, strict=True)
            ]
        assert got == wanted, where

    def _compare_list(self, wire: Wire, recorded: list[dict[str, Any]], where: str) -> None:
        """Compare one of the two replies of which only the part about descriptors was recorded."""
        (line,) = wire.lines(1)
        result = {entry["name"]: entry for entry in json.loads(line)["return"]}
        for entry in recorded:
            ours = result[entry["name"]]
            assert ours.keys() == entry.keys(), where
            assert ours.get("meta-type") == entry.get("meta-type"), where

    def _nothing_more(self, wire: Wire, where: str) -> None:
        wire.send_probe(reset=True)
        rest = [canonical(line, self.our_fds) for line in wire.until_probe()]
        assert len(rest) == 1, f"{where}: more than there should be: {rest}"
        assert json.loads(rest[0]["error"])["desc"] == PARSE_ERROR, where


def _up_to_nesting(replies: list[Reply]) -> list[Reply]:
    """Return the replies up to the nesting error, for a peer that sends none after it."""
    for count, reply in enumerate(replies, 1):
        if "error" in reply and json.loads(reply["error"])["desc"] == NESTED_TOO_DEEP:
            return replies[:count]
    return replies


def exit_status(peer: Peer) -> int:
    return peer.process.wait(DEADLINE)
