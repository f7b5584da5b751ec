"""Random commands from several connections, compared with a simple model."""

from __future__ import annotations

import json
import os
import socket
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

from helpers import Pipe, daemon_thread, error, request, send_now, value
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)


class Connection:
    """One client, and its state in the model."""

    def __init__(self, path: Path) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(20)
        self.sock.connect(os.fspath(path))
        self._lines = self.sock.makefile("rb")
        assert "QMP" in self.reply()
        self.send(request("qmp_capabilities"))
        assert self.reply() == {"return": {}}
        self.waiting: list[Pipe] = []  # pending descriptors
        self.names: dict[str, Pipe] = {}

    def send(self, data: bytes, passed: list[Pipe] | None = None) -> None:
        send_now(self.sock, data, passed or [])
        for pipe in passed or []:
            pipe.release()

    def reply(self) -> dict[str, Any]:
        return dict(json.loads(self._lines.readline()))

    def end(self) -> bool:
        """Return whether the daemon has closed the connection without sending anything."""
        return self._lines.readline() == b""

    def take(self, passed: list[Pipe]) -> Pipe | None:
        """Take a descriptor for a command: the first one sent with it, else the first pending one.

        All other descriptors are closed.
        """
        waiting, self.waiting = passed or self.waiting, []
        return waiting[0] if waiting else None

    def close(self) -> None:
        self._lines.close()
        self.sock.close()


IDS = st.integers(-2, 4)
NAMES = st.sampled_from(["a", "b", "0c"])
OPAQUES = st.none() | st.sampled_from(["", "x", "\u20ac\n", "\0"])
COUNTS = st.integers(0, 3)


