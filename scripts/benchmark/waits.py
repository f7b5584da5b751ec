"""Measure the longest wait of well-behaved clients: in a takeover, a crash, and under attack."""

from __future__ import annotations

import array
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from .servers import PATIENCE, Failed, Server, Servers, children, on_cpus, serve_command

#: Folder of the tests that has the attacks, and the client that measures its waits meanwhile.
FAULTS = Path(__file__).parents[2] / "tests" / "faults"

#: Clients that send a request every millisecond while the daemon is replaced or killed.
_ASKERS = 8
#: Replies that each of those clients awaits before and after the event.
_ANSWERS = 50


# -- replaced and killed -------------------------------------------------------------------------


class _Asker(threading.Thread):
    """Client that sends a request every millisecond, and reconnects when the connection ends.

    Args:
        path: the daemon's socket.
        adds: whether to send ``add-fd`` and ``remove-fd`` in turns; else ``query-name``.
    """

    def __init__(self, path: Path, adds: bool) -> None:
        super().__init__(daemon=True)
        self._path = path
        self._adds = adds
        self._over = threading.Event()
        self._fdset_id: int | None = None  # of the descriptor added last
        self.answers = 0
        self.longest = 0.0
        self.failure: Exception | None = None

    def run(self) -> None:
        """Send requests until ``stop`` is called."""
        try:
            with ExitStack() as stack:
                sock = self._connect(stack)
                while not self._over.is_set():
                    began = time.monotonic()
                    while not self._ask(sock):
                        stack.close()
                        sock = self._connect(stack)
                    self.longest = max(self.longest, time.monotonic() - began)
                    self.answers += 1
                    self._over.wait(0.001)
        except Exception as exc:  # noqa: BLE001 - raised again by stop()
            self.failure = exc

    def stop(self) -> float:
        """Stop; return the longest wait of a request in seconds, or raise Failed."""
        self._over.set()
        self.join(PATIENCE)
        if self.failure is not None:
            raise Failed(f"a client beside it: {self.failure!r}")
        return self.longest

    def _connect(self, stack: ExitStack) -> socket.socket:
        self._fdset_id = None
        deadline = time.monotonic() + PATIENCE
        while True:
            sock = socket.socket(socket.AF_UNIX)
            sock.settimeout(PATIENCE)
            try:
                sock.connect(str(self._path))
                if _line(sock):
                    sock.sendall(b'{"execute": "qmp_capabilities"}\n')
                    if _line(sock):
                        stack.callback(sock.close)
                        return sock
            except OSError:
                if time.monotonic() > deadline:
                    raise
            sock.close()
            time.sleep(0.001)

    def _ask(self, sock: socket.socket) -> bool:
        """Send one request; return False if the connection ends before the reply."""
        control = []
        if not self._adds:
            text = b'{"execute": "query-name"}\n'
        elif self._fdset_id is None:
            text = b'{"execute": "add-fd"}\n'
            control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [2]))]
        else:
            text = b'{"execute": "remove-fd", "arguments": {"fdset-id": %d}}\n' % self._fdset_id
        try:
            sock.sendmsg([text], control)
            reply = _line(sock)
        except ConnectionError:
            return False
        if not reply:
            return False
        self._fdset_id = json.loads(reply)["return"].get("fdset-id")
        return True


def _line(sock: socket.socket) -> bytes:
    """Read one line; return an empty one if the connection ends before."""
    line = b""
    while not line.endswith(b"\n"):
        data = sock.recv(4096)
        if not data:
            return b""
        line += data
    return line


def _longest_wait(server: Server, event: Callable[[], None]) -> float:
    """Return the longest wait of a client, in seconds, before, during and after *event*."""
    askers = [_Asker(server.path, adds=bool(number % 2)) for number in range(_ASKERS)]

    def answered() -> None:
        before = [asker.answers for asker in askers]
        _until(
            lambda: all(
                asker.failure or asker.answers > count + _ANSWERS
                for asker, count in zip(askers, before, strict=True)
            ),
            "the clients are answered no more",
        )

    for asker in askers:
        asker.start()
    answered()
    event()
    answered()
    return max([asker.stop() for asker in askers])


