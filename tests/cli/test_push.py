"""``qmpfd push``: copy stored descriptors to another server, also to a real QEMU.

Tests of cli/forgetful.py.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from conformance.peers import Wire as QemuWire
from conformance.peers import start_qemu
from helpers import PATIENCE, daemon_thread

from qmpfd.client.blocking import BlockingClient
from qmpfd.kernel.fd import Fd, close_all

from .command import DONE, NO_DAEMON, REFUSED, USAGE, Cli


def test_push(cli: Cli, file: Path, tmp_path: Path) -> None:
    """All descriptors of a set, the oldest first, with their texts; they stay stored here."""
    cli.add(file, os.O_WRONLY, 0, opaque="o\u20ac")
    to = tmp_path / "other.sock"
    with daemon_thread(to):
        there = Cli(to)
        out = cli.done("push", 0, "--to", to)
        assert re.fullmatch(rf"fd set 0 of {to}: fd \d+, \d+, \d+\n", out)
        described = json.loads(there.done("ls", "--long", "--json"))
        assert [fd["access"] for fd in described] == ["rdonly", "rdwr", "wronly"]
        assert {fd["target"] for fd in described} == {str(file)}
        assert [fd.get("opaque") for fd in described] == [None, None, "o\u20ac"]
        again = json.loads(cli.done("push", 0, "--to", to, "--fdset", 0, "--json"))
        assert again["fdset-id"] == 0
        assert [fd.get("opaque") for fd in again["fds"]] == [None, None, "o\u20ac"]
        assert all(isinstance(fd["fd"], int) for fd in again["fds"])
        [fdset] = json.loads(there.done("ls", "--json"))
        assert fdset["fds"][3:] == [dict(sorted(fd.items())) for fd in again["fds"]]
        assert len(json.loads(cli.done("ls", "--json"))[0]["fds"]) == 3


def test_push_errors(cli: Cli, file: Path, tmp_path: Path) -> None:
    to = tmp_path / "other.sock"
    with daemon_thread(to):
        assert "'fdset-id:7' not found" in cli.fails(REFUSED, "push", 7, "--to", to)
        assert "existing" in cli.fails(REFUSED, "push", 0, "--to", to, "--fdset", 7)
        assert Cli(to).done("ls", "--json") == "[]\n"
    assert str(to) in cli.fails(NO_DAEMON, "push", 0, "--to", to)
    cli.fails(NO_DAEMON, "push", 0, "--to", file)
    cli.fails(USAGE, "push", 0)
    cli.fails(USAGE, "push", "x", "--to", to)
    cli.fails(USAGE, "push", 0, "--to", to, "--fdset", "x")


@contextmanager
def _losing(path: Path, to: Path, request: int, *, executed: bool) -> Iterator[None]:
    """Run a relay to another server that closes its first connection at the request number
    *request*, before or after the server has executed it.
    """

    def relay(most: int) -> None:
        client, _ = listener.accept()
        with client, socket.socket(socket.AF_UNIX) as server:
            server.connect(os.fspath(to))
            lines = server.makefile("rb")
            with lines:
                client.sendall(lines.readline())
                for number in itertools.count(1):
                    data, fds, _, _ = socket.recv_fds(client, 1 << 16, 1)
                    owned = [Fd(fd) for fd in fds]
                    if data and (number < most or executed):
                        socket.send_fds(server, [data], fds)
                    close_all(owned)
                    if not data or (number == most and not executed):
                        return
                    reply = lines.readline()
                    if number == most:
                        return
                    client.sendall(reply)

    def serve() -> None:
        with suppress(OSError):  # no further connection
            relay(request)
            relay(sys.maxsize)

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.fspath(path))
        listener.listen()
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(PATIENCE)


@pytest.mark.parametrize("executed", [True, False])
@pytest.mark.parametrize("request_", [3, 4, 5])
def test_the_connection_is_lost_halfway(
    cli: Cli, file: Path, tmp_path: Path, request_: int, executed: bool
) -> None:
    """A lost connection leaves no pushed descriptors on the other server, and removes no others."""
    cli.add(file, os.O_WRONLY, 0, opaque="o")
    to, relay = tmp_path / "other.sock", tmp_path / "relay.sock"
    with daemon_thread(to), _losing(relay, to, request_, executed=executed):
        there = Cli(to)
        there.add(file, os.O_RDONLY, opaque="o")
        before = there.done("ls", "--json")
        ran = cli("push", 0, "--to", relay)
        output = ran.stderr
        assert ran.returncode == NO_DAEMON
        assert "has closed the connection" in output
        after = there.done("ls", "--json")
        if (request_, executed) == (3, True):  # push cannot know that the descriptor is its own
            assert after != before
            assert "may be left of this" in output
        else:
            assert after == before


def qmp(wire: QemuWire, command: str, arguments: Any = None) -> Any:
    """Execute a command of a QEMU; return its value."""
    request = {"execute": command, **({"arguments": arguments} if arguments else {})}
    [line] = wire.call(json.dumps(request).encode())
    reply = json.loads(line)
    assert "return" in reply, reply
    return reply["return"]


@pytest.mark.qemu
def test_push_to_qemu(cli: Cli, tmp_path: Path) -> None:
    """QEMU opens the pushed image read-only and read-write, and closes it."""
    image = tmp_path / "disk.img"
    image.write_bytes(b"boot sector".ljust(1 << 20, b"\0"))
    cli.add(image, os.O_RDONLY, opaque="rdonly:disk")
    cli.add(image, os.O_RDWR, 0, opaque="rdwr:disk")
    image.unlink()
    # One client stays connected: up to version 9.0, QEMU drops unused descriptors when its last
    # monitor connection ends.
    with start_qemu(2) as qemu, qemu.session(1) as wire:
        ran = cli("push", 0, "--to", qemu.paths[0], "--fdset", 5, "--json")
        assert json.loads(ran.stdout)["fdset-id"] == 5
        with BlockingClient(qemu.paths[0], PATIENCE) as sink:
            version = sink.greeting["version"]["qemu"]
        forgets = (version["major"], version["minor"]) <= (9, 0)
        assert ("--hold stays connected" in ran.stderr) == forgets
        [fdset] = qmp(wire, "query-fdsets")
        assert fdset["fdset-id"] == 5
        assert [fd["opaque"] for fd in fdset["fds"]] == ["rdonly:disk", "rdwr:disk"]
        for read_only in (True, False):
            node = {"driver": "file", "node-name": "disk", "filename": "/dev/fdset/5"}
            qmp(wire, "blockdev-add", {**node, "read-only": read_only})
            [block] = qmp(wire, "query-named-block-nodes")
            assert (block["node-name"], block["ro"]) == ("disk", read_only)
            assert block["image"]["virtual-size"] == 1 << 20
            qmp(wire, "blockdev-del", {"node-name": "disk"})


@pytest.mark.qemu
def test_qemu_has_none_of_ours() -> None:
    """Verbs that need qmpfd's own commands fail on a QEMU with one line."""
    with start_qemu(2) as qemu:
        other = Cli(Path(qemu.paths[0]))
        text = "CommandNotFound: The command open-fdset has not been found"
        assert text in other.fails(REFUSED, "exec", "0", "--", "true")
        assert text in other.fails(REFUSED, "push", 0, "--to", qemu.paths[1])
        assert "watch-fdsets" in other.fails(REFUSED, "watch")
        assert "remove-fds" in other.fails(REFUSED, "rm", "--pid", 1)
        assert "query-fds" in other.fails(REFUSED, "ls", "--long")
        assert "open-fdset" in other.fails(REFUSED, "exec", "@web", "--", "true")


@pytest.mark.qemu
def test_names_at_a_qemu(tmp_path: Path) -> None:
    """QEMU has no remove-fds: rm finds names in its listing."""
    (tmp_path / "file").touch()
    with start_qemu(2) as qemu, qemu.session(1):
        other = Cli(Path(qemu.paths[0]))
        for name in ("disk", "disk/3", "other"):
            assert other("add", "--name", name, tmp_path / "file").returncode == DONE
        assert other.done("rm", "@disk").endswith("  disk\n")
        assert other("rm", "@disk", "@disk/3").returncode == REFUSED
        assert "no name matches 'disk'" in other.fails(REFUSED, "rm", "@disk")
        [fdset] = json.loads(other.done("ls", "--json"))
        assert [fd["opaque"] for fd in fdset["fds"]] == ["other"]


def test_no_daemon(path: Path) -> None:
    Cli(path).fails(NO_DAEMON, "push", "0", "--to", "/nowhere")
