"""Addresses and options of a socket, and whether it listens or was shut down.

No call here blocks: getsockname(2), getpeername(2) and getsockopt(2) ask no file system or peer.
"""

from __future__ import annotations

import os
import select
import socket
from contextlib import suppress
from typing import Any

from .fd import BorrowedSocket, poll

#: Options that an accepted socket inherits from the listener, each with the value required here
#: (unix(7); the numbers are those of asm-generic/socket.h).  The first three add a control message
#: to every recvmsg(2), SO_PASSPIDFD with a descriptor in it; without SO_PASSRIGHTS clients could
#: not pass descriptors to the daemon.
_INHERITED_OPTIONS = {
    socket.SO_PASSCRED: 0,
    34: 0,  # SO_PASSSEC
    76: 0,  # SO_PASSPIDFD, Linux 6.5
    83: 1,  # SO_PASSRIGHTS, Linux 6.16
}

#: The families whose addresses are written with the family's name.
_NAMED = (socket.AF_VSOCK, socket.AF_NETLINK, socket.AF_PACKET)


def describe_socket(fd: int) -> tuple[str | None, str | None, bool | None]:
    """Return the socket's address, its peer's address, and whether it listens (SO_ACCEPTCONN); None
    for all three if *fd* is the file of a socket, opened with O_PATH.

    Addresses have the form ``HOST:PORT``, ``[V6]:PORT``, ``unix:PATH``, ``unix:@NAME`` (abstract),
    ``vsock:CID:PORT``, ``netlink:PORT:GROUPS`` or ``packet:INTERFACE:PROTOCOL``; None if there is
    no address, or for another family.
    """
    address = peer = None
    listening = False
    try:
        with BorrowedSocket(fd) as sock:
            with suppress(OSError, ValueError):
                address = _text(sock.family, sock.getsockname())
            with suppress(OSError, ValueError):
                peer = _text(sock.family, sock.getpeername())
            with suppress(OSError):
                listening = bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
    except OSError:
        return None, None, None
    return address, peer, listening


def _text(family: int, address: Any) -> str | None:
    """Format *address*, as returned by the socket module; return None if there is none."""
    if family == socket.AF_UNIX:
        raw = address if isinstance(address, bytes) else os.fsencode(address)
        if not raw:
            return None
        name = raw.decode("utf-8", "backslashreplace")
        if name.startswith("@"):  # a relative path, which is no abstract name
            name = f"./{name}"
        return f"unix:@{name[1:]}" if name.startswith("\0") else f"unix:{name}"
    if family == socket.AF_INET:
        host, port = address
        return f"{host}:{port}"
    if family == socket.AF_INET6:
        host, port, _, scope = address
        zone = f"%{scope}" if scope and "%" not in host else ""
        return f"[{host}{zone}]:{port}"
    if family in _NAMED:
        name = socket.AddressFamily(family).name.removeprefix("AF_").lower()
        return f"{name}:{address[0]}:{address[1]}"
    return None


def inherited_options(listener: socket.socket) -> list[tuple[int, int]]:
    """Return the options to set on each socket that *listener* accepts: each with its value."""
    options = []
    for option, value in _INHERITED_OPTIONS.items():
        with suppress(OSError):  # an older kernel lacks the option
            if listener.getsockopt(socket.SOL_SOCKET, option) != value:
                options.append((option, value))
    return options


def is_shut_down(sock: socket.socket) -> bool:
    """Return whether *sock* was shut down; accept(2) fails with EAGAIN then, as when it is idle."""
    return bool(poll(sock, select.POLLRDHUP))
