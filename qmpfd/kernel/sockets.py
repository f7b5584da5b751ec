"""The addresses of a socket, and whether it listens.

Nothing here waits: getsockname(2), getpeername(2) and getsockopt(2) ask no file system and no peer.
"""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from typing import Any


def describe_socket(fd: int) -> tuple[str | None, str | None, bool]:
    """The address of the socket *fd*, that of its other end, and whether it accepts connections
    (SO_ACCEPTCONN).

    Addresses are written as ``HOST:PORT``, ``[V6]:PORT``, ``unix:PATH``, ``unix:@NAME`` for an
    abstract one, and ``vsock:CID:PORT``; None where there is none, or one of a family that is not
    known here.
    """
    try:
        sock = socket.socket(fileno=fd)
    except OSError:  # a family that Python cannot read the address of
        return None, None, False
    address = peer = None
    listening = False
    try:
        with suppress(OSError, ValueError):
            address = _text(sock.family, sock.getsockname())
        with suppress(OSError, ValueError):
            peer = _text(sock.family, sock.getpeername())
        with suppress(OSError):
            listening = bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
    finally:
        sock.detach()
    return address, peer, listening


def _text(family: int, address: Any) -> str | None:
    """*address*, as Python's socket module gives it, for people; None where there is none."""
    if family == socket.AF_UNIX:
        raw = address if isinstance(address, bytes) else os.fsencode(address)
        if not raw:
            return None
        name = raw.decode("utf-8", "backslashreplace")
        return f"unix:@{name[1:]}" if name.startswith("\0") else f"unix:{name}"
    if family == socket.AF_INET:
        host, port = address
        return f"{host}:{port}"
    if family == socket.AF_INET6:
        host, port, _, scope = address
        zone = f"%{scope}" if scope and "%" not in host else ""
        return f"[{host}{zone}]:{port}"
    if family == socket.AF_VSOCK:
        cid, port = address
        return f"vsock:{cid}:{port}"
    return None
