"""Service managers that speak systemd's protocols: inherited sockets, readiness, watchdog.

See sd_listen_fds(3), sd_notify(3) and sd_watchdog_enabled(3).  Nothing here needs systemd itself,
and without its environment variables nothing here does anything.
"""

from __future__ import annotations

import os
import socket
import time
from typing import NamedTuple

from .fd import Fd

#: The first inherited descriptor (SD_LISTEN_FDS_START).
_FIRST = 3


class InheritedFd(NamedTuple):
    """A descriptor that the service manager has passed to us.

    Args:
        fd: the descriptor, close-on-exec from here on.
        name: what it is called there.
    """

    fd: Fd
    name: str


def take_listen_fds() -> list[InheritedFd]:
    """The descriptors that were passed to this process, with their names.

    The variables that tell of them are removed: children are not to take them for theirs.
    """
    pid, count = os.environ.pop("LISTEN_PID", ""), os.environ.pop("LISTEN_FDS", "")
    names = os.environ.pop("LISTEN_FDNAMES", "").split(":")
    os.environ.pop("LISTEN_PIDFDID", None)
    if pid != str(os.getpid()) or not count.isdecimal():
        return []
    taken = []
    for number in range(_FIRST, _FIRST + int(count)):
        os.set_inheritable(number, False)
        index = number - _FIRST
        taken.append(InheritedFd(Fd(number), names[index] if index < len(names) else "unknown"))
    return taken


def notify(*assignments: str) -> bool:
    """Tell the service manager something, such as ``"READY=1"``; whether there is one.

    That it cannot be reached is no reason to end: it is told again, or not.
    """
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path.startswith(("/", "@")):
        return False
    address = "\0" + path[1:] if path.startswith("@") else path
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.setblocking(False)
        try:
            sock.sendto("\n".join(assignments).encode(), address)
        except OSError:
            return False
    return True


def notify_reloading() -> None:
    """Tell the service manager that a reload has begun; ``"READY=1"`` tells that it is over."""
    notify("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")


def watchdog_interval() -> float | None:
    """Seconds within which the service manager wants to hear ``"WATCHDOG=1"``; None if it does
    not.
    """
    limit, pid = os.environ.get("WATCHDOG_USEC", ""), os.environ.get("WATCHDOG_PID")
    if not limit.isdecimal() or pid not in (None, str(os.getpid())):
        return None
    return int(limit) / 1e6 or None
