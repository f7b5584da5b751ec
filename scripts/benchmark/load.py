"""Run the load client (``load.c``) and decode its results."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import msgspec

from .servers import SAME, Failed, Server, Servers, end, on_cpus

#: Seconds after which a run counts as hung; longer than the client's own alarm(2), LONGEST_RUN.
_TIMEOUT = 150


@dataclass(frozen=True)
class Run:
    """Results of one run of the load client: the members of the JSON that ``load.c`` prints."""

    commands: int
    cpu_ns: int
    removal_cpu_ns: int
    elapsed_ns: int
    p50_ns: int
    p99_ns: int
    max_ns: int
    max_cpu_ns: int

    @property
    def cpu_us(self) -> float:
        """Microseconds of the server's CPU time per command."""
        return self.cpu_ns / 1e3 / self.commands

    @property
    def per_second(self) -> float:
        """Commands per second."""
        return self.commands * 1e9 / self.elapsed_ns


def _command(servers: Servers, server: Server, work: str, options: dict[str, int]) -> list[str]:
    output = [f"{name.replace('_', '-')}={value}" for name, value in options.items()]
    program = str(servers.build("load"))
    pids = ",".join(map(str, server.pids))
    return [program, str(server.path), pids, server.kind.protocol, work, *output]


def _outcome(server: Server, work: str, process: subprocess.Popen[bytes]) -> Run:
    try:
        out, complaint = process.communicate(b"\n", _TIMEOUT)
    except subprocess.TimeoutExpired:
        raise Failed(f"{server.name}, {work}: no end") from None
    if process.returncode:
        output = complaint.decode(errors="replace").strip()
        raise Failed(f"{server.name}, {work}: {output or f'status {process.returncode}'}")
    return msgspec.json.decode(out.splitlines()[-1], type=Run)


@contextmanager
def _started(
    servers: Servers, server: Server, work: str, options: dict[str, int], place: str = SAME
) -> Iterator[subprocess.Popen[bytes]]:
    command = _command(servers, server, work, options)
    pipe = subprocess.PIPE
    with on_cpus({servers.cpus[place]}):
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe)
    try:
        yield process
    finally:
        process.kill()
        end(process)
        assert process.stderr is not None
        process.stderr.close()


def run(servers: Servers, server: Server, work: str, place: str = SAME, **options: int) -> Run:
    """Run *work* (see ``load.c``) against *server*, with clients on CPU *place*, SAME or OTHER.

    Raises:
        Failed: a reply was wrong or missing.
    """
    server.settle()
    with _started(servers, server, work, options, place) as process:
        return _outcome(server, work, process)


def run_beside(servers: Servers, server: Server, other: dict[str, int], **options: int) -> Run:
    """Measure pairs of commands while another client repeats ``query-fdsets``."""
    server.settle()
    with (
        _started(servers, server, "query", {"together": 1, **other}) as lister,
        _started(servers, server, "pair", {"together": 1, "watch": 1, **options}) as asker,
    ):
        for process in (lister, asker):
            assert process.stdout is not None
            process.stdout.readline()
        assert lister.stdin is not None
        lister.stdin.write(b"\n")
        lister.stdin.flush()
        outcome = _outcome(server, "pair", asker)
        _outcome(server, "query", lister)
        return outcome


@contextmanager
def idle(servers: Servers, server: Server, clients: int) -> Iterator[None]:
    """Keep *clients* idle clients connected while the block runs."""
    with _started(servers, server, "idle", {"clients": clients}) as process:
        assert process.stdout is not None
        if not process.stdout.readline():
            raise Failed(f"{server.name} does not take {clients} clients")
        yield
