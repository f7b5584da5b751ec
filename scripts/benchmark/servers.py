"""The servers that the benchmark compares: how to start each, and what each supports."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

HERE = Path(__file__).parent

#: CPU of a client: the server's CPU, which the two share, or another one, where each request
#: wakes the server up.
SAME, OTHER = "same", "other"

#: Timeout in seconds for a start or an end, which take milliseconds.
PATIENCE = 15.0


def placement() -> dict[str, int]:
    """Return the CPU of the servers (SAME), and that of other clients if there are two (OTHER)."""
    cpus = sorted(os.sched_getaffinity(0))
    return {SAME: cpus[-1]} | ({OTHER: cpus[0]} if len(cpus) > 1 else {})


class Failed(Exception):
    """A measurement is not possible."""


@dataclass(frozen=True)
class Kind:
    """A server program.

    Args:
        label: its name in the tables.
        protocol: protocol of the load client, qmp or s6.
        most_clients: most clients that it serves at a time.
        pipelines: whether it reads a command before the last one is answered.
        needs: program that has to be installed, or None.
        install: command that installs that program.
        works: each WORK of ``load.c`` that it supports.
        batches: whether it takes many descriptors in one command.
        slow_when_full: whether its commands get slower with each stored descriptor.
        keeps: whether it is also measured with descriptors stored, rather than only by pairs of
            add-fd and remove-fd.
    """

    label: str
    protocol: str
    most_clients: int
    pipelines: bool
    needs: str | None
    install: str
    works: frozenset[str]
    batches: bool = True
    slow_when_full: bool = False
    keeps: bool = True


_PAIR = frozenset(("pair",))
_ALL = _PAIR | {"stock", "query", "open"}

KINDS: dict[str, Kind] = {
    "loop": Kind(
        *("bare C", "qmp", 1 << 16, True, "gcc", "apt-get install gcc libc6-dev"),
        _PAIR | {"stock"},
        keeps=False,
    ),
    "s6": Kind(
        *("s6", "s6", 256, False, "s6-fdholderd", "apt-get install s6", _ALL),
        batches=False,
        slow_when_full=True,
    ),
    "trio": Kind("bare Trio", "qmp", 1 << 16, True, None, "", _PAIR, keeps=False),
    "strict": Kind("strict", "qmp", 1 << 16, True, None, "", _PAIR, keeps=False),
    "qmpfd": Kind("qmpfd", "qmp", 1 << 16, True, None, "", _ALL),
    "supervised": Kind("supervised", "qmp", 1 << 16, True, None, "", _PAIR, keeps=False),
    "asyncio": Kind("asyncio", "qmp", 1 << 16, True, None, "", _ALL),
    "qemu": Kind(
        *("QEMU", "qmp", 1, True, "qemu-system-x86_64", "apt-get install qemu-system-x86"),
        _PAIR | {"query"},
        batches=False,
    ),
}


def missing() -> dict[str, str]:
    """Return the servers that are not installed, with the command that installs each."""
    return {
        name: kind.install
        for name, kind in KINDS.items()
        if kind.needs is not None and shutil.which(kind.needs) is None
    }


@dataclass(frozen=True)
class Server:
    """A running server.

    Args:
        name: name in KINDS.
        pids: the serving process, and with ``--supervise`` its parent.
        path: path of the socket.
        stored: number of descriptors stored after the start.
    """

    name: str
    pids: tuple[int, ...]
    path: Path
    stored: int

    @property
    def kind(self) -> Kind:
        """The server program."""
        return KINDS[self.name]

    def cpu(self) -> int:
        """Return the CPU time of all threads in nanoseconds (proc(5), schedstat)."""
        total = 0
        for pid in self.pids:
            for task in Path(f"/proc/{pid}/task").iterdir():
                try:
                    total += int((task / "schedstat").read_text().split()[0])
                except (FileNotFoundError, ProcessLookupError):  # the thread has just ended
                    continue
        return total

    def settle(self) -> None:
        """Wait until the server uses no CPU time: it may still close the last run's connections."""
        deadline = time.monotonic() + PATIENCE
        before, now = -1, self.cpu()
        while now != before and time.monotonic() < deadline:
            time.sleep(0.004)
            before, now = now, self.cpu()

    def resident(self) -> int:
        """Return the resident memory in bytes (proc(5), smaps_rollup)."""
        for line in Path(f"/proc/{self.pids[0]}/smaps_rollup").read_text().splitlines():
            if line.startswith("Rss:"):
                return int(line.split()[1]) * 1024
        raise Failed("the kernel does not tell how much memory a process has")


