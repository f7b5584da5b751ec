"""Run a real systemd as process 1, in namespaces and a control group of its own.

The machine outside is unaffected: mount, pid, uts, network and ipc namespaces are separate, the
control group is below the test's, and ``/proc/sys`` is read-only.  systemd loads the unmodified
units of ``packaging/``; ``/usr/bin/qmpfd`` runs this checkout.  The end of process 1 ends
everything.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from installed import INIT, need, need_namespaces

from qmpfd.client.blocking import BlockingClient, NoDaemon

from .containers import BOUND, ENVIRONMENT, PYTHON

DEADLINE = 20.0

_TARGETS = "basic local-fs multi-user paths shutdown slices sockets sysinit timers umount"

#: /usr/bin/qmpfd, as pip writes it: a Python script, because a shell keeps its script file open.
_QMPFD = f"""#!{PYTHON}
import sys
from qmpfd.__main__ import program
sys.exit(program())
"""

#: Drop-in for all services: logs go to files, because there is no journal.
_SERVICES = "\n".join(
    [
        "[Service]",
        "StandardError=append:/run/%N.log",
        *(f"Environment={name}={value}" for name, value in ENVIRONMENT.items()),
        "",
    ]
)

_BOOT = r"""
set -eu
mount -t proc proc /proc
mount --bind /proc/sys /proc/sys
mount -o remount,bind,ro /proc/sys
mount -t sysfs -o ro sys /sys
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t tmpfs -o mode=755 tmpfs /run
mkdir -p /run/test/units/service.d
while [ "$1" != -- ]; do
    mkdir "/run/test/$1"
    mount --bind "$2" "/run/test/$1"
    shift 2
done
shift
mount -t tmpfs -o mode=1777 tmpfs /tmp  # after the bind mounts: their sources may be below /tmp
for folder in usr/bin etc; do  # overlays, so that writes do not reach the machine outside
    mkdir -p "/run/test/upper/$folder" "/run/test/work/$folder"
    mount -t overlay -o "lowerdir=/$folder,upperdir=/run/test/upper/$folder" \
        -o "workdir=/run/test/work/$folder" overlay "/$folder"
