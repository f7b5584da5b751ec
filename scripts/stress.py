"""Many concurrent clients, some of them hostile: ``make stress``.

All clients run random scenes against one daemon process at the same time.  After each step, a
client compares the daemon's replies and its open descriptors (``/proc/PID/fd``) with what the
client has stored.  The exit status is 1 if any comparison failed.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import signal
import socket
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from io import FileIO
from pathlib import Path
from typing import Any

import trio
from daemon import Broken, Daemon, end_on_sigterm, identity, leaves, run, running_daemon
from raw import RawClient, raw_connect

import qmpfd

#: Seconds after which a scene fails: a reply is lost.
_REPLY = 30.0

#: Failures that are printed in full: one fault may cause thousands.
_TOLD = 10

#: Most descriptors that one client needs, here and in the daemon: those of a scene, and a socket.
_FDS_A_CLIENT = 24

#: Invalid input; no item is a complete command.  ESC resets QEMU's parser.
_INVALID = (
    b"\x1b",
    b"\x00\xff\xfe",
    b"]]]}}}",
    b'{"execute": "add-fd"',
    b"{'execute': 'query-fdsets' 'id': 1}",
    b'{"execute": ["query-fdsets"]}',
    b'"\\ud800 is half of a pair"',
    b"[" * 2000,
    b'{"execute": "remove-fd", "arguments": {"fdset-id": "0"}}',
    b"\n" * 100,
)


@dataclass
class Stress:
    """State that all clients share.

    Args:
        daemon: the daemon.
        hubs: ids of the fd sets that exist all the time, and that all clients add to.
    """

    daemon: Daemon
    hubs: list[int] = field(default_factory=list)
    commands: Counter[str] = field(default_factory=Counter)
    scenes: Counter[str] = field(default_factory=Counter)
    broken: list[str] = field(default_factory=list)
    slowest: float = 0.0
    started: float = field(default_factory=time.monotonic)
    #: Whether the time is up: no further scene begins.
    over: bool = False

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started


@contextmanager
def new_file() -> Iterator[int]:
    """Make a file and yield its only descriptor."""
    fd = os.memfd_create("stress")
    try:
        yield fd
    finally:
        os.close(fd)


@dataclass
class Held:
    """A descriptor that a client has stored: fd set, opaque text, device and inode."""

    fdset_id: int
    opaque: str
    file: tuple[int, int]


class Player:
    """Runs one client after the other, all under one name.

    Args:
        stress: the shared state.
        number: the player's number, with which its opaque texts begin.
        seed: seed of the random choices.
    """

    def __init__(self, stress: Stress, number: int, seed: str) -> None:
        self._stress = stress
        self._daemon = stress.daemon
        self._name = f"client {number}: "
        self._random = random.Random(f"{seed}/{number}")
        self._texts = 0
        self._scenes: dict[str, Callable[[], Awaitable[None]]] = {
            "tidy": self._tidy,
            "at once": self._at_once,
            "pipelined": self._pipelined,
            "slow reader": self._slow_reader,
            "cancelled": self._cancelled,
            "died": self._died,
            "invalid input": self._invalid_input,
        }

    async def play(self) -> None:
        """Run scenes until the time is up."""
        while not self._stress.over:
            name = self._random.choice(list(self._scenes))
            try:
                with trio.move_on_after(_REPLY) as patience:
                    await self._scenes[name]()
                if patience.cancelled_caught:
                    raise Broken(f"not over after {_REPLY:g} s: a reply is lost")
            except Exception as exc:  # noqa: BLE001 - every exception is a failed scene
                causes = "; ".join(f"{type(e).__name__}: {e}" for e in leaves(exc))
                self._stress.broken.append(f"{self._name}{name}: {causes}")
                await trio.sleep(0.1)  # if the daemon has ended, every further scene fails at once
            self._stress.scenes[name] += 1
            await trio.lowlevel.checkpoint()

    # -- what must be true -------------------------------------------------------------------

    def _text(self) -> str:
        """Return a new opaque text."""
        self._texts += 1
        return f"{self._name}{self._texts}"

    def _check_held(self, held: Mapping[int, Held]) -> None:
        """Check that the daemon's descriptors refer to the files that were sent."""
        for fd, one in held.items():
            if self._daemon.file_behind(fd) != one.file:
                raise Broken(f"the daemon's descriptor {fd} is not the file that was added")

    def _check_gone(self, removed: Mapping[int, Held]) -> None:
        """Check that the daemon has closed the descriptors; it may have reused their numbers."""
        for fd, one in removed.items():
            if self._daemon.file_behind(fd) == one.file:
                raise Broken(f"the daemon's descriptor {fd} is still open after its removal")

    def _check_listing(self, listing: Any, held: Mapping[int, Held]) -> None:
        """Check a reply to ``query-fdsets``: its order, and that *held* is all of this client's."""
        ids = [fdset["fdset-id"] for fdset in listing]
        if ids != sorted(set(ids), reverse=True):
            raise Broken(f"sets are not listed by descending id: {ids}")
        fds = [fd["fd"] for fdset in listing for fd in fdset["fds"]]
        if len(fds) != len(set(fds)):
            raise Broken("a descriptor is listed twice")
        if not all(fdset["fds"] for fdset in listing):
            raise Broken("a set without descriptors is listed")
        if not set(self._stress.hubs) <= set(ids):
            raise Broken(f"a set that nobody has removed is gone: {self._stress.hubs} in {ids}")
        found = {
            fd["fd"]: (fdset["fdset-id"], fd["opaque"])
            for fdset in listing
            for fd in fdset["fds"]
            if fd.get("opaque", "").startswith(self._name)
        }
        wanted = {fd: (one.fdset_id, one.opaque) for fd, one in held.items()}
        if found != wanted:
            raise Broken(f"listed is {found}, but added was {wanted}")
        by_age = [fd for fdset_id in ids for fd in wanted if wanted[fd][0] == fdset_id]
        if list(found) != by_age:
            raise Broken(f"within a set, the oldest comes first: {by_age}, not {list(found)}")

    # -- orderly clients ---------------------------------------------------------------------

    @asynccontextmanager
    async def _client(self) -> AsyncGenerator[qmpfd.Client, None]:
        async with qmpfd.connect(self._daemon.socket) as client:
            yield client

    async def _execute(self, client: qmpfd.Client, command: str, **arguments: Any) -> Any:
        fds = arguments.pop("fds", ())
        members = {name.replace("_", "-"): value for name, value in arguments.items()}
        before = time.perf_counter()
        result = await client.execute(command, members, fds=fds)
        self._stress.slowest = max(self._stress.slowest, time.perf_counter() - before)
        self._stress.commands[command] += 1
        return result

    async def _add(self, client: qmpfd.Client, held: dict[int, Held], hub: int | None) -> None:
        text = self._text()
        arguments: dict[str, Any] = {"opaque": text}
        if hub is not None:
            arguments["fdset_id"] = hub
        with new_file() as fd:
            info = await self._execute(client, "add-fd", fds=[fd], **arguments)
            file = identity(os.fstat(fd))
        if hub is not None and info["fdset-id"] != hub:
            raise Broken(f"asked for set {hub}, got {info}")
        if info["fd"] in held:
            raise Broken(f"descriptor {info['fd']} was given out twice")
        held[info["fd"]] = Held(info["fdset-id"], text, file)

    async def _drop(self, client: qmpfd.Client, held: dict[int, Held], fd: int) -> None:
        """Remove a descriptor, or its whole fd set if that is the client's own."""
        one = held.pop(fd)
        if one.fdset_id not in self._stress.hubs and self._random.random() < 0.5:
            await self._execute(client, "remove-fd", fdset_id=one.fdset_id)
        else:
            await self._execute(client, "remove-fd", fdset_id=one.fdset_id, fd=fd)
        self._check_gone({fd: one})

    async def _open(self, client: qmpfd.Client, held: Mapping[int, Held], fd: int) -> None:
        """Open a descriptor and check that the duplicate refers to the file that was added."""
        with await client.open_fdset(held[fd].fdset_id, fd=fd) as opened:
            if identity(os.fstat(opened.fileno())) != held[fd].file:
                raise Broken(f"handed out for {fd} was not the file that was added")
            if os.get_inheritable(opened.fileno()):
                raise Broken("a descriptor was handed out without close-on-exec")
        self._stress.commands["open-fdset"] += 1

    def _where(self) -> int | None:
        """Choose the fd set of the next descriptor: a shared one, or a new one (None)."""
        return self._random.choice([None, *self._stress.hubs])

    async def _tidy(self) -> None:
        """Add, list, open and remove descriptors, one call after the other."""
        held: dict[int, Held] = {}
        async with self._client() as client:
            for _ in range(self._random.randint(1, 12)):
                if held and self._random.random() < 0.4:
                    await self._drop(client, held, self._random.choice(list(held)))
                else:
                    await self._add(client, held, self._where())
            self._check_held(held)
            self._check_listing(await self._execute(client, "query-fdsets"), held)
            for fd in list(held):
                await self._open(client, held, fd)
                await self._drop(client, held, fd)
            self._check_listing(await self._execute(client, "query-fdsets"), held)

    async def _at_once(self) -> None:
        """Add, open and remove descriptors from many tasks over one connection."""
        held: dict[int, Held] = {}
        async with self._client() as client:
            async with trio.open_nursery() as nursery:
                for _ in range(self._random.randint(2, 12)):
                    nursery.start_soon(self._add, client, held, self._where())
            self._check_held(held)
            async with trio.open_nursery() as nursery:
                for fd in list(held):
                    nursery.start_soon(self._open, client, held, fd)
            async with trio.open_nursery() as nursery:
                for fd in list(held):
                    nursery.start_soon(self._drop, client, held, fd)
            self._check_listing(await self._execute(client, "query-fdsets"), held)

    # -- clients in a hurry --------------------------------------------------------------------

    async def _pipelined(self) -> None:
        """Send commands without waiting: replies come in order, each for its own descriptor."""
        held: dict[int, Held] = {}
        async with raw_connect(self._daemon.socket) as client:
            await client.negotiate()
            with ExitStack() as files:
                sent: list[tuple[str, Held | None]] = []
                for number in range(self._random.randint(5, 30)):
                    kind = self._random.choice(["with", "with", "without", "name", "unknown"])
                    if kind == "with" and len(held) + number < _FDS_A_CLIENT - 6:
                        fd = files.enter_context(new_file())
                        hub = self._random.choice(self._stress.hubs)
                        one = Held(hub, self._text(), identity(os.fstat(fd)))
                        # add-fd takes one descriptor; the daemon must close the others, rather
                        # than leave them for the next add-fd.
                        fds = [fd] * self._random.randint(1, 3)
                        await client.ask("add-fd", number, fds=fds, fdset_id=hub, opaque=one.opaque)
                        sent.append(("with", one))
                    elif kind == "without":
                        await client.ask("add-fd", number, opaque=self._text())
                        sent.append((kind, None))
                    elif kind == "unknown":
                        await client.ask("remove-fd", number, fdset_id=1 << 40)
                        sent.append((kind, None))
                    else:
                        await client.ask("query-name", number)
                        sent.append(("name", None))
                for number, (kind, added) in enumerate(sent):
                    reply = await self._reply(client, number)
                    if added is not None:
                        held[_result(reply)["fd"]] = added
                    elif kind == "name":
                        _result(reply)
                    else:
                        _refused(reply, "FdNotSupplied" if kind == "without" else "FdNotFound")
            self._check_held(held)
            for fd, one in held.items():
                await client.ask("remove-fd", fd, fdset_id=one.fdset_id, fd=fd)
            await client.ask("query-fdsets", -1)
            for fd in held:
                _result(await self._reply(client, fd))
            self._check_gone(held)
            self._check_listing(_result(await self._reply(client, -1)), {})

    async def _reply(self, client: RawClient, request_id: int) -> dict[str, Any]:
        reply = await client.read()
        if reply.get("id") != request_id:
            raise Broken(f"a reply is lost or doubled: instead of id {request_id} came {reply}")
        self._stress.commands["pipelined, or after errors"] += 1
        return reply

    async def _slow_reader(self) -> None:
        """Send requests for more than the socket buffers, read late, and get every reply."""
        count = self._random.randint(5, 20)
        async with raw_connect(self._daemon.socket) as client:
            await client.negotiate()
            for number in range(count):
                await client.ask("query-fdsets", number)
            await trio.sleep(self._random.random())
            for number in range(count):
                self._check_listing(_result(await self._reply(client, number)), {})

    # -- clients that go in the middle -----------------------------------------------------------

    async def _cancelled(self) -> None:
        """Cancel the client's calls at a random point; answered commands have been executed."""
        held: dict[int, Held] = {}
        first = self._texts + 1
        with self._tether() as (end, over):
            async with self._client() as client:
                await self._execute(client, "getfd", fds=[end.fileno()], fdname="tether")
                end.close()
                with trio.move_on_after(self._random.random() * 0.2):
                    async with trio.open_nursery() as nursery:
                        for _ in range(8):
                            nursery.start_soon(self._add, client, held, self._where())
                            await trio.lowlevel.checkpoint()
            await over()
        await self._reap(first, {one.opaque for one in held.values()}, exactly=False)

    async def _died(self) -> None:
        """Disconnect without reading a reply: the daemon executes exactly the complete commands."""
        first = self._texts + 1
        complete: set[str] = set()
        with self._tether() as (end, over):
            async with raw_connect(self._daemon.socket) as client:
                if self._random.random() < 0.5:
                    await client.negotiate()
                else:
                    await client.ask("qmp_capabilities")
                await client.ask("getfd", fds=[end.fileno()], fdname="tether")
                end.close()
                for _ in range(self._random.randint(1, 8)):
                    with new_file() as fd:
                        text = self._text()
                        await client.ask("add-fd", fds=[fd], opaque=text)
                        complete.add(text)
                        # The reply is never read: the kernel closes its descriptor with the socket.
                        await client.ask("open-fdset", fdset_id=self._stress.hubs[0])
                if self._random.random() < 0.5:
                    with new_file() as fd:
                        bound = {"opaque": self._text(), "lifetime": "connection"}
                        await client.ask("add-fds", fds=[fd, fd], **bound)
                if self._random.random() < 0.5:
                    with new_file() as fd:
                        broken_off = (
                            f'{{"execute": "add-fd", "arguments": {{"opaque": "{self._text()}'
                        )
                        await client.send(broken_off.encode(), [fd])
            await over()
        await self._reap(first, complete, exactly=True)

    @contextmanager
    def _tether(self) -> Iterator[tuple[FileIO, Callable[[], Awaitable[None]]]]:
        """Yield a pipe's write end, and a function that waits until the daemon has closed it.

        The daemon closes the descriptors of ``getfd`` at the end of a connection, after all other
        clean-up.  The client sends the write end with ``getfd`` and closes its own: the read end
        then reports the end of the file when the daemon has finished with the connection.
        """
        reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        end = FileIO(writer, "wb")

        async def over() -> None:
            await trio.lowlevel.wait_readable(reader)
            assert os.read(reader, 1) == b""

        try:
            yield end, over
        finally:
            end.close()
            os.close(reader)

    async def _reap(self, first: int, must: set[str], *, exactly: bool) -> None:
        """Check and remove the descriptors of a client that has disconnected.

        Args:
            first: the number in its first opaque text.
            must: opaque texts of the descriptors that must be stored.
            exactly: whether the client may have no others.
        """
        may = {f"{self._name}{number}" for number in range(first, self._texts + 1)}
        async with self._client() as client:
            left = [
                (fdset["fdset-id"], fd["fd"], fd["opaque"])
                for fdset in await self._execute(client, "query-fdsets")
                for fd in fdset["fds"]
                if fd.get("opaque") in may
            ]
            found = {text for _, _, text in left}
            if exactly and found - must:
                raise Broken(f"carried out without being complete: {found - must}")
            if must - found:
                raise Broken(f"the client was gone, its commands are lost: {must - found}")
            for fdset_id, number, _ in left:
                await self._execute(client, "remove-fd", fdset_id=fdset_id, fd=number)
            self._check_listing(await self._execute(client, "query-fdsets"), {})

    async def _invalid_input(self) -> None:
        """Send invalid input with descriptors: the daemon replies with errors and continues."""
        async with raw_connect(self._daemon.socket) as client:
            await client.negotiate()
            for number in range(self._random.randint(1, 6)):
                with new_file() as fd:
                    fds = [fd] * self._random.randint(0, 5)
                    await client.send(self._random_input(), fds)
                await client.send(b"\x1b")  # resets the parser; the reply is one error
                await client.ask("query-name", number)
                while "id" not in (reply := await client.read()):
                    _refused(reply, None)
                if reply["id"] != number:
                    raise Broken(f"after invalid input, id {number} was asked and {reply} came")
                _result(reply)
                self._stress.commands["pipelined, or after errors"] += 1

    def _random_input(self) -> bytes:
        if self._random.random() < 0.5:
            return self._random.choice(_INVALID)
        return self._random.randbytes(self._random.randint(1, 3000))


