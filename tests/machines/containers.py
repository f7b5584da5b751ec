"""Run a shell script in a container made of namespaces and mounts.

In the container, ``$QMPFD`` is the command of ``qmpfd``, and the test's folder is mounted at
/run/qmpfd.  The checkout and Python are mounted where every user can read them.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from helpers import ROOT
from installed import need_namespaces

DEADLINE = 60.0

#: Folders mounted in the container, by name below /run/test; PYTHON and ENVIRONMENT use them.
BOUND = {
    "checkout": ROOT,
    "python": Path(sys.base_prefix),
    "site": Path(sysconfig.get_path("purelib")),
}
PYTHON = f"/run/test/python/bin/python{sys.version_info.major}.{sys.version_info.minor}"
ENVIRONMENT = {
    "PYTHONPATH": "/run/test/checkout:/run/test/site",
    "LD_LIBRARY_PATH": "/run/test/python/lib",
}

#: Uid, outside, of the root of a container with a user namespace.
ITS_ROOT = 100_000

_START = r"""
set -eu
mount -t tmpfs -o mode=755 tmpfs /run
while [ "$1" != -- ]; do
    mkdir -p "/run/test/$1"
    mount --bind "$2" "/run/test/$1"
    shift 2
done
mkdir /run/qmpfd
mount --bind "$2" /run/qmpfd
cd /
if [ "$3" = no ]; then exec sh -euc "$4"; fi
# A user namespace whose only user is root, with another uid outside (user_namespaces(7)).
exec setpriv --reuid="$3" --regid="$3" --clear-groups unshare --user --map-root-user sh -euc "$4"
"""


@contextmanager
def container(
    folder: Path, script: str, *kinds: str, users: bool = False
) -> Iterator[subprocess.Popen[str]]:
    """Start a script in a container; end it at the end of the block.

    Args:
        folder: mounted at /run/qmpfd.
        script: script for sh.
        kinds: namespaces besides the mount namespace, as options of unshare(1).
        users: whether to make a user namespace; its root is ITS_ROOT outside.
    """
    command = _command(folder, script, kinds, users)
    process = subprocess.Popen(
        command,
        env=_environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        if "--fork" in kinds:
            process.kill()  # unshare forwards no signal; --kill-child kills its children with it
        else:
            process.terminate()
        process.communicate(timeout=DEADLINE)


def run(
    folder: Path, script: str, *kinds: str, users: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run a script in a container to its end, with the arguments of `container`."""
    return subprocess.run(
        _command(folder, script, kinds, users),
        env=_environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )


def _command(folder: Path, script: str, kinds: Sequence[str], users: bool) -> list[str]:
    spaces = ["unshare", "--mount", *kinds]
    need_namespaces(*spaces[1:])
    bound = [str(word) for pair in BOUND.items() for word in pair]
    mapped = str(ITS_ROOT) if users else "no"
    start = ["sh", "-c", _START, "sh", *bound, "--", str(folder), mapped, script]
    return [*spaces, "--propagation=private", *start]


def _environment() -> dict[str, str]:
    path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    return {
        **ENVIRONMENT,
        "PATH": path,
        "QMPFD": f"{PYTHON} -m qmpfd",
    }