done
printf '%s' "$QMPFD" >/usr/bin/qmpfd
chmod 755 /usr/bin/qmpfd
for target in $TARGETS; do cp "/lib/systemd/system/$target.target" /run/test/units/; done
cp /run/test/checkout/packaging/*.service /run/test/checkout/packaging/*.socket /run/test/units/
printf '%s' "$SERVICES" >/run/test/units/service.d/all.conf
exec env -i PATH="$PATH" container=qmpfd-test SYSTEMD_UNIT_PATH=/run/test/units "$@"
"""


def _own_cgroup() -> Path:
    """Make a control group below that of this process."""
    mounts = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    mounted = next((each[4] for each in mounts if each[each.index("-") + 1] == "cgroup2"), None)
    assert mounted is not None, "no cgroup2 file system is mounted"
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    ours = next(line.removeprefix("0::") for line in lines if line.startswith("0::"))
    group = Path(f"{mounted}{ours}/qmpfd-test-{os.getpid()}-{time.monotonic_ns()}")
    group.mkdir()
    return group


def _remove_cgroup(group: Path) -> None:
    """Remove a control group and all below; retry until its killed processes are reaped."""
    for folder, _, _ in os.walk(group, topdown=False):
        until(partial(_removed, folder), f"no process in {folder}")


def _removed(folder: str) -> bool:
    with suppress(OSError):
        os.rmdir(folder)
        return True
    return False


def until(happened: Callable[[], Any], what: str) -> Any:
    """Wait until a function returns something true; return that."""
    deadline = time.monotonic() + DEADLINE
    while not (result := happened()):
        assert time.monotonic() < deadline, f"not in {DEADLINE} s: {what}"
        time.sleep(0.02)
    return result


class Machine:
    """A running systemd, controlled from outside."""

    def __init__(self, pid: int) -> None:
        self._pid = pid  # of the machine's process 1, outside

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command in the machine."""
        enter = ["nsenter", f"--target={self._pid}", "--mount", "--pid", "--ipc", "--uts", "--net"]
        return subprocess.run(
            [*enter, "--cgroup", "--root", "--wd", *command],
            capture_output=True,
            text=True,
            timeout=DEADLINE,
            check=False,
        )

    def systemctl(self, *words: str) -> str:
        done = self.run("systemctl", *words)
        assert done.returncode == 0, f"{words}: {done.stderr}{self._logs()}"
        return done.stdout.strip()

    def show(self, unit: str, name: str) -> str:
        """Return a property of a unit."""
        return self.systemctl("show", "--value", f"--property={name}", unit)

    @property
    def version(self) -> int:
        return int(self.run("systemctl", "--version").stdout.split()[1])

    def path(self, inside: str) -> Path:
        """Return the path, outside, of a file in the machine."""
        return Path(f"/proc/{self._pid}/root{inside}")

    def log(self, unit: str) -> str:
        return self.path(f"/run/{unit}.log").read_text()

    def _logs(self) -> str:
        return "\n".join(["", *(log.read_text() for log in self.path("/run").glob("*.log"))])

    def drop_in(self, unit: str, *lines: str) -> None:
        """Add settings to a service's unit."""
        folder = self.path(f"/run/test/units/{unit}.d")
        folder.mkdir(exist_ok=True)
        (folder / "test.conf").write_text("\n".join(["[Service]", *lines, ""]))
        self.systemctl("daemon-reload")

    def main_pid(self, unit: str) -> int:
        """Return the process id, in the machine, of a service's main process."""
        return int(self.show(unit, "MainPID"))

    def kill(self, unit: str, number: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal to the main process of a service; after SIGKILL, await its restart."""
        pid = self.main_pid(unit)
        assert pid, f"{unit} does not run"
        assert self.run("kill", f"-{number.name.removeprefix('SIG')}", str(pid)).returncode == 0
        if number is signal.SIGKILL:
            self.await_restart(unit, pid)

    def await_restart(self, unit: str, before: int) -> None:
        def other() -> bool:
            return self.main_pid(unit) not in (0, before) and (
                self.show(unit, "ActiveState") == "active"
            )

        until(other, f"{unit} is active again, and no longer process {before}\n{self._logs()}")

    def client(self, path: str = "/run/qmpfd.sock") -> BlockingClient:
        """Connect to a daemon, and retry while it starts."""

        def connected() -> BlockingClient | None:
            with suppress(NoDaemon):
                return BlockingClient(self.path(path), DEADLINE)
            return None

        client = until(connected, f"somebody serves {path}")
        assert isinstance(client, BlockingClient)
        return client


@contextmanager
def booted() -> Iterator[Machine]:
    """Boot a machine; kill it at the end."""
    need(INIT)
    need("nsenter")
    spaces = ["--mount", "--pid", "--ipc", "--uts", "--net", "--cgroup", "--fork", "--kill-child"]
    need_namespaces(*spaces)
    group = _own_cgroup()
    bound = [str(word) for pair in BOUND.items() for word in pair]
    start = 'echo $$ >"$1/cgroup.procs"; shift; exec "$@"'
    init = [INIT, "--system", "--unit=basic.target", "--log-target=console", "--show-status=no"]
    unshare = ["unshare", *spaces, "--propagation=private", "sh", "-c", _BOOT, "sh"]
    process = subprocess.Popen(
        ["sh", "-euc", start, "sh", str(group), *unshare, *bound, "--", *init],
        env={**os.environ, "QMPFD": _QMPFD, "SERVICES": _SERVICES, "TARGETS": _TARGETS},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        yield Machine(_init_of(process))
    finally:
        process.kill()  # unshare's --kill-child kills process 1, and the kernel all others
        output = process.communicate(timeout=DEADLINE)[0]
        sys.stdout.write(output.decode(errors="replace"))
        _remove_cgroup(group)


def _init_of(process: subprocess.Popen[bytes]) -> int:
    """Wait until systemd is up in the child of `process`; return its process id."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")

    def pid() -> int:
        assert process.poll() is None, process.communicate()
        found = children.read_text().split()
        up = found and Path(f"/proc/{found[0]}/root/run/systemd/private").exists()
        return int(found[0]) if up else 0

    init = int(until(pid, "systemd is up"))
    machine = Machine(init)
    until(lambda: machine.run("systemctl", "is-active", "basic.target").returncode == 0, "booted")
    return init