def _result(reply: dict[str, Any]) -> Any:
    if "return" not in reply:
        raise Broken(f"refused without a reason: {reply}")
    return reply["return"]


def _refused(reply: dict[str, Any], error_class: str | None) -> None:
    found = reply.get("error", {}).get("class")
    if found is None or (error_class is not None and found != error_class):
        raise Broken(f"{error_class or 'an error'} was expected: {reply}")


# -- the run -------------------------------------------------------------------------------------


async def stress(daemon: Daemon, options: argparse.Namespace) -> int:
    """Run the clients and the final checks; return the exit status."""
    at_start = daemon.fd_count()
    shared = Stress(daemon)
    async with qmpfd.connect(daemon.socket) as client:
        before = await client.query_fdsets()
        for _ in range(3):
            with new_file() as fd:
                shared.hubs.append((await client.add_fd(fd, opaque="hub")).fdset_id)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_watch, shared, options)
        async with trio.open_nursery() as players:
            for number in range(options.clients):
                players.start_soon(Player(shared, number, options.seed).play)
        nursery.cancel_scope.cancel()
    elapsed = shared.elapsed
    if sys.stdout.isatty():
        print(end="\r\x1b[K")
    async with qmpfd.connect(daemon.socket) as client:
        for hub in shared.hubs:
            await client.remove_fd(hub)
        after = await client.query_fdsets()
    if after != before:
        shared.broken.append(f"all clients have removed theirs, but there is {after}")
    if not await daemon.settles_at(at_start):
        shared.broken.append(f"{at_start} descriptors at the start, {daemon.fd_count()} at the end")
    if b"failed" in daemon.log:
        shared.broken.append(f"the daemon tells of faults of its own: {daemon.said()[-2000:]}")
    _summarize(shared, options, elapsed, at_start)
    return 1 if shared.broken else 0


