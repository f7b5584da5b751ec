"""A real systemd, as the manager of a user: its file-descriptor store, restarts and crashes.

It believes that it is on a system that runs systemd if there is a folder /run/systemd/system; a
mount namespace gives it one, and nothing outside is touched.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from helpers import ROOT
from supervised import DEADLINE, connected, lasting, until

from qmpfd.errors import QMPError

pytestmark = [pytest.mark.root, pytest.mark.timeout(120)]

SYSTEMD = "/lib/systemd/systemd"

_SERVICE = """
[Unit]
StartLimitIntervalSec=0

[Service]
Type=notify
WorkingDirectory={root}
ExecStart={python} -m qmpfd serve {options}
FileDescriptorStoreMax={size}
Environment=FDSTORE={size}
Restart=always
RestartSec=0
{hardening}
"""

# What of the hardening may be in the way of the store, which asks the kernel with kcmp(2).
_HARDENING = ("NoNewPrivileges", "RestrictAddressFamilies", "MemoryDeny", "SystemCall")

_SOCKET = """
[Socket]
ListenStream={path}
FileDescriptorName=qmp
"""


class Manager:
    """A systemd of our own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.units = folder / "config/systemd/user"
        self.units.mkdir(parents=True)
        (folder / "run").mkdir(mode=0o700)
        self.environment = {
            **os.environ,
            "XDG_RUNTIME_DIR": str(folder / "run"),
            "XDG_CONFIG_HOME": str(folder / "config"),
        }
        script = (
            "mount -t tmpfs none /run && mkdir -p /run/systemd/system && "
            f"exec {SYSTEMD} --user --log-target=console"
        )
        with (folder / "log").open("wb") as log:
            self.process = subprocess.Popen(
                ["unshare", "--mount", "--propagation", "private", "sh", "-c", script],
                env=self.environment,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
            )

    def systemctl(self, *words: str) -> str:
        """Tell it something; what it says."""
        return subprocess.run(
            ["systemctl", "--user", "--no-pager", *words],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=DEADLINE,
            check=True,
        ).stdout

    def show(self, name: str) -> int:
        """A number that it knows of the service."""
        return int(self.systemctl("show", "--value", "-p", name, "test.service"))

    def is_up(self) -> bool:
        """Whether it can be talked to."""
        try:
            self.systemctl("list-units")
        except subprocess.CalledProcessError:
            return False
        return True


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    if not Path(SYSTEMD).exists() or shutil.which("unshare") is None:
        pytest.skip("needs systemd")
    made = Manager(tmp_path)
    try:
        until(lambda: made.process.poll() is not None or made.is_up())
        if made.process.poll() is not None:
            pytest.skip(f"systemd does not run here: {(tmp_path / 'log').read_text()}")
        yield made
    finally:
        if made.process.poll() is None:
            made.systemctl("stop", "test.service", "test.socket")
            made.process.send_signal(signal.SIGTERM)
        made.process.wait(DEADLINE)


def start(manager: Manager, path: Path, *, size: int = 64, activated: bool = False) -> None:
    options = "" if activated else f"--socket {path}"
    shipped = (ROOT / "packaging/qmpfd.service").read_text().splitlines()
    hardening = "\n".join(line for line in shipped if line.startswith(_HARDENING))
    unit = _SERVICE.format(
        root=ROOT, python=sys.executable, options=options, size=size, hardening=hardening
    )
    (manager.units / "test.service").write_text(unit)
    (manager.units / "test.socket").write_text(_SOCKET.format(path=path))
    manager.systemctl("daemon-reload")
    manager.systemctl("start", "test.socket" if activated else "test.service")


@pytest.mark.parametrize("activated", [False, True], ids=["own socket", "activated"])
def test_restarts_and_crashes(manager: Manager, path: Path, activated: bool) -> None:
    start(manager, path, activated=activated)
    file = manager.folder / "file"
    file.write_text("content")
    with connected(path) as client, file.open() as one, file.open() as other:
        client.execute("add-fds", {"opaque": "twice"}, [one, one])
        client.execute("add-fds", {"opaque": "gone"}, [other, one])
        client.execute("remove-fd", {"fdset-id": 1})
        client.execute("add-fd", {"opaque": "other"}, [other])
        before = lasting(client.execute("query-fds"))
        # The journal, two descriptions, and the socket that the daemon has made itself.
        until(lambda: manager.show("NFileDescriptorStore") == 3 + (not activated))
    for crash in (False, True, True, False):
        pid = manager.show("MainPID")
        if crash:
            os.kill(pid, signal.SIGKILL)
        else:
            manager.systemctl("restart", "test.service")
        until(lambda pid=pid: manager.show("MainPID") not in (0, pid))
        with connected(path) as client:
            assert lasting(client.execute("query-fds")) == before
            _, passed = client.request("open-fdset", {"fdset-id": 1})
            with passed[0] as fd:
                assert os.pread(fd.fileno(), 10, 0) == b"content"
    with connected(path) as client:
        for fdset in (0, 1):
            client.execute("remove-fd", {"fdset-id": fdset})
        assert manager.show("NFileDescriptorStore") == 1 + (not activated)


def test_a_full_store(manager: Manager, path: Path) -> None:
    start(manager, path, size=10)
    with connected(path) as client:
        refused = added = 0
        for _ in range(15):
            with closing(socket.socket(socket.AF_UNIX)) as sock:
                try:
                    client.execute("add-fd", fds=[sock])
                    added += 1
                except QMPError:
                    refused += 1
        assert refused
        before = lasting(client.execute("query-fds"))
        assert len(before) == added
    os.kill(manager.show("MainPID"), signal.SIGKILL)
    with connected(path) as client:
        assert lasting(client.execute("query-fds")) == before


def test_quit(manager: Manager, path: Path) -> None:
    """It is started again, as it is told to, with nothing."""
    start(manager, path)
    with connected(path) as client:
        client.execute("add-fd", fds=[0])
        pid = manager.show("MainPID")
        client.execute("quit")
    until(lambda: manager.show("MainPID") not in (0, pid))
    with connected(path) as client:
        assert client.execute("query-fds") == []
