"""Fake service manager with a file-descriptor store, with the rules of systemd 252 and later.

The rules are those of src/core/service.c (service_add_fd_store, service_remove_fd_store,
service_notify_message) and manager.c (manager_process_barrier_fd), including the surprising ones:

* a second descriptor of a stored open file description is dropped silently;
* so are descriptors beyond FileDescriptorStoreMax=, and those sent with FDSTOREREMOVE=1;
* an invalid name becomes "stored";
* with FDPOLL=1, and without FDPOLL=, a descriptor is watched by an epoll instance from before the
  next message is read, and closed on POLLHUP and POLLERR;
* from version 254 on, what is dropped or removed is closed in the background, at any later time;
* only BARRIER=1 is acknowledged, and must be the only line, with one descriptor;
* the service gets the stored descriptors in no defined order.
"""

from __future__ import annotations

import os
import random
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from helpers import ROOT
from supervised import COMMAND, DEADLINE, until

from qmpfd.kernel.fd import Fd, close_all, pipe, poll, receive, send
from qmpfd.kernel.file_descriptions import compare

#: Program that moves the descriptors to 3 and up, sets $LISTEN_FDS, and executes the service.
_LAUNCH = """
import os, sys
count = int(sys.argv[1]); fds = list(map(int, sys.argv[2:2 + count]))
high = [os.dup(fd) for fd in fds]
import fcntl
high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 1000) for fd in high]
os.closerange(3, 1000)
for at, fd in enumerate(high, 3): os.dup2(fd, at)
if count:
    os.environ["LISTEN_PID"] = str(os.getpid())
    os.environ["LISTEN_FDS"] = str(count)
os.execv(sys.argv[2 + count], sys.argv[2 + count:])
"""


#: $INVOCATION_ID of the service.
INVOCATION = "0123456789abcdef0123456789abcdef"


def good_name(name: str) -> bool:
    """Return whether systemd accepts a name: its fdname_is_valid()."""
    return 0 < len(name) <= 255 and all(" " <= char < "\x7f" and char != ":" for char in name)


