"""Users: who the peer of a Unix socket is, and which uids are root's and the process's own."""

from __future__ import annotations

import array
import errno
import os
import socket
import struct
from pathlib import Path

#: SO_PEERGROUPS (socket(7)): all groups of the peer; Python's socket module lacks it.
_SO_PEERGROUPS = 59

#: Maximum size of an option in Python's getsockopt(); for more groups the C library is called.
_OPTION_BYTES = 1024
#: Maximum number of groups of a process (NGROUPS_MAX, getgroups(2)).
_MAX_GROUPS = 65536


def peer_credentials(sock: socket.socket) -> tuple[int, int, int]:
    """Return pid, uid and gid of the peer (SO_PEERCRED, unix(7))."""
    packed = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid, uid, gid = struct.unpack("3i", packed)
    return pid, uid, gid


def peer_groups(sock: socket.socket) -> array.array[int]:
    """Return the peer's supplementary groups; none before Linux 4.13, which lacks the option."""
    groups = array.array("I")
    try:
        groups.frombytes(sock.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _OPTION_BYTES))
    except OSError as exc:
        if exc.errno == errno.ERANGE:
            return _many_groups(sock)
    return groups


def _many_groups(sock: socket.socket) -> array.array[int]:
    import ctypes  # noqa: PLC0415 - its import opens a descriptor: not before a restart has its own

    groups = array.array("I", bytes(4 * _MAX_GROUPS))
    size = ctypes.c_uint32(4 * _MAX_GROUPS)
    address, _ = groups.buffer_info()
    getsockopt = ctypes.CDLL(None).getsockopt
    if getsockopt(
        sock.fileno(),
        socket.SOL_SOCKET,
        _SO_PEERGROUPS,
        ctypes.c_void_p(address),
        ctypes.byref(size),
    ):
        return array.array("I")
    return groups[: size.value // groups.itemsize]


def _overflow_uid() -> int:
    """Return the uid by which the kernel shows users that are not mapped in this user namespace
    (user_namespaces(7), "Unmapped user and group IDs").
    """
    try:
        return int(Path("/proc/sys/kernel/overflowuid").read_text("ascii"))
    except (OSError, ValueError):
        return 65534  # the kernel's default


_OVERFLOW_UID = _overflow_uid()


def is_owner(uid: int) -> bool:
    """Whether *uid* is root's or the process's own.

    The overflow uid never counts as the process's own: all unmapped users share it.
    """
    return uid == 0 or (uid == os.geteuid() and uid != _OVERFLOW_UID)