async def _watch(shared: Stress, options: argparse.Namespace) -> None:
    """Print the progress, and end the run when the time is up or the daemon has ended."""
    while True:
        await trio.sleep(0.25)
        if not os.path.exists(f"/proc/{shared.daemon.pid}/fd/0"):
            raise Broken(f"the daemon is gone: {shared.daemon.said()[-2000:]}")
        shared.over = shared.elapsed >= options.seconds
        if sys.stdout.isatty():
            line = (
                f"{shared.elapsed:4.0f} s  {options.clients} clients  "
                f"{shared.commands.total()} replies  "
                f"{shared.commands.total() / shared.elapsed:.0f}/s  "
                f"daemon: {shared.daemon.fd_count()} fds  broken: {len(shared.broken)}"
            )
            print(end=f"\r{line[:79]}\x1b[K", flush=True)


def _summarize(shared: Stress, options: argparse.Namespace, elapsed: float, at_start: int) -> None:
    print(f"{options.clients} clients in {elapsed:.1f} s, --seed {options.seed}")
    for what, counts in (("scenes", shared.scenes), ("replies", shared.commands)):
        print(f"\n{what + ' of clients' if what == 'scenes' else what:28}  count  per second")
        for name, count in sorted(counts.items()):
            print(f"  {name:26} {count:6} {count / elapsed:11.0f}")
        print(f"  {'all':26} {counts.total():6} {counts.total() / elapsed:11.0f}")
    print(f"\nslowest reply               {shared.slowest * 1000:6.0f} ms")
    print(f"daemon's descriptors        {shared.daemon.fd_count():6} now, {at_start} at the start")
    with open(f"/proc/{shared.daemon.pid}/status") as status:
        peak = next(line for line in status if line.startswith("VmHWM"))
    print(f"daemon's memory, at most    {int(peak.split()[1]) / 1024:6.0f} MiB")
    print(f"invariants broken           {len(shared.broken):6}")
    for text in shared.broken[:_TOLD]:
        print(f"  {text}")
    if len(shared.broken) > _TOLD:
        print(f"  and {len(shared.broken) - _TOLD} more")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[2])
    parser.add_argument(
        "--clients", type=int, default=200, metavar="N", help="at a time (default: 200)"
    )
    parser.add_argument(
        "--seconds", type=float, default=20.0, metavar="S", help="for how long (default: 20)"
    )
    parser.add_argument(
        "--seed",
        default=f"{random.SystemRandom().randrange(1_000_000)}",
        help="of the clients' random choices (default: a new one each time)",
    )
    parser.add_argument(
        "--socket",
        type=Path,
        metavar="PATH",
        help="a running daemon that nobody else uses (default: one of its own)",
    )
    options = parser.parse_args()
    if options.clients < 1 or options.seconds <= 0:
        parser.error("there must be at least one client, and some time")
    need = options.clients * _FDS_A_CLIENT + 100
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most != resource.RLIM_INFINITY and need > most:
        parser.error(f"{options.clients} clients need {need} descriptors, the limit is {most}")
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and need > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (need, most))
    return options


def _process_at(path: Path) -> Daemon:
    """Return the process of the daemon that listens at *path*."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.connect(os.fspath(path))
        packed = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid, _, _ = struct.unpack("3i", packed)
    return Daemon(path, pid)


async def main(options: argparse.Namespace) -> int:
    """Run against the daemon of ``--socket``, or against a new one; return the exit status."""
    status = 128 + signal.SIGTERM
    async with trio.open_nursery() as nursery:
        nursery.start_soon(end_on_sigterm, nursery.cancel_scope)
        if options.socket is not None:
            status = await stress(_process_at(options.socket), options)
        else:
            with tempfile.TemporaryDirectory(prefix="qmpfd-stress-") as name:
                room = f"--max-connections={2 * options.clients + 10}"
                async with running_daemon(Path(name, "qmpfd.sock"), room) as daemon:
                    status = await stress(daemon, options)
        nursery.cancel_scope.cancel()
    return status


if __name__ == "__main__":
    sys.exit(run(partial(main, _options())))
