"""A seccomp filter forbids system calls: older container runtimes do so for calls that they do not
know, with EPERM or ENOSYS.
"""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from helpers import daemon_process
from supervised import COMMAND, DEADLINE, connected, until

from . import forbid

SUPERVISED = pytest.mark.parametrize("options", [[], ["--supervise"]], ids=["plain", "supervised"])
ERRORS = pytest.mark.parametrize("error", [errno.EPERM, errno.ENOSYS], ids=["EPERM", "ENOSYS"])


def forbidding(error: int, call: str) -> list[str]:
    """Return the start of a command line in which *call* fails with *error*."""
    return [sys.executable, forbid.__file__, str(error), call]


def worker(path: Path) -> int:
    """Return the id of the serving process."""
    with connected(path) as client:
        return int(client.execute("query-stats")["pid"])


@pytest.mark.parametrize("call", ["close_range", "flock", "kcmp", "pidfd_open", "setpgid", "statx"])
@ERRORS
@SUPERVISED
def test_what_can_be_done_without(
    path: Path, options: Sequence[str], error: int, call: str
) -> None:
    """Stored descriptors survive a crash of a supervised worker, and a takeover."""
    prefix = forbidding(error, call)
    with daemon_process(path, *options, prefix=prefix) as old:
        with connected(path) as client:
            stored = client.execute("add-fd", {"opaque": "kept"}, [0])
        if options:
            before = worker(path)
            os.kill(before, signal.SIGKILL)
            until(lambda: worker(path) != before, "a new worker")
        with daemon_process(path, *options, "--takeover", prefix=prefix):
            assert old.process.wait(DEADLINE) == 0
            with connected(path) as client:
                [found] = client.execute("query-fdsets")[0]["fds"]
                assert found == {"fd": stored["fd"], "opaque": "kept"}
                client.execute("remove-fd", {"fdset-id": stored["fdset-id"]})
                assert client.execute("query-fdsets") == []


@ERRORS
def test_no_memory_for_the_journal(path: Path, error: int) -> None:
    command = [*forbidding(error, "memfd_create"), *COMMAND, "--supervise", "--socket", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE, check=False)
    reason = f"{os.strerror(error)} (memfd_create(2), for the journal of --supervise)"
    assert done.stderr == f"qmpfd: the daemon cannot start: {reason}\n"
    assert done.returncode == 2


#: Creates a stream of a socket; the socket must be open afterwards.
_FAILED_STREAM = """
import os, socket, trio
from qmpfd.transport import FdStream
sock = trio.socket.from_stdlib_socket(socket.socketpair()[0])
try:
    FdStream(sock)
except PermissionError:
    pass
else:
    raise AssertionError("nothing was forbidden")
os.fstat(sock.fileno())
"""


def test_a_client_whose_options_cannot_be_set() -> None:
    """Its socket is closed once: a second close would close the next client's."""
    prefix = forbidding(errno.EPERM, "setsockopt")
    subprocess.run([*prefix, sys.executable, "-c", _FAILED_STREAM], timeout=DEADLINE, check=True)
