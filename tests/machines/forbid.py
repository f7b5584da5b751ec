"""Run a command for which some system calls fail, as with a container's seccomp filter:

forbid.py ERRNO CALL[,CALL...] COMMAND...
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import sys

#: Numbers of system calls (asm/unistd_64.h, asm-generic/unistd.h); libc may lack their names.
NUMBERS = {
    "close_range": 436,
    "flock": 73 if platform.machine() == "x86_64" else 32,
    "kcmp": 312 if platform.machine() == "x86_64" else 272,
    "memfd_create": 319 if platform.machine() == "x86_64" else 279,
    "pidfd_open": 434,
    "setsockopt": 54 if platform.machine() == "x86_64" else 208,
    "setpgid": 109 if platform.machine() == "x86_64" else 154,
    "statx": 332 if platform.machine() == "x86_64" else 291,
}

# linux/bpf_common.h, linux/seccomp.h, linux/prctl.h.
_LOAD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06
_ALLOW, _FAIL_WITH = 0x7FFF0000, 0x00050000
_SET_NO_NEW_PRIVS, _SET_SECCOMP, _FILTER = 38, 22, 2


def program(error: int, numbers: list[int]) -> bytes:
    """Return a filter (seccomp(2)) that makes system calls fail.

    Args:
        error: errno of the failures.
        numbers: numbers of the system calls.
    """
    steps = [(_LOAD, 0, 0, 0)]  # the number of the call: the first word of struct seccomp_data
    for left, number in zip(range(len(numbers), 0, -1), numbers, strict=True):
        steps.append((_JUMP_IF_EQUAL, left, 0, number))
    steps += (_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _FAIL_WITH | error)
    return b"".join(struct.pack("HBBI", *step) for step in steps)


def main(error: str, calls: str, *command: str) -> None:
    code = program(int(error), [NUMBERS[call] for call in calls.split(",")])
    room = ctypes.create_string_buffer(code, len(code))
    header = struct.pack("@HP", len(code) // 8, ctypes.addressof(room))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(_SET_SECCOMP, _FILTER, header, 0, 0):
        sys.exit(os.strerror(ctypes.get_errno()))
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(*sys.argv[1:])
