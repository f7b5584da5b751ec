"""Opener for Python's ``open`` that resolves ``/dev/fdset/N`` with a qmpfd daemon."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Literal

from ..errors import QMPError
from .blocking import BlockingClient
from .calls import is_missing

_NAME = re.compile("/dev/fdset/([0-9]{1,18})")
_ACCESS: dict[int, Literal["rdonly", "wronly", "rdwr"]] = {
    os.O_RDONLY: "rdonly",
    os.O_WRONLY: "wronly",
    os.O_RDWR: "rdwr",
}


def fdset_opener(
    path: str | os.PathLike[str], *, timeout: float = 10.0
) -> Callable[[str, int], int]:
    """Return an opener for :func:`open` that opens ``/dev/fdset/N`` from the daemon's fd sets.

    ``open("/dev/fdset/0", "rb", opener=qmpfd.fdset_opener(path))`` reads from the newest
    descriptor of set 0 that was opened for reading only: as in QEMU, the access mode must be
    equal.  The file is neither truncated nor created, whatever the mode says.  All duplicates
    of the descriptor share one file offset.  Any other name is opened as usual.  The call blocks
    until the daemon replies: a Trio program calls it in a thread.

    Args:
        path: the daemon's socket.
        timeout: seconds to wait for the daemon.

    Raises:
        FileNotFoundError: the fd set does not exist, or has no descriptor of that access mode.
        NoDaemon: no server answers at *path*.
        QMPError: the daemon refuses the request for another reason.
    """

    def opener(name: str, flags: int) -> int:
        match = _NAME.fullmatch(os.fsdecode(name))
        if match is None:
            return os.open(name, flags, 0o666)
        with BlockingClient(path, timeout) as client:
            try:
                return client.open_fdset(int(match[1]), _ACCESS[flags & os.O_ACCMODE]).detach()
            except QMPError as exc:
                if not is_missing(exc):
                    raise
                raise FileNotFoundError(2, str(exc), name) from None

    return opener
