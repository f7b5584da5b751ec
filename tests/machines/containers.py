"""A container, as far as the kernel knows one: namespaces and mounts around a shell script.

The script finds the shell words of ``qmpfd`` in ``$QMPFD``, and the folder that is mounted for it
at /run/qmpfd.  All that it needs of this machine is where every user can read it.
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

#: Folder below /run/test there, folder here; and what has a Python find it all.
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

#: The container's root, for everybody else, where it has users of its own.
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
# One whose only user is root, and who has another number outside (user_namespaces(7)).
exec setpriv --reuid="$3" --regid="$3" --clear-groups unshare --user --map-root-user sh -euc "$4"
"""


@contextmanager
def container(
    folder: Path, script: str, *kinds: str, users: bool = False
) -> Iterator[subprocess.Popen[str]]:
    """Run a script in a container, and end it afterwards where it has not.

    Args:
        folder: what is at /run/qmpfd there.
        script: for sh.
        kinds: namespaces besides that of mounts, as options of unshare(1).
        users: it has a root of its own, who is ITS_ROOT here.
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
            process.kill()  # unshare does not pass a signal on; its --kill-child ends them all
        else:
            process.terminate()
        process.communicate(timeout=DEADLINE)


def run(
    folder: Path, script: str, *kinds: str, users: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run a script in a container to its end.  Arguments as for `container`."""
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