class Model(RuleBasedStateMachine):
    """The daemon, and the model of its state."""

    dialect: Literal["spec", "qemu"] = "spec"
    connections = Bundle[Connection]("connections")

    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()
        folder = self.stack.enter_context(tempfile.TemporaryDirectory(prefix="qmpfd-"))
        self.path = Path(folder, "q.sock")
        self.stack.enter_context(daemon_thread(self.path, dialect=self.dialect))
        self.pipes: list[Pipe] = []
        self.live: list[Connection] = []
        self.sets: dict[int, dict[int, tuple[Pipe, str | None]]] = {}  # by id, by number

    def teardown(self) -> None:
        for connection in self.live:
            connection.close()
        self.stack.close()
        assert not any(pipe.held() for pipe in self.pipes)
        for pipe in self.pipes:
            pipe.__exit__()

    def new_pipes(self, count: int) -> list[Pipe]:
        made = [Pipe() for _ in range(count)]
        self.pipes += made
        return made

    def kind(self, name: str) -> str:
        return name if self.dialect == "spec" else "GenericError"

    # -- connections ---------------------------------------------------------------------------

    @initialize(target=connections)
    def first(self) -> Connection:
        return self._connect()

    @rule(target=connections)
    def connect(self) -> Connection:
        return self._connect()

    def _connect(self) -> Connection:
        connection = Connection(self.path)
        self.live.append(connection)
        return connection

    @rule(connection=consumes(connections))
    def disconnect(self, connection: Connection) -> None:
        # The daemon has read the end when it closes too, and has cleaned up when it answers
        # another client.
        connection.sock.shutdown(socket.SHUT_WR)
        assert connection.end()
        connection.close()
        self.live.remove(connection)
        Connection(self.path).close()

    @rule(connection=connections, count=st.integers(1, 3))
    def pass_on_a_blank(self, connection: Connection, count: int) -> None:
        connection.waiting = self.new_pipes(count)
        connection.send(b" ", connection.waiting)
        self.query(connection)  # the daemon has read all input before the next invariant is checked

    # -- fd sets -------------------------------------------------------------------------------

    @rule(connection=connections, fdset_id=st.none() | IDS, opaque=OPAQUES, count=COUNTS)
    def add(
        self, connection: Connection, fdset_id: int | None, opaque: str | None, count: int
    ) -> None:
        arguments: dict[str, Any] = {}
        if fdset_id is not None:
            arguments["fdset-id"] = fdset_id
        if opaque is not None:
            arguments["opaque"] = opaque
        passed = self.new_pipes(count)
        connection.send(request("add-fd", arguments), passed)
        reply = connection.reply()
        pipe = connection.take(passed)
        if pipe is None:
            assert error(reply) == self.kind("FdNotSupplied")
        elif fdset_id is not None and (
            fdset_id < 0 or (self.dialect == "spec" and fdset_id not in self.sets)
        ):
            assert error(reply) == self.kind("InvalidParameterValue")
        else:
            info = value(reply)
            if fdset_id is None:
                fdset_id = min(set(range(len(self.sets) + 1)) - self.sets.keys())
            assert info["fdset-id"] == fdset_id
            assert not any(info["fd"] in fds for fds in self.sets.values())
            self.sets.setdefault(fdset_id, {})[info["fd"]] = pipe, opaque

    @rule(connection=connections, fdset_id=IDS, number=st.none() | st.integers(-1, 4))
    def remove(self, connection: Connection, fdset_id: int, number: int | None) -> None:
        """Remove the descriptor with the index *number* in the set, else with that number."""
        fds = self.sets.get(fdset_id, {})
        arguments = {"fdset-id": fdset_id}
        if number is not None:
            if 0 <= number < len(fds):
                number = list(fds)[number]
            arguments["fd"] = number
        connection.send(request("remove-fd", arguments))
        reply = connection.reply()
        if not fds or (number is not None and number not in fds):
            assert error(reply) == self.kind("FdNotFound")
        else:
            assert value(reply) == {}
            if number is None:
                fds.clear()
            else:
                del fds[number]
            if not fds:
                del self.sets[fdset_id]

    @rule(connection=connections)
    def query(self, connection: Connection) -> None:
        connection.send(request("query-fdsets"))
        assert value(connection.reply()) == [
            {
                "fdset-id": fdset_id,
                "fds": [
                    {"fd": fd} if opaque is None else {"fd": fd, "opaque": opaque}
                    for fd, (_, opaque) in fds.items()
                ],
            }
            for fdset_id, fds in sorted(self.sets.items(), reverse=True)
        ]

    @rule(connection=connections, count=st.integers(1, 5), passed=st.integers(0, 6))
    def add_many(self, connection: Connection, count: int, passed: int) -> None:
        """Send several add-fd with descriptors at once: each takes the next; the rest is closed."""
        made = self.new_pipes(passed)
        connection.send(request("add-fd") * count, made)
        line: list[Pipe | None] = [*made]
        if not made:
            line, connection.waiting = [*connection.waiting[:1]], []
        for _ in range(count):
            pipe = line.pop(0) if line else None
            reply = connection.reply()
            if pipe is None:
                assert error(reply) == self.kind("FdNotSupplied")
            else:
                info = value(reply)
                assert info["fdset-id"] not in self.sets
                self.sets[info["fdset-id"]] = {info["fd"]: (pipe, None)}
        if made:
            connection.waiting = []

    # -- names ---------------------------------------------------------------------------------

    @rule(connection=connections, name=NAMES, count=COUNTS)
    def getfd(self, connection: Connection, name: str, count: int) -> None:
        passed = self.new_pipes(count)
        connection.send(request("getfd", {"fdname": name}), passed)
        reply = connection.reply()
        pipe = connection.take(passed)
        if pipe is None:
            assert error(reply) == self.kind("FdNotSupplied")
        elif name[0].isdigit():
            assert error(reply) == self.kind("InvalidParameterValue")
        else:
            assert value(reply) == {}
            connection.names[name] = pipe

    @rule(connection=connections, name=NAMES)
    def closefd(self, connection: Connection, name: str) -> None:
        connection.send(request("closefd", {"fdname": name}))
        reply = connection.reply()
        if connection.names.pop(name, None) is None:
            assert error(reply) == self.kind("FdNotFound")
        else:
            assert value(reply) == {}

    # -- invalid input -------------------------------------------------------------------------

    @rule(connection=connections, count=COUNTS)
    def broken(self, connection: Connection, count: int) -> None:
        """Send invalid input, which closes all pending descriptors."""
        connection.send(b"]", self.new_pipes(count))
        assert error(connection.reply()) == "GenericError"
        connection.waiting = []

    @rule(connection=connections, count=COUNTS)
    def mistyped(self, connection: Connection, count: int) -> None:
        passed = self.new_pipes(count)
        connection.send(request("add-fd", {"opaque": 7}), passed)
        assert error(connection.reply()) == "GenericError"
        connection.take(passed)

    # -- invariants ----------------------------------------------------------------------------

    @invariant()
    def holds_what_it_should(self) -> None:
        held = {pipe for fds in self.sets.values() for pipe, _ in fds.values()}
        for connection in self.live:
            held |= {*connection.waiting, *connection.names.values()}
        assert {pipe for pipe in self.pipes if pipe.held()} == held


class QemuModel(Model):
    """Model of the qemu dialect."""

    dialect = "qemu"


STEPS = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_spec_dialect() -> None:
    run_state_machine_as_test(Model, settings=STEPS)


def test_qemu_dialect() -> None:
    run_state_machine_as_test(QemuModel, settings=STEPS)
