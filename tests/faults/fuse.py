"""A FUSE file system that hangs on demand: the kernel's protocol, without a library.

``fuse.py FOLDER`` mounts the file system there and prints ``mounted``.  A line on standard input
names the requests that are not answered from now on, such as ``FLUSH,RELEASE``.  The end of the
process closes /dev/fuse, which aborts the connection: hanging system calls then fail.

The structures are those of ``linux/fuse.h``, protocol 7.31.
"""

from __future__ import annotations

import ctypes
import errno
import os
import select
import stat
import struct
import sys

#: ``enum fuse_opcode``.
OPCODES = {
    "LOOKUP": 1,
    "FORGET": 2,
    "GETATTR": 3,
    "OPEN": 14,
    "READ": 15,
    "WRITE": 16,
    "STATFS": 17,
    "RELEASE": 18,
    "FSYNC": 20,
    "FLUSH": 25,
    "INIT": 26,
    "OPENDIR": 27,
    "RELEASEDIR": 29,
    "INTERRUPT": 36,
    "IOCTL": 39,
    "POLL": 40,
    "BATCH_FORGET": 42,
}
_NAMES = {number: name for name, number in OPCODES.items()}
_SILENT = {"FORGET", "BATCH_FORGET", "INTERRUPT"}  # requests without an answer

_IN = struct.Struct("<IIQQIIII")  # fuse_in_header: len, opcode, unique, nodeid, uid, gid, pid, pad
_OUT = struct.Struct("<IiQ")  # fuse_out_header: len, error, unique
_INIT_OUT = struct.Struct("<IIIIHHIIHHI28x")
_ATTR = struct.Struct("<QQQQQQIIIIIIIIII")
_ENTRY = struct.Struct("<QQQQII")  # fuse_entry_out, up to its attr
_ATTR_OUT = struct.Struct("<QII")  # fuse_attr_out, up to its attr
_OPEN_OUT = struct.Struct("<QIi")

_ROOT, _FILE = 1, 2
_MS_NOSUID, _MS_NODEV, _MNT_DETACH = 2, 4, 2
_libc = ctypes.CDLL(None, use_errno=True)


def _checked(result: int) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def mount(folder: str) -> int:
    """Mount a FUSE file system at *folder*; return the descriptor to read its requests from."""
    device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    options = f"fd={device},rootmode={stat.S_IFDIR:o},user_id={os.getuid()},group_id={os.getgid()}"
    options += ",allow_other"
    try:
        _checked(
            _libc.mount(
                b"qmpfd-test",
                os.fsencode(folder),
                b"fuse.qmpfd",
                ctypes.c_ulong(_MS_NOSUID | _MS_NODEV),
                options.encode(),
            )
        )
    except OSError:
        os.close(device)
        raise
    return device


def unmount(folder: str) -> None:
    """Detach the mount at *folder*, also while it is in use (umount2(2), MNT_DETACH)."""
    _checked(_libc.umount2(os.fsencode(folder), _MNT_DETACH))


def _attributes(node: int) -> bytes:
    mode = stat.S_IFDIR | 0o755 if node == _ROOT else stat.S_IFREG | 0o666
    return _ATTR.pack(node, 4096, 8, *[0] * 6, mode, 1, os.getuid(), os.getgid(), 0, 4096, 0)


def _answer(name: str, node: int) -> bytes | int:
    """Return the body of the answer, or an errno."""
    if name == "INIT":
        return _INIT_OUT.pack(7, 31, 1 << 16, 0, 12, 9, 1 << 16, 1, 0, 0, 0)
    if name == "LOOKUP":  # every name leads to the one file
        return _ENTRY.pack(_FILE, 0, 0, 0, 0, 0) + _attributes(_FILE)
    if name == "GETATTR":  # valid for 0 s: the kernel asks each time
        return _ATTR_OUT.pack(0, 0, 0) + _attributes(node)
    if name in ("OPEN", "OPENDIR"):
        return _OPEN_OUT.pack(1, 0, 0)
    if name in ("FLUSH", "RELEASE", "RELEASEDIR", "FSYNC"):
        return b""
    if name == "READ":
        return b""
    return errno.ENOSYS


def serve(device: int) -> None:
    """Answer requests until standard input ends or the file system is unmounted."""
    hang: set[str] = set()
    poll = select.poll()
    poll.register(device, select.POLLIN)
    poll.register(0, select.POLLIN)
    while True:
        for number, _ in poll.poll():
            if number == 0:
                line = sys.stdin.readline()
                if not line:
                    return
                hang = set(filter(None, line.strip().split(",")))
                print("told", flush=True)
                continue
            try:
                request = os.read(device, 1 << 18)
            except OSError as exc:
                if exc.errno == errno.ENODEV:
                    return
                if exc.errno in (errno.EINTR, errno.EAGAIN, errno.ENOENT):
                    continue
                raise
            _, opcode, unique, node, *_ = _IN.unpack_from(request)
            name = _NAMES.get(opcode, "?")
            if name in _SILENT:
                continue
            if name in hang:
                print(f"hangs {name}", file=sys.stderr, flush=True)
                continue
            body = _answer(name, node)
            error, body = (body, b"") if isinstance(body, int) else (0, body)
            try:
                os.write(device, _OUT.pack(_OUT.size + len(body), -error, unique) + body)
            except FileNotFoundError:  # the process that waited has been killed
                pass


if __name__ == "__main__":
    the_device = mount(sys.argv[1])
    try:
        print("mounted", flush=True)
        serve(the_device)
    finally:
        os.close(the_device)
        unmount(sys.argv[1])
