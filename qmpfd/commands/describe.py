"""The entry of one stored descriptor in ``query-fds``."""

from __future__ import annotations

from math import ceil

from ..fdsets import StoredFd
from ..kernel.fdinfo import access_mode, flags, kind, size, target
from ..kernel.sockets import describe_socket
from ..limits import INT64_MAX
from .extension_types import FdInfo, PeerInfo


def describe(stored: StoredFd, now: float) -> FdInfo:
    """The ``query-fds`` entry of *stored*, at the time *now*."""
    number = stored.fd.fileno()
    link = target(number)
    what = kind(number, link)
    lifetime = stored.lifetime
    socket = describe_socket(number) if what == "socket" else None
    return FdInfo(
        fdset_id=stored.fdset.id,
        fd=number,
        access=access_mode(number),
        kind=what,
        target=link,
        flags=flags(number),
        age=int(now - stored.added_at),
        lifetime="daemon" if lifetime.owner is None else "connection",
        watch_hangup=lifetime.watch_hangup,
        opaque=stored.opaque,
        size=size(number) if what in ("file", "memfd") else None,
        address=None if socket is None else socket.address,
        peer=None if socket is None else socket.peer,
        listening=None if socket is None else socket.listening,
        expires=None if lifetime.expires_at is None else _seconds(lifetime.expires_at - now),
        added_by=None if stored.added_by is None else PeerInfo(*stored.added_by),
    )


def _seconds(left: float) -> int:
    """Remaining seconds as an int64: a float near its end may round up beyond it."""
    return min(max(0, ceil(left)), INT64_MAX)
