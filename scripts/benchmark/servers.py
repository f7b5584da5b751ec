"""The servers that are measured: how each is started, and what it can do."""

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

#: Where a client runs: on the CPU of its server, where they take turns, or on another one, where
#: each request wakes the server up.
SAME, OTHER = "same", "other"

#: Seconds for what takes milliseconds when all is well: to start, to end.
PATIENCE = 15.0


def placement() -> dict[str, int]:
    """The CPU of the servers, which is that of some clients, and the CPU of the others if any."""
    cpus = sorted(os.sched_getaffinity(0))
    return {SAME: cpus[-1]} | ({OTHER: cpus[0]} if len(cpus) > 1 else {})


class Failed(Exception):
    """Something cannot be measured."""


@dataclass(frozen=True)
class Kind:
    """A server there is.

    Args:
        label: what the table calls it.
        protocol: what the load client speaks with it.
        most_clients: that it serves at a time.
        pipelines: whether it takes a command while another is not answered yet.
        needs: the program that has to be there, or None.
        install: the command that installs it.
        works: the commands that it has, as the load client calls them.
        batches: whether it takes many descriptors in one command.
        slow_when_full: whether a command costs the more, the more is stored.
        keeps: whether it is measured with descriptors stored, too; else it only shows what an
            add-fd and a remove-fd take.
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
    """The peers that are not installed: the command that installs each."""
    return {
        name: kind.install
        for name, kind in KINDS.items()
        if kind.needs is not None and shutil.which(kind.needs) is None
    }


@dataclass(frozen=True)
class Server:
    """A running server.

    Args:
        name: which of KINDS it is.
        pids: its processes: the one that serves, and with ``--supervise`` its parent.
        path: its socket.
        stored: how many descriptors it was given to keep.
    """

    name: str
    pids: tuple[int, ...]
    path: Path
    stored: int

    @property
    def kind(self) -> Kind:
        """What it can do."""
        return KINDS[self.name]

    def cpu(self) -> int:
        """Nanoseconds of CPU time of all its threads (proc(5), schedstat)."""
        total = 0
        for pid in self.pids:
            for task in Path(f"/proc/{pid}/task").iterdir():
                try:
                    total += int((task / "schedstat").read_text().split()[0])
                except (FileNotFoundError, ProcessLookupError):  # a thread that has just ended
                    continue
        return total

    def settle(self) -> None:
        """Wait until it has nothing left to do, such as to close the last run's connections."""
        deadline = time.monotonic() + PATIENCE
        before, now = -1, self.cpu()
        while now != before and time.monotonic() < deadline:
            time.sleep(0.004)
            before, now = now, self.cpu()

    def resident(self) -> int:
        """Bytes of memory that it occupies (proc(5), smaps_rollup)."""
        for line in Path(f"/proc/{self.pids[0]}/smaps_rollup").read_text().splitlines():
            if line.startswith("Rss:"):
                return int(line.split()[1]) * 1024
        raise Failed("the kernel does not tell how much memory a process has")


class Servers:
    """Starts servers, and ends them.

    Args:
        folder: where their sockets and programs are.
        stack: ends what was started.
        cpus: where they run, and where their clients do, by what the table calls it.
    """

    def __init__(self, folder: Path, stack: ExitStack, cpus: Mapping[str, int]) -> None:
        self.folder = folder
        self.cpus = cpus
        self._stack = stack
        self._count = 0
        self._processes: dict[int, subprocess.Popen[bytes]] = {}

    def build(self, name: str) -> Path:
        """Compile one of the C programs beside this file."""
        program = self.folder / name
        if not program.exists():
            command = ["gcc", "-O2", "-o", str(program), str(HERE / f"{name}.c")]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise Failed(f"{name}.c does not compile: {done.stderr}")
        return program

    def start(self, name: str, stored: int) -> Server:
        """Start a server, and wait until it takes clients."""
        folder = self.new_folder()
        path = folder / "socket"
        with on_cpus({self.cpus[SAME]}):
            process = _STARTERS[name](self, folder, path)
        deadline = time.monotonic() + PATIENCE
        while not _takes_clients(path):
            if process.poll() is not None or time.monotonic() > deadline:
                said = (folder / "log").read_text(errors="replace").strip()
                raise Failed(f"{name} does not start: {said or '(it said nothing)'}")
            time.sleep(0.02)
        if name == "qemu":
            # It forgets its fd sets with the last monitor's client, so one more stays all the time.
            second = self._stack.enter_context(socket.socket(socket.AF_UNIX))
            second.connect(str(folder / _SECOND_MONITOR))
        pids = (*children(process.pid), process.pid) if name == "supervised" else (process.pid,)
        return Server(name, pids, path, stored)

    def new_folder(self) -> Path:
        """A folder for one more server."""
        self._count += 1
        folder = self.folder / f"{self._count}"
        folder.mkdir()
        return folder

    def spawn(
        self, folder: Path, command: list[str], stdin: socket.socket | None = None
    ) -> subprocess.Popen[bytes]:
        """Start a process that writes to a log of its own; it is ended with all the others."""
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
        """End one server, before all others are."""
        end(self._processes[server.pids[-1]])


def children(pid: int) -> tuple[int, ...]:
    """The processes that *pid* has started (proc(5), children)."""
    return tuple(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


@contextmanager
def on_cpus(cpus: Collection[int]) -> Iterator[None]:
    """Start processes and threads on these CPUs only (sched_setaffinity(2) is inherited)."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def environment() -> Mapping[str, str]:
    """For the Pythons that are measured: as installed, that is with their bytecode cached."""
    return {k: v for k, v in os.environ.items() if k not in _SLOWER_PYTHON}


_SLOWER_PYTHON = ("PYTHONDONTWRITEBYTECODE", "PYTHONDEVMODE", "PYTHONWARNINGS")


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process that was started here, and wait until it is gone."""
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


def _start_script(servers: Servers, folder: Path, path: Path, name: str) -> subprocess.Popen[bytes]:
    return servers.spawn(folder, [sys.executable, str(HERE / f"{name}_server.py"), str(path)])


def serve_command(path: Path, *options: str) -> list[str]:
    """The command line of a qmpfd that listens there."""
    return [sys.executable, "-m", "qmpfd", "serve", "--socket", str(path), *options]


def _start_qmpfd(
    servers: Servers, folder: Path, path: Path, *options: str
) -> subprocess.Popen[bytes]:
    return servers.spawn(folder, serve_command(path, *options))


_SECOND_MONITOR = "second"


def _start_qemu(servers: Servers, folder: Path, path: Path) -> subprocess.Popen[bytes]:
    options = ["-nodefaults", "-machine", "none", "-display", "none"]
    for monitor in (path, folder / _SECOND_MONITOR):
        options += ["-qmp", f"unix:{monitor},server=on,wait=off"]
    return servers.spawn(folder, ["qemu-system-x86_64", *options])


def _start_s6(servers: Servers, folder: Path, path: Path) -> subprocess.Popen[bytes]:
    """Its socket is its standard input; who may do what are files in a folder."""
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
    "qmpfd": _start_qmpfd,
    "supervised": lambda *where: _start_qmpfd(*where, "--supervise"),
    "asyncio": partial(_start_script, name="asyncio"),
    "qemu": _start_qemu,
}
