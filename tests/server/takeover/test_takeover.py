"""A new daemon takes over from a running one, and clients do not notice."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from helpers import Pipe, pipes, send_now

from qmpfd.client.blocking import BlockingClient
from qmpfd.errors import QMPError
from qmpfd.kernel.fd import Fd, close_all

DEADLINE = 30.0

Daemon = subprocess.Popen[bytes]


def start(path: Path, *options: str) -> Daemon:
    command = [sys.executable, "-m", "qmpfd", "serve", "--socket", str(path), *options]
    return subprocess.Popen(command, stderr=subprocess.PIPE)


def until_serving(daemon: Daemon) -> None:
    """Wait for the log line of a serving daemon."""
    assert daemon.stderr is not None
    output = []
    for line in daemon.stderr:
        output.append(line.decode())
        if b"listening" in line:
            return
    raise AssertionError(f"it ended with {daemon.wait()}: {''.join(output)}")


def end(daemon: Daemon) -> None:
    """End the daemon if it runs, and check its status and log."""
    daemon.terminate()
    _, errors = daemon.communicate(timeout=DEADLINE)
    assert b"Traceback" not in errors, errors.decode()


@contextmanager
def served(path: Path, *options: str) -> Iterator[Daemon]:
    daemon = start(path, *options)
    try:
        until_serving(daemon)
        yield daemon
    finally:
        end(daemon)


@contextmanager
def taken_over(path: Path, old: Daemon, *options: str) -> Iterator[Daemon]:
    """Run a successor of `old`, which must end with status 0."""
    successor = start(path, "--takeover", *options)
    try:
        until_serving(successor)
        assert old.wait(DEADLINE) == 0
        yield successor
    finally:
        end(successor)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "qmpfd.sock"


def lasting(fds: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the listed descriptors without the members that change with time."""
    return [{k: v for k, v in fd.items() if k not in ("age", "expires")} for fd in fds]


