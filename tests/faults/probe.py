"""Well-behaved client that sends a request every millisecond and measures the round trips.

``probe.py SOCKET`` prints ``ready`` before it measures, and at the end of standard input one JSON
object with the figures in seconds.  ``control`` has the round trips to an echo process, which get
long when the machine, not the daemon, is slow.  ``own`` has the daemon's round trips less the time
for which the daemon was ready to run but had no CPU (``run_delay``, /proc/PID/schedstat).
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
import time

_QUESTION = b'{"execute":"query-name"}\n'


def _echo(sock: socket.socket) -> None:
    while data := sock.recv(4096):
        sock.sendall(data)


def _ask(sock: socket.socket, patience: float) -> float:
    """Send one request; return the seconds until the reply was complete."""
    start = time.perf_counter()
    sock.sendall(_QUESTION)
    answer = b""
    while not answer.endswith(b"\n"):
        ready, _, _ = select.select([sock], [], [], patience)
        if not ready:
            return time.perf_counter() - start
        data = sock.recv(4096)
        if not data:
            raise SystemExit("the daemon has cut off a well-behaved client")
        answer += data
    return time.perf_counter() - start


def _delay(schedstat: int) -> float:
    """Return the seconds for which the process has waited for a CPU since its start."""
    return int(os.pread(schedstat, 100, 0).split()[1]) / 1e9


def _summary(figures: list[float]) -> dict[str, float]:
    ordered = sorted(figures)
    return {
        "count": len(ordered),
        "median": ordered[len(ordered) // 2],
        "p999": ordered[len(ordered) * 999 // 1000],
        "max": ordered[-1],
    }


def main(path: str) -> None:
    """Measure until standard input ends, and print the figures."""
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    child = os.fork()
    if not child:
        ours.close()
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        _echo(its)
        os._exit(0)
    its.close()
    daemon = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    daemon.connect(path)
    lines = daemon.makefile("rb")
    lines.readline()
    daemon.sendall(b'{"execute":"qmp_capabilities"}\n')
    lines.readline()
    print("ready", flush=True)
    credentials = daemon.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    pid = int.from_bytes(credentials[:4], sys.byteorder)
    schedstat = os.open(f"/proc/{pid}/schedstat", os.O_RDONLY)
    answers, control, own = [], [], []
    due = time.perf_counter()
    while not select.select([0], [], [], 0)[0]:
        waited = _delay(schedstat)
        answers.append(_ask(daemon, 20.0))
        own.append(max(0.0, answers[-1] - (_delay(schedstat) - waited)))
        control.append(_ask(ours, 20.0))
        due = max(due + 0.001, time.perf_counter())
        time.sleep(max(0.0, due - time.perf_counter()))
    figures = {"daemon": answers, "own": own, "control": control}
    print(json.dumps({name: _summary(each) for name, each in figures.items()}), flush=True)
    ours.close()
    os.waitpid(child, 0)


if __name__ == "__main__":
    main(sys.argv[1])