class Servers:
    """Starts and ends servers.

    Args:
        folder: folder for sockets, logs and compiled programs.
        stack: its exit ends all started processes.
        cpus: CPU numbers by SAME and OTHER; servers run on SAME.
    """

    def __init__(self, folder: Path, stack: ExitStack, cpus: Mapping[str, int]) -> None:
        self.folder = folder
        self.cpus = cpus
        self._stack = stack
        self._count = 0
        self._processes: dict[int, subprocess.Popen[bytes]] = {}

    def build(self, name: str) -> Path:
        """Compile one of the C programs beside this file; return the program."""
        program = self.folder / name
        if not program.exists():
            command = ["gcc", "-O2", "-o", str(program), str(HERE / f"{name}.c")]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise Failed(f"{name}.c does not compile: {done.stderr}")
        return program

    def start(self, name: str, stored: int) -> Server:
        """Start a server, and wait until it accepts connections."""
        folder = self.new_folder()
        path = folder / "socket"
        with on_cpus({self.cpus[SAME]}):
            process = _STARTERS[name](self, folder, path)
        deadline = time.monotonic() + PATIENCE
        while not _takes_clients(path):
            if process.poll() is not None or time.monotonic() > deadline:
                output = (folder / "log").read_text(errors="replace").strip()
                raise Failed(f"{name} does not start: {output or '(it said nothing)'}")
            time.sleep(0.02)
        if name == "qemu":
            # Up to version 9.0, QEMU drops its fd sets when the last client of its monitors
            # disconnects: this connection stays open.
            second = self._stack.enter_context(socket.socket(socket.AF_UNIX))
            second.connect(str(folder / _SECOND_MONITOR))
        pids = (*children(process.pid), process.pid) if name == "supervised" else (process.pid,)
        return Server(name, pids, path, stored)

    def new_folder(self) -> Path:
        """Make a folder for one more server."""
        self._count += 1
        folder = self.folder / f"{self._count}"
        folder.mkdir()
        return folder

    def spawn(
        self, folder: Path, command: list[str], stdin: socket.socket | None = None
    ) -> subprocess.Popen[bytes]:
        """Start a process that logs into *folder*, and that the exit of the stack ends."""
        with (folder / "log").open("ab") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL if stdin is None else stdin.fileno(),
                stdout=log,
                stderr=log,
                env=environment(),
            )
        self._stack.callback(end, process)
        self._processes[process.pid] = process
        return process

    def end(self, server: Server) -> None:
        """End one server before the others."""
        end(self._processes[server.pids[-1]])


def children(pid: int) -> tuple[int, ...]:
    """Return the child processes of *pid* (proc(5), children)."""
    return tuple(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


@contextmanager
def on_cpus(cpus: Collection[int]) -> Iterator[None]:
    """Bind processes and threads started in the block to *cpus* (sched_setaffinity(2))."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def environment() -> Mapping[str, str]:
    """Return the environment of measured processes: without variables that slow Python down."""
    return {k: v for k, v in os.environ.items() if k not in _SLOWER_PYTHON}


_SLOWER_PYTHON = ("PYTHONDONTWRITEBYTECODE", "PYTHONDEVMODE", "PYTHONWARNINGS")


def end(process: subprocess.Popen[bytes]) -> None:
    """Terminate a process, wait until it has ended, and close its pipes."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()


def _takes_clients(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as sock:
        try:
            sock.connect(str(path))
        except OSError:
            return False
    return True


def _start_loop(servers: Servers, folder: Path, path: Path) -> subprocess.Popen[bytes]:
    return servers.spawn(folder, [str(servers.build("loop")), str(path)])


def _start_script(
    servers: Servers, folder: Path, path: Path, *options: str, name: str
) -> subprocess.Popen[bytes]:
    script = str(HERE / f"{name}_server.py")
    return servers.spawn(folder, [sys.executable, script, str(path), *options])


def serve_command(path: Path, *options: str) -> list[str]:
    """Return the command line of a qmpfd that listens at *path*."""
    return [sys.executable, "-m", "qmpfd", "serve", "--socket", str(path), *options]


def _start_qmpfd(
    servers: Servers, folder: Path, path: Path, *options: str
) -> subprocess.Popen[bytes]:
    return servers.spawn(folder, serve_command(path, *options))


_SECOND_MONITOR = "second"


def _start_qemu(servers: Servers, folder: Path, path: Path) -> subprocess.Popen[bytes]:
    options = ["-nodefaults", "-machine", "none", "-display", "none"]
    for monitor in (folder / _SECOND_MONITOR, path):  # in this order: clients wait for *path*
        options += ["-qmp", f"unix:{monitor},server=on,wait=off"]
    return servers.spawn(folder, ["qemu-system-x86_64", *options])


def _start_s6(servers: Servers, folder: Path, path: Path) -> subprocess.Popen[bytes]:
    """Start s6-fdholderd: its standard input is the socket, and files state the access rights."""
    rule = folder / "rules" / "uid" / str(os.getuid())
    (rule / "env").mkdir(parents=True)
    (rule / "allow").touch()
    for right in ("STORE_REGEX", "RETRIEVE_REGEX"):
        (rule / "env" / f"S6_FDHOLDER_{right}").write_text(".*")
    (rule / "env" / "S6_FDHOLDER_LIST").write_text("1")
    limits = ["-n", "30000", "-c", str(KINDS["s6"].most_clients)]
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(1024)
        return servers.spawn(
            folder, ["s6-fdholderd", *limits, "-i", str(folder / "rules")], listener
        )


_STARTERS: dict[str, Callable[[Servers, Path, Path], subprocess.Popen[bytes]]] = {
    "loop": _start_loop,
    "s6": _start_s6,
    "trio": partial(_start_script, name="trio"),
    "strict": lambda *where: _start_script(*where, "--strict", name="trio"),
    "qmpfd": _start_qmpfd,
    "supervised": lambda *where: _start_qmpfd(*where, "--supervise"),
    "asyncio": partial(_start_script, name="asyncio"),
    "qemu": _start_qemu,
}