def test_everything_goes_over(path: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("content")
    with served(path) as old, BlockingClient(path, DEADLINE) as client, file.open("rb") as first:
        for number in range(300):
            client.execute("add-fd", {"opaque": f"n{number}"}, [first])
        client.execute("add-fd", {"fdset-id": 3, "opaque": "\N{SNOWMAN}"}, [first])
        r, w = map(Fd, os.pipe())
        client.execute("add-fds", {"watch-hangup": True, "expires": 1000}, [r])
        client.execute("add-fds", {"lifetime": "connection"}, [r, r])
        client.execute("getfd", {"fdname": "mine"}, [r])
        client.execute("remove-fd", {"fdset-id": 7})
        before = client.execute("query-fds")
        with taken_over(path, old):
            after = client.execute("query-fds")
            assert lasting(after) == lasting(before)
            assert [fd["expires"] for fd in after if "expires" in fd] == [
                pytest.approx(1000, abs=30)
            ]
            assert client.execute("query-commands")
            _, (fd,) = client.request("open-fdset", {"fdset-id": 3})
            with fd:
                assert os.pread(fd.fileno(), 10, 0) == b"content"
            # The lowest free id, the named fd, the watched hang-up and the lifetime have gone over.
            assert client.execute("add-fd", fds=[first])["fdset-id"] == 7
            client.execute("closefd", {"fdname": "mine"})
            with BlockingClient(path, DEADLINE) as other:
                client.execute("watch-fdsets", {"enable": True})
                close_all([r, w])
                reasons = [next(client.events()).data["reason"]]
                assert reasons == ["hangup"]
                other.execute("watch-fdsets", {"enable": True})
                client.close()
                assert {next(other.events()).data["reason"] for _ in range(2)} == {"connection"}


def test_the_order_in_a_set(path: Path) -> None:
    """Descriptors sent before the pause and during it keep their order in a set."""
    kinds: list[dict[str, Any]] = [{}, {"lifetime": "connection"}, {}, {"watch-hangup": True}, {}]
    with served(path) as old, BlockingClient(path, DEADLINE) as client, Pipe() as pipe:
        client.execute("add-fd", fds=[pipe])
        for kind in kinds:
            client.execute("add-fds", {"fdset-id": 0, **kind}, [pipe])
        before = client.execute("query-fdsets")
        with taken_over(path, old) as successor:
            assert client.execute("query-fdsets") == before
            with taken_over(path, successor):
                assert client.execute("query-fdsets") == before
                info, (newest,) = client.request("open-fdset", {"fdset-id": 0})
                newest.close()
                assert info["fd"] == before[0]["fds"][-1]["fd"]


def test_a_half_sent_request_and_its_descriptor(path: Path) -> None:
    with served(path) as old, BlockingClient(path, DEADLINE) as client:
        sock = client.detach()
        r, w = map(Fd, os.pipe())
        with sock:
            sock.setblocking(True)
            sock.sendmsg(
                [b'{"execute": "add-fd", "arguments": {"opa'],
                [(1, 1, r.fileno().to_bytes(4, sys.byteorder))],
            )
            close_all([r])
            # The daemon has read it when it answers a later client.
            with BlockingClient(path, DEADLINE) as other:
                other.execute("query-name")
            with taken_over(path, old):
                sock.sendall(b'que": "it\'s"}, "id": 5}')
                assert b'"id": 5' in sock.recv(1000)
                with BlockingClient(path, DEADLINE) as other:
                    (fd,) = other.execute("query-fds")
                    assert (fd["opaque"], fd["kind"]) == ("it's", "pipe")
                    other.execute("remove-fd", {"fdset-id": fd["fdset-id"]})
        close_all([w])


HALVES = [
    # A request, and a part of its reply.
    (
        b"{'execute':'add-fd','arguments':{'opaque':'it\\'s \\u2603 \xe2\x98\x83'},'id':-1.5e0}",
        b"fd",
    ),
    (b'{"execute": "add-fd", "arguments": {"opaque": [1, {"a": null}]}, "id": [true]}', b"opaque"),
    (b'{"execute": "add-fd", \x01 }', b"JSON parse error"),
    (b'{"execute" "add-fd", "id": 1}', b"missing :"),
]


@pytest.mark.parametrize("request_, reply", HALVES)
def test_split_anywhere(path: Path, request_: bytes, reply: bytes) -> None:
    """A request in three parts: before, between and after two takeovers."""
    with served(path) as old, pipes(1) as (pipe,), ExitStack() as stack:
        socks = []
        for at in range(1, len(request_)):
            with BlockingClient(path, DEADLINE) as client:
                socks.append(stack.enter_context(client.detach()))
            socks[-1].setblocking(True)
            socks[-1].settimeout(DEADLINE)
            send_now(socks[-1], request_[:at], [pipe])
        pipe.release()
        with BlockingClient(path, DEADLINE) as client, taken_over(path, old) as second:
            for at, sock in enumerate(socks, 1):
                sock.sendall(request_[at : at + 1])
            client.execute("query-name")
            with taken_over(path, second):
                for at, sock in enumerate(socks, 1):
                    sock.sendall(request_[at + 1 :] + b'{"execute": "query-name", "id": "next"}')
                    heard = b""
                    while b'"next"' not in heard:
                        heard += sock.recv(1000)
                    first, *_, last = heard.splitlines()
                    assert reply in first
                    assert last == b'{"return": {}, "id": "next"}'
                added = [fd for fdset in client.execute("query-fdsets") for fd in fdset["fds"]]
                assert len(added) == (len(socks) if reply == b"fd" else 0)
                assert {fd["opaque"] for fd in added} <= {"it's \N{SNOWMAN} \N{SNOWMAN}"}
                assert pipe.held() == bool(added)


def test_unsent_replies(path: Path) -> None:
    """A client that reads late gets each of its replies once."""
    with served(path) as old, BlockingClient(path, DEADLINE) as client:
        for number in range(50):
            client.execute("add-fd", {"opaque": f"{number}" * 50}, [0])
        sock = client.detach()
        with sock:
            sock.setblocking(False)
            asked = 0
            try:
                while asked < 5000:
                    sock.send(b'{"execute": "query-fdsets", "id": %d}\n' % asked)
                    asked += 1
            except BlockingIOError:
                pass
            with taken_over(path, old):
                sock.setblocking(True)
                sock.settimeout(DEADLINE)
                reader = sock.makefile("rb")
                for number in range(asked):
                    assert reader.readline().endswith(b'"id": %d}\r\n' % number)
                reader.close()


def test_a_refused_takeover_changes_nothing(path: Path) -> None:
    """A refused takeover, of an unknown format, changes nothing."""
    with served(path) as old, BlockingClient(path, DEADLINE) as client:
        client.execute("add-fd", fds=[0])
        with pytest.raises(QMPError, match="format"):
            client.execute("takeover", {"format": 0})
        assert old.poll() is None
        assert client.execute("query-fdsets")


@pytest.mark.parametrize("answers", range(4))
def test_a_successor_that_gives_up(path: Path, answers: int) -> None:
    """At whatever stage the successor gives up, the predecessor serves on with everything."""
    with served(path), BlockingClient(path, DEADLINE) as client:
        for _ in range(3):
            client.execute("add-fds", fds=[0] * 253)
        before = client.execute("query-fds")
        successor = BlockingClient(path, DEADLINE)
        _, passed = successor.request("takeover", {"format": 1})
        close_all(passed)
        sock = successor.detach()
        with sock:
            sock.setblocking(True)
            for _ in range(answers):
                sock.sendall(b"n")
                _, control, _, _ = sock.recvmsg(1, 4096)
                for _, _, payload in control:
                    for at in range(0, len(payload), 4):
                        os.close(int.from_bytes(payload[at : at + 4], sys.byteorder))
        successor.close()
        assert lasting(client.execute("query-fds")) == lasting(before)
        with BlockingClient(path, DEADLINE) as other:
            other.execute("remove-fd", {"fdset-id": 0})


def test_progress_on_a_terminal(path: Path) -> None:
    """Progress is one growing line on a terminal, and nothing elsewhere."""
    with served(path) as old, BlockingClient(path, DEADLINE) as client:
        for _ in range(3):
            client.execute("add-fds", fds=[0] * 250)
        terminal, its_end = map(Fd, os.openpty())
        command = [sys.executable, "-m", "qmpfd", "serve", "--socket", str(path), "--takeover"]
        successor = subprocess.Popen(command, stderr=its_end.fileno())
        with terminal:
            its_end.close()
            shown = b""
            while b"listening" not in shown:
                shown += os.read(terminal.fileno(), 1000)
            lines = shown.splitlines()
            total = 752  # including the listener and the client
            assert f"\rqmpfd: 253 of {total} descriptors".encode() in shown
            assert f"qmpfd: {total} of {total} descriptors".encode() in lines
            assert old.wait(DEADLINE) == 0
            successor.terminate()
            assert successor.wait(DEADLINE) == 0


def test_another_policy_and_smaller_limits(path: Path, tmp_path: Path) -> None:
    """Stored descriptors stay; a smaller limit and a new policy hold for later commands."""
    policy = tmp_path / "policy.toml"
    policy.write_text("[[rule]]\nallow = ['query']\n")
    limits = ["--max-fds", "10", "--max-connections", "2", "--max-request-bytes", "2048"]
    with served(path) as old, ExitStack() as stack:
        clients = [stack.enter_context(BlockingClient(path, DEADLINE)) for _ in range(5)]
        clients[0].execute("add-fds", fds=[0] * 200)
        clients[0].execute("getfd", {"fdname": "n"}, [0])
        with clients[1].detach() as sock:
            sock.setblocking(True)
            sock.settimeout(DEADLINE)
            sock.sendall(b"[" + b"1," * 5000)
            clients[2].execute("query-name")
            with taken_over(path, old, "--policy", str(policy), *limits):
                for client in [clients[0], *clients[2:]]:
                    assert len(client.execute("query-fdsets")[0]["fds"]) == 200
                with pytest.raises(QMPError, match="limit is 10"):
                    clients[0].execute("add-fd", fds=[0])
                with pytest.raises(QMPError, match="limit is 2"):
                    BlockingClient(path, DEADLINE)
                clients[0].execute("closefd", {"fdname": "n"})
                stats = clients[0].execute("query-stats")
                assert (stats["connections"], stats["fds-kept"]) == (5, 200)
                sock.sendall(b"1]" + b'{"execute": "query-name", "id": 1}')
                heard = b""
                while b'"id": 1' not in heard:
                    heard += sock.recv(1000)
                assert b"limit exceeded" in heard.splitlines()[0]


def test_no_daemon_to_take_over(path: Path) -> None:
    daemon = start(path, "--takeover")
    _, errors = daemon.communicate(timeout=DEADLINE)
    assert daemon.returncode == 3
    assert errors.count(b"\n") == 1
