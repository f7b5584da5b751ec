"""Other people's programs that the tests talk to, and what is skipped where they are not there."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from typing import NoReturn

import pytest

QEMU = "qemu-system-x86_64"

INIT = "/lib/systemd/systemd"

#: All of them, each with the Debian package that has it.
PACKAGES = {
    QEMU: "qemu-system-x86",
    "cc": "gcc libc6-dev",
    "fish": "fish",
    "bash": "bash",
    "nsenter": "util-linux",
    "runsv": "runit",
    "s6-fdholderd": "s6",
    "s6-svscan": "s6",
    "sv": "runit",
    INIT: "systemd",
    "systemd-analyze": "systemd",
    "systemd-socket-activate": "systemd",
    "unshare": "util-linux",
    "zsh": "zsh",
}

#: What is skipped on a machine that lacks nothing, by a part of the reason.
EXPECTED_SKIPS = (
    "QEMU races with itself",
    "has no FileDescriptorStorePreserve=",  # of systemd, before 254
    "argparse writes usage as each Python has it",
)


def required() -> bool:
    """Whether a test fails, rather than being skipped, where it lacks something."""
    return bool(os.environ.get("QMPFD_REQUIRE_PEERS"))


def need(program: str) -> str:
    """The path of *program*.  Where it is not installed the test is skipped, and names the command
    that installs it; where QMPFD_REQUIRE_PEERS is set, it fails.
    """
    found = shutil.which(program)
    if found is None:
        _lacking(f"needs {program}: apt-get install {PACKAGES[program]}")
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
    if required():
        pytest.fail(message)
    pytest.skip(message)


def will_be_skipped() -> Iterator[str]:
    """What the tests will lack, and how to get it."""
    missing = [program for program in PACKAGES if shutil.which(program) is None]
    if missing:
        packages = sorted({PACKAGES[program] for program in missing})
        yield f"those with {', '.join(missing)}: apt-get install {' '.join(packages)}"
    if os.geteuid() != 0:
        yield "those that change users, mounts and namespaces: they need root"
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        yield "those with a file system that hangs: they need /dev/fuse"
    if "QMPFD_SLOW" not in os.environ:
        yield "one that takes 20 s: QMPFD_SLOW=1"
