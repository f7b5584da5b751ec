"""Addresses of a socket, and whether it listens.

No call here blocks: getsockname(2), getpeername(2) and getsockopt(2) ask no file system or peer.
"""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from typing import Any


def describe_socket(fd: int) -> tuple[str | None, str | None, bool]:
    """Return the socket's address, its peer's address, and whether it listens (SO_ACCEPTCONN).

    Addresses have the form ``HOST:PORT``, ``[V6]:PORT``, ``unix:PATH``, ``unix:@NAME`` (abstract)
    or ``vsock:CID:PORT``; None if there is no address, or for another family.
    """
    try:
        sock = socket.socket(fileno=fd)
    except OSError:  # a family whose addresses Python does not know
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
    """Format *address*, as returned by the socket module; return None if there is none."""
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