def _until(condition: Callable[[], bool], otherwise: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            raise Failed(otherwise)
        time.sleep(0.005)


def _everywhere(servers: Servers, server: Server) -> None:
    """Allow a server all CPUs, as outside of the benchmark."""
    for pid in server.pids:
        os.sched_setaffinity(pid, servers.cpus.values())


def takeover(servers: Servers, server: Server) -> tuple[float, Server]:
    """Run a takeover; return the longest wait in seconds, and the successor."""
    _everywhere(servers, server)
    (old,) = server.pids
    started: list[int] = []

    def event() -> None:
        command = serve_command(server.path, "--takeover")
        process = servers.spawn(server.path.parent, command)
        started.append(process.pid)
        flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
        _until(
            lambda: bool(process.poll() or os.waitid(os.P_PID, old, flags)),
            "the old daemon does not end",
        )
        if process.poll() is not None:
            raise Failed(f"no takeover: {(server.path.parent / 'log').read_text()}")

    with on_cpus(servers.cpus.values()):
        longest = _longest_wait(server, event)
    return longest, replace(server, pids=tuple(started))


def crash(servers: Servers, server: Server) -> float:
    """Kill the worker of a supervised daemon once its spare worker is ready, a second after the
    start; return the longest wait in seconds.
    """
    parent = server.pids[-1]
    (worker,) = children(parent)
    _until(lambda: any(map(_is_spare, children(worker))), "there is no spare worker")
    _everywhere(servers, replace(server, pids=(worker, parent, *children(worker))))
    with on_cpus(servers.cpus.values()):
        return _longest_wait(server, lambda: os.kill(worker, signal.SIGKILL))


def _is_spare(pid: int) -> bool:
    """Return whether a process is a ready spare worker, which has set its name."""
    return Path(f"/proc/{pid}/comm").read_text() == "qmpfd-spare\n"


# -- attacked ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attack:
    """Processes that attack the daemon.

    Args:
        name: name in the table.
        attackers: arguments of each process of ``attacks.py``.
        stored: number of descriptors that the daemon holds.
    """

    name: str
    attackers: tuple[tuple[str, int], ...]
    stored: int = 0


def attacks() -> list[Attack]:
    """Return the attacks of the tests that need only a daemon and attacking processes."""
    streams = runpy.run_path(str(FAULTS / "attacks.py"))["STREAMS"]
    deaf = {"requests": 50, "schemas": 50, "opened": 200, "closers": 6, "watching": 6}
    return [
        *(Attack(f"reading:{kind}", ((f"reading:{kind}", 6),)) for kind in streams),
        *(Attack(f"deaf:{kind}", ((f"deaf:{kind}", number),)) for kind, number in deaf.items()),
        Attack("long listings", (("reading:listings", 20), ("deaf:listings", 20)), 5000),
        Attack("fleeting", (("fleeting", 4000),)),
        Attack("half messages", (("half", 80),)),
        Attack("connections", (("connections", 1), ("connections", 1))),
        Attack("connections held", (("holding", 1500),)),
    ]


@contextmanager
def _program(name: str, *words: object) -> Iterator[subprocess.Popen[str]]:
    """Start a program of the tests, wait for its line "ready", and kill it at the end."""
    process = subprocess.Popen(
        [sys.executable, "-S", "-E", str(FAULTS / name), *map(str, words)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        if process.stdout.readline().strip() != "ready":
            raise Failed(f"{name} {words[0]} does not start")
        yield process
    finally:
        process.kill()
        process.communicate()


def beside(servers: Servers, server: Server, attack: Attack, seconds: float) -> float:
    """Attack for *seconds*; return the longest wait, in seconds, of a client that sends a request
    every millisecond, less the time for which the CPU ran other processes, such as the attackers.
    """
    _everywhere(servers, server)
    with on_cpus(servers.cpus.values()), _program("probe.py", server.path) as probe:
        with ExitStack() as stack:
            for kind, number in attack.attackers:
                stack.enter_context(_program("attacks.py", kind, server.path, number))
            time.sleep(seconds)
        output, _ = probe.communicate()
    if not output:
        raise Failed(f"{attack.name}: a well-behaved client was cut off")
    return float(json.loads(output)["own"]["max"])
