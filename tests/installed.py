"""Other people's programs that the tests talk to."""

from __future__ import annotations

import os
import shutil

import pytest

QEMU = "qemu-system-x86_64"

#: The Debian packages of those whose package has another name.
_PACKAGES = {
    QEMU: "qemu-system-x86",
    "systemd-socket-activate": "systemd",
    "systemd-analyze": "systemd",
}


def need(program: str) -> str:
    """The path of *program*.  Where it is not installed the test is skipped, and names the command
    that installs it; where QMPFD_REQUIRE_PEERS is set, it fails.
    """
    found = shutil.which(program)
    if found is None:
        message = f"needs {program}: apt-get install {_PACKAGES.get(program, program)}"
        if os.environ.get("QMPFD_REQUIRE_PEERS"):
            pytest.fail(message)
        pytest.skip(message)
    return found
