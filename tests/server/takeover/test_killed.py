"""Either side of a takeover is killed, or hangs, at any line of its source.

Tests of server/fdstore/handover.py.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from helpers import Pipe
from stepper import Stepped, Stepper

from qmpfd.client.blocking import BlockingClient, NoDaemon

PATIENCE = 20.0
ALL_STEPS = os.environ.get("QMPFD_ALL_STEPS") == "1"

#: Functions of the successor, and of the predecessor, whose lines are counted.
SUCCESSOR = {
    "takeover/receiver.py": (
        "prepare",
        "__init__",
        "reserve",
        "receive_rest",
        "_receive_state",
        "_receive_fds",
        "request",
        "send",
        "receive",
        "await_handover",
    ),
    "restore.py": ("finish", "_inherit_listeners", "_restore_sessions", "_fill_store"),
}
OLD = {
    "takeover/sender.py": (),
    "server.py": ("drop_duplicates",),
    "connection/session.py": ("reply_to_takeover",),
    "connection/snapshot.py": ("describe",),
}
#: Few descriptors in a message: several messages.
SMALL = {"qmpfd.server.takeover.sender.SCM_MAX_FD": 3}
#: And a short timeout for a side that hangs.
IMPATIENT = {**SMALL, "qmpfd.server.takeover.sender.TAKEOVER_TIMEOUT": 0.3}


@pytest.fixture(scope="module")
def stepper() -> Iterator[Stepper]:
    with Stepper() as stepper:
        yield stepper


def steps(stride: int, offset: int = 1) -> Iterator[int]:
    """Yield the lines to test: every *stride*-th from *offset* on, or all with ALL_STEPS."""
    step = 1 if ALL_STEPS else offset
    while True:
        yield step
        step += 1 if ALL_STEPS else stride


class World:
    """A daemon with all kinds of state, and clients that check it.

    Args:
        folder: folder for socket and logs.
        stepper: starts the daemons.
        options: arguments of ``stepper.start`` for the predecessor.
    """

    def __init__(self, folder: Path, stepper: Stepper, **options: Any) -> None:
        self._stack = ExitStack()
        self._folder = folder
        self._stepper = stepper
        self.path = folder / "q.sock"
        self.path.unlink(missing_ok=True)
        command = ["serve", "--socket", str(self.path)]
        self.old = stepper.start(command, folder / "old.log", **options)
        self._stack.callback(self.old.end)
        self.old.until("listening")
        self.steady = self._client()
        self.watcher = self._client()
        self._half = self._client().detach()
        self._stack.callback(self._half.close)
        self._half.setblocking(True)
        self._half.settimeout(PATIENCE)
        self.pipes = [self._stack.enter_context(Pipe()) for _ in range(6)]
        for number, pipe in enumerate(self.pipes[:4]):
            self.steady.execute("add-fd", {"opaque": f"pipe {number}"}, [pipe])
        self.steady.execute("getfd", {"fdname": "named"}, [self.pipes[4]])
        self.watcher.execute("watch-fdsets", {"enable": True})
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", self.pipes[5].fileno()))]
        self._half.sendmsg([b'{"execute": "add-fd", "argum'], rights)
        for pipe in self.pipes:
            pipe.release()
        self.before = self.listing()

    def _client(self) -> BlockingClient:
        return self._stack.enter_context(BlockingClient(self.path, PATIENCE))

    def listing(self) -> list[Any]:
        fds = self.steady.execute("query-fds")
        return [[fd[k] for k in ("fdset-id", "fd", "opaque", "target")] for fd in fds]

    def successor(self, **options: Any) -> Stepped:
        command = ["serve", "--takeover", "--socket", str(self.path)]
        successor = self._stepper.start(command, self._folder / "new.log", **options)
        self._stack.callback(successor.end)
        return successor

    def check(self) -> None:
        """Check all state on every connection; remove all, and check that nothing is left."""
        assert self.listing() == self.before
        with BlockingClient(self.path, PATIENCE) as other:
            other.execute("remove-fd", {"fdset-id": 1})
            assert not self.pipes[1].held()
        events = self.watcher.events()
        event = next(events)
        assert (event.name, event.data["opaque"]) == ("FD_REMOVED", "pipe 1")
        self._half.sendall(b'ents": {"opaque": "half"}, "id": "half"}')
        assert b'"fdset-id": 1' in self._half.recv(1000)
        event = next(events)
        assert (event.name, event.data["opaque"]) == ("FD_ADDED", "half")
        self.steady.execute("closefd", {"fdname": "named"})
        assert not self.pipes[4].held()
        for fdset in self.steady.execute("query-fdsets"):
            self.steady.execute("remove-fd", {"fdset-id": fdset["fdset-id"]})
        assert not any(pipe.held() for pipe in self.pipes)

    def is_lost(self) -> bool:
        """Return whether all descriptors are closed: no daemon serves."""
        return not any(pipe.held() for pipe in self.pipes)

    def __enter__(self) -> World:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()


@contextmanager
def world(folder: Path, stepper: Stepper, **options: Any) -> Iterator[World]:
    with World(folder, stepper, **options) as made:
        yield made
    for log in folder.glob("*.log"):
        assert "Traceback" not in log.read_text(), log.read_text()
    assert not (folder / "q.sock").exists()


def test_the_successor_is_killed(tmp_path: Path, stepper: Stepper) -> None:
    """The predecessor serves on at once with everything, unless it has handed over."""
    survived = lost = 0
    for step in steps(9):
        with world(tmp_path, stepper, patches=SMALL) as here:
            successor = here.successor(where=SUCCESSOR, step=step)
            successor.until("listening")
            if successor.poll() != -signal.SIGKILL:  # fewer lines than that were executed
                assert here.old.wait() == 0
                here.check()
                break
            try:
                here.check()
                survived += 1
            except NoDaemon:
                # The window between the predecessor's commit and the successor's next action.
                assert re.search(r" (await_handover|send|receive|request)$", successor.place)
                assert here.old.wait() == 0
                assert here.is_lost()
                here.path.unlink()  # no process is left that would
                lost += 1
    assert survived > 5
    assert lost < survived


def test_the_predecessor_is_killed(tmp_path: Path, stepper: Stepper) -> None:
    """The successor serves if it has received everything; else it fails with a message."""
    saved = lost = 0
    for step in steps(11, 2):
        with world(tmp_path, stepper, where=OLD, step=step, patches=SMALL) as here:
            successor = here.successor()
            successor.until("listening")
            if successor.poll() is None:
                here.check()
                if here.old.wait() == 0:
                    break
                saved += 1
            else:
                assert "fetched" not in successor.said  # logged when everything has been received
                assert here.old.wait() == -signal.SIGKILL
                assert here.old.place.rpartition(" ")[2] != "leave"
                assert successor.poll() == 3, successor.said
                assert successor.said.count("\n") == 1
                assert here.is_lost()
                here.path.unlink()
                lost += 1
    assert lost
    assert saved


def has_gone(old: Stepped) -> bool:
    """Wait until the predecessor's outcome is certain; return whether it has handed over."""
    deadline = time.monotonic() + 1.0
    while time.monotonic() < deadline and "this daemon goes on" not in old.said:
        if "has taken over" in old.said:
            return True
        time.sleep(0.002)
    return False


def test_the_successor_hangs(tmp_path: Path, stepper: Stepper) -> None:
    """The predecessor serves on after a timeout; the successor, when it continues, does not."""
    resumed = 0
    for step in steps(25, 3):
        with world(tmp_path, stepper, patches=IMPATIENT) as here:
            successor = here.successor(where=SUCCESSOR, step=step, number=signal.SIGSTOP)
            successor.until("STEP", "listening")
            if not successor.place:
                break
            if not has_gone(here.old):
                assert here.listing() == here.before
                resumed += 1
            successor.signal(signal.SIGCONT)
            successor.until("listening")
            if successor.poll() is None:
                assert here.old.wait() == 0
            else:
                assert successor.poll() == 3, successor.said
                assert here.old.poll() is None
                assert len(successor.said.splitlines()) - successor.said.count("STEP") <= 2
            here.check()
    assert resumed