class Store:
    """The manager of one service.

    Args:
        folder: folder of its socket.
        size: FileDescriptorStoreMax=.
        watches: whether it watches descriptors, as systemd does.
        closes: whether it closes what it drops at once; else once there are no messages.
    """

    def __init__(self, folder: Path, size: int, *, watches: bool, closes: bool) -> None:
        self.path = folder / "notify"
        self.size = size
        self._epoll = select.epoll() if watches else None
        self._closes = closes
        self._unclosed: list[Fd] = []
        self.seed = 0
        self.told: list[str] = []
        self.traps: list[str] = []  # messages that systemd would drop or change, and why
        self.barriers = 0
        self._paused = self._stands = False
        self._kept: list[tuple[str, Fd, bool]] = []
        self._lock = threading.Lock()
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._sock.bind(str(self.path))
        self._sock.settimeout(0.05)
        self._over = False
        self._thread = threading.Thread(target=self._work)
        self._thread.start()

    def close(self) -> None:
        """End the manager, and close all stored descriptors."""
        self._over = True
        self._thread.join()
        self._sock.close()
        close_all([*(fd for _, fd, _ in self._kept), *self._unclosed])
        if self._epoll is not None:
            self._epoll.close()

    def pause(self, pause: bool = True) -> None:
        """Stop processing messages, as on SIGSTOP, or continue."""
        self._paused = pause
        until(lambda: self._stands == pause)

    def lower(self, size: int) -> None:
        """Lower FileDescriptorStoreMax=, as by daemon-reload: the oldest descriptors are closed."""
        with self._lock:
            self.size = size
            for entry in self._kept[:-size]:
                self._remove(entry)

    def sync(self) -> None:
        """Wait until all messages sent so far are processed."""
        with closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as sock:
            sock.connect(str(self.path))
            reader, writer = pipe()
            with reader:
                with writer:
                    send(sock, b"BARRIER=1", [writer])
                until(lambda: poll(reader))

    # -- the protocol --------------------------------------------------------------------------

    def _work(self) -> None:
        while not self._over:
            self._stands = self._paused
            if self._stands:
                time.sleep(0.01)
                continue
            try:
                data, fds, dropped = receive(self._sock, 65536)
            except TimeoutError:
                close_all(self._unclosed)
                self._unclosed.clear()
            else:
                assert not dropped
                with self._lock:
                    self._do(data.decode().split("\n"), fds)
            with self._lock:
                self._poll()

    def _do(self, lines: list[str], fds: list[Fd]) -> None:
        if "BARRIER=1" in lines:
            if len(lines) == 1 and len(fds) == 1:
                self.barriers += 1
            else:
                self.traps.append("a barrier that is not alone")
            close_all(fds)
            return
        values = dict(line.partition("=")[::2] for line in lines if "=" in line)
        name = values.get("FDNAME", "stored")
        if "FDNAME" in values and not good_name(name):
            self.traps.append(f"a bad name: {name}")
            name = "stored"
        if values.get("FDSTOREREMOVE") == "1":
            if fds:
                self.traps.append("descriptors with a removal")
            for entry in [entry for entry in self._kept if entry[0] == name]:
                self._remove(entry)
        elif values.get("FDSTORE") == "1":
            while fds:
                self._add(name, fds.pop(0), values.get("FDPOLL") != "0")
        self.told += [line for line in lines if not line.startswith("FD")]
        close_all(fds)

    def _add(self, name: str, fd: Fd, polled: bool) -> None:
        if len(self._kept) >= self.size:
            self.traps.append(f"no room for {name}")
        elif any(compare(other.fileno(), fd.fileno()) == 0 for _, other, _ in self._kept):
            self.traps.append(f"a copy: {name}")
        else:
            if polled and self._epoll is not None:
                with suppress(PermissionError):  # a file that cannot be polled
                    self._epoll.register(fd, 0)
            self._kept.append((name, fd, polled))
            return
        self._close(fd)

    def _remove(self, entry: tuple[str, Fd, bool]) -> None:
        _, fd, polled = entry
        self._kept.remove(entry)
        if polled and self._epoll is not None:
            with suppress(FileNotFoundError):  # a file that cannot be polled
                self._epoll.unregister(fd)
        self._close(fd)

    def _close(self, fd: Fd) -> None:
        if self._closes:
            fd.close()
        else:
            self._unclosed.append(fd)

    def _poll(self) -> None:
        ready = {number for number, _ in self._epoll.poll(0)} if self._epoll is not None else ()
        for entry in [entry for entry in self._kept if entry[1].fileno() in ready]:
            self._remove(entry)

    # -- the service ---------------------------------------------------------------------------

    @property
    def names(self) -> list[str]:
        """Names of the stored descriptors."""
        with self._lock:
            return [name for name, _, _ in self._kept]

    def put(self, name: str, fd: Fd) -> None:
        """Store *fd*; the store owns it from now on."""
        with self._lock:
            self._kept.append((name, fd, False))

    def take(self, name: str) -> Fd:
        """Return a duplicate of the descriptor with that name."""
        with self._lock:
            return next(fd.dup() for each, fd, _ in self._kept if each == name)

    def lose(self, name: str) -> None:
        """Drop a descriptor silently."""
        with self._lock:
            self._remove(next(entry for entry in self._kept if entry[0] == name))

    def until(self, line: str, count: int = 1) -> None:
        """Wait until *count* messages with a line that begins with *line* have come."""
        until(lambda: sum(each.startswith(line) for each in list(self.told)) >= count, line)

    @contextmanager
    def service(
        self,
        *options: str,
        sockets: Sequence[tuple[str, socket.socket]] = (),
        env: Mapping[str, str] | None = None,
        ready: bool = True,
        expected: int | None = 0,
    ) -> Iterator[subprocess.Popen[bytes]]:
        """Start the service with all stored descriptors; end it at the end of the block."""
        with self._lock:
            given = [(name, fd.fileno()) for name, fd, _ in self._kept]
            given += [(name, sock.fileno()) for name, sock in sockets]
            random.Random(self.seed).shuffle(given)
            self.seed += 1
            numbers = [number for _, number in given]
            environment = {
                **os.environ,
                "NOTIFY_SOCKET": str(self.path),
                "FDSTORE": str(self.size),
                "INVOCATION_ID": INVOCATION,
                **(env or {}),
            }
            if given:
                environment["LISTEN_FDNAMES"] = ":".join(name for name, _ in given)
            before = self.told.count("READY=1")
            launch = [sys.executable, "-I", "-S", "-c", _LAUNCH, str(len(given))]
            process = subprocess.Popen(
                [*launch, *map(str, numbers), *COMMAND, *options],
                cwd=ROOT,
                env=environment,
                pass_fds=numbers,
                stderr=subprocess.PIPE,
            )
        try:
            if ready:
                until(lambda: process.poll() is not None or self.told.count("READY=1") > before)
            yield process
            if process.poll() is None:
                process.terminate()
        except BaseException:
            process.kill()
            raise
        finally:
            _, errors = process.communicate(timeout=DEADLINE)
            sys.stderr.write(errors.decode())  # shown with a test that fails
        assert b"Traceback" not in errors, errors.decode()
        if expected is not None:
            assert process.returncode == expected, errors.decode()


@contextmanager
def fake_store(
    folder: Path, size: int = 512, *, watches: bool = True, closes: bool = True
) -> Iterator[Store]:
    """Run a manager, see :class:`Store`; close its stored descriptors at the end."""
    store = Store(folder, size, watches=watches, closes=closes)
    try:
        yield store
    finally:
        store.close()
