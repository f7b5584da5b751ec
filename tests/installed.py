"""Programs that the tests need: skip or fail a test whose program is not installed."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from typing import NoReturn

import pytest

QEMU = "qemu-system-x86_64"

INIT = "/lib/systemd/systemd"

#: Debian package of each program.
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

#: Parts of the reasons of tests that are skipped even with all programs installed.
EXPECTED_SKIPS = (
    "QEMU races with itself",
    "has no FileDescriptorStorePreserve=",  # of systemd, before 254
    "argparse writes usage as each Python has it",
)


def required() -> bool:
    """Return whether a test whose program is missing fails instead of being skipped."""
    return bool(os.environ.get("QMPFD_REQUIRE_PEERS"))


def need(program: str) -> str:
    """Return the path of *program*.  If it is not installed, skip the test with the command that
    installs it as the reason, or fail the test if QMPFD_REQUIRE_PEERS is set.
    """
    found = shutil.which(program)
    if found is None:
        _lacking(f"needs {program}: apt-get install {PACKAGES[program]}")
    return found


def need_namespaces(*kinds: str) -> None:
    """Skip or fail the test as `need` does if namespaces of these kinds cannot be made.

    Args:
        kinds: options of unshare(1).
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
    """Yield a line for each group of tests that will be skipped, with what they need."""
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
