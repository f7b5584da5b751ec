"""Other people's programs that the tests talk to."""

from __future__ import annotations

import os
import shutil
import subprocess
from typing import NoReturn

import pytest

QEMU = "qemu-system-x86_64"

#: The Debian packages of those whose package has another name.
_PACKAGES = {
    QEMU: "qemu-system-x86",
    "systemd-socket-activate": "systemd",
    "systemd-analyze": "systemd",
    "/lib/systemd/systemd": "systemd",
    "s6-svscan": "s6",
    "runsv": "runit",
    "sv": "runit",
    "nsenter": "util-linux",
    "unshare": "util-linux",
}


def need(program: str) -> str:
    """The path of *program*.  Where it is not installed the test is skipped, and names the command
    that installs it; where QMPFD_REQUIRE_PEERS is set, it fails.
    """
    found = shutil.which(program)
    if found is None:
        _lacking(f"needs {program}: apt-get install {_PACKAGES.get(program, program)}")
    return found


def need_namespaces(*kinds: str) -> None:
    """Skip the test, or fail it, as `need` does, where namespaces of these kinds, which are options
    of unshare(1), are not to be had.
    """
    command = [need("unshare"), *kinds, "true"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        _lacking(f"needs what this does: sudo {' '.join(command)} ({done.stderr.strip()})")


def _lacking(message: str) -> NoReturn:
    if os.environ.get("QMPFD_REQUIRE_PEERS"):
        pytest.fail(message)
    pytest.skip(message)
