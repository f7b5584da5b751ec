"""Finds the mounted local file systems, on which close(2) never waits for a server.

A thread reads the table of mounts (/proc/self/mountinfo, proc(5)): reading takes 10 us a mount, so
15,000 mounts would block the event loop for 160 ms.
"""

from __future__ import annotations

import _thread
import os
import re
import select
import threading
from collections.abc import Set
from itertools import takewhile
from time import monotonic

from .fd import Fd

#: The device of a mounted file system: major and minor number.
Device = tuple[int, int]

#: Seconds between two polls of the table: unmounting one file system and mounting another under the
#: same device number takes longer.
_POLL_INTERVAL = 0.001

#: Seconds until the table is read again after a failure.
_RETRY_INTERVAL = 1.0

#: File systems whose close(2) never blocks: those on local disks, and those in memory.
LOCAL = frozenset(
    (
        *("bpf", "btrfs", "cgroup", "cgroup2", "configfs", "debugfs", "devpts", "devtmpfs"),
        *("efivarfs", "erofs", "exfat", "ext2", "ext3", "ext4", "f2fs", "hugetlbfs", "iso9660"),
        *("jfs", "mqueue", "overlay", "proc", "pstore", "ramfs", "reiserfs", "securityfs"),
        *("squashfs", "sysfs", "tmpfs", "tracefs", "udf", "vfat", "xfs", "zfs"),
    )
)

#: One line: mount id, parent id, MAJOR:MINOR, ..., a lone hyphen, the type of the file system.
_LINE = re.compile(rb"^\d+ \d+ (\d+):(\d+) .*? - (\S+) ")

_NONE: Set[Device] = frozenset()


class LocalFileSystems:
    """Devices of the mounted local file systems.

    After the start and after each change of the table, no device counts as local until the thread
    has read the table.

    Raises:
        OSError: /proc is not mounted.
    """

    def __init__(self) -> None:
        # Opened at the start: later the process may be out of descriptors.
        self._table = Fd(os.open("/proc/self/mountinfo", os.O_RDONLY | os.O_CLOEXEC))
        self._changes = select.poll()
        self._changes.register(self._table, select.POLLPRI)
        self._poll_at = 0.0
        self._lock = threading.Condition()
        self._closed = False
        self._devices = _NONE
        self._changes_seen = 0
        #: Whether the table has been read since it last changed.
        self.is_current = False
        self._thread_runs = False
        self._start_thread()

    def devices(self) -> Set[Device]:
        """Return the devices of local file systems, without blocking."""
        now = monotonic()
        if now > self._poll_at:
            self._poll_at = now + _POLL_INTERVAL
            # The table has changed (proc(5), /proc/PID/mounts): device numbers may be reused.
            if self._changes.poll(0):
                with self._lock:
                    self._devices, self.is_current = _NONE, False
                    self._changes_seen += 1
            if not (self.is_current or self._thread_runs or self._closed):
                self._start_thread()
        return self._devices

    def close(self) -> None:
        """Close the table, after the thread has finished the page that it is reading."""
        self._closed = True
        with self._lock:
            self._lock.wait_for(lambda: not self._thread_runs)
        self._table.close()

    def _start_thread(self) -> None:
        self._thread_runs = True
        try:
            _thread.start_new_thread(self._read, ())
        except RuntimeError:  # no more threads: the next poll tries again
            self._thread_runs = False

    def _read(self) -> None:
        seen, began = self._changes_seen, monotonic()
        try:
            devices, pause = self._read_table(), 0.0
        except (OSError, MemoryError):  # no device counts as local until the next try
            devices, pause = _NONE, _RETRY_INTERVAL
        with self._lock:
            if seen != self._changes_seen:
                # The table changes often: leave the event loop as much time as this read took.
                pause = max(pause, monotonic() - began)
            elif not pause:
                self._devices, self.is_current = devices, True
            if pause:
                self._poll_at = monotonic() + pause
            self._thread_runs = False
            self._lock.notify_all()

    def _read_table(self) -> Set[Device]:
        # Each read(2) returns a page of the table, so this thread releases the GIL after about
        # thirty lines.
        with open(self._table.fileno(), "rb", closefd=False) as table:
            table.seek(0)
            lines = takewhile(lambda _: not self._closed, table)
            found = [match.groups() for match in map(_LINE.match, lines) if match is not None]
        return {
            (int(major), int(minor))
            for major, minor, kind in found
            if kind.decode("ascii", "replace") in LOCAL
        }
