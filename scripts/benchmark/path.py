"""Trace one add-fd through the daemon: Python calls, changes of file, and bytecodes.

    python scripts/benchmark/path.py [--list]

The daemon runs in this process, in a Trio nursery; a client in another task sends ``add-fd`` with a
descriptor.  The trace covers all tasks but the client's, from the arrival of the request until the
connection waits for the next one.  A call is a Python function of the package that is entered or,
as a coroutine, resumed; builtins, Trio and the standard library do not count.  A change of file is
a call into another file than the call before it.  The bytecodes are all those that the interpreter
executes, Trio's too: a measure of the command's cost in Python that needs no clock.
"""

from __future__ import annotations

import argparse
import array
import socket
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import trio
import trio.testing

import qmpfd
from qmpfd import limits

# Tracing slows requests down: the limits on time are raised to keep the usual path.
limits.LIGHT_SECONDS = limits.PASS_SECONDS = 10.0

#: Number of requests measured, after as many that warm up the daemon.
_REQUESTS = 20

_PACKAGE = str(Path(qmpfd.__file__).parent)


@dataclass(frozen=True)
class Call:
    """A function of the package that was entered or resumed.

    Args:
        file: the function's file, relative to the package.
        function: qualified name.
    """

    file: str
    function: str


@dataclass(frozen=True)
class Walk:
    """Trace of one request.

    Args:
        calls: the calls, in order.
        steps: number of times that the event loop ran a task of the daemon.
        bytecodes: number of bytecodes by folder of the package; ``Trio`` is all other code.
    """

    calls: tuple[Call, ...]
    steps: int
    bytecodes: tuple[tuple[str, int], ...] = ()

    @property
    def changes(self) -> int:
        """Number of calls into another file than the call before."""
        return sum(a.file != b.file for a, b in zip(self.calls, self.calls[1:], strict=False))


class _Recorder(trio.abc.Instrument):
    """Trio instrument that traces the steps of all tasks but *client*."""

    def __init__(self, client: trio.lowlevel.Task) -> None:
        self._client = client
        self.clear()

    def clear(self) -> None:
        """Begin a new trace."""
        self._calls: list[Call] = []
        self._steps = 0
        self._bytecodes: Counter[str] = Counter()

    def walk(self) -> Walk:
        """Return the trace since the last ``clear``."""
        return Walk(tuple(self._calls), self._steps, tuple(sorted(self._bytecodes.items())))

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        if task is not self._client:
            self._steps += 1
            sys.settrace(self._trace)

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        sys.settrace(None)

    def _trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        code = frame.f_code
        if code.co_filename == __file__:
            return None
        ours = code.co_filename.startswith(_PACKAGE)
        file = code.co_filename[len(_PACKAGE) + 1 :] if ours else "Trio"
        if event == "opcode":
            self._bytecodes[file.partition("/")[0]] += 1
        elif event == "call":
            frame.f_trace_opcodes = True
            if ours:
                name = getattr(code, "co_qualname", code.co_name)  # Python 3.11
                self._calls.append(Call(file, name))
        return self._trace


async def _ask(sock: trio.socket.SocketType, text: bytes, fds: Sequence[int] = ()) -> None:
    """Send one request, and wait for its reply.

    Raises:
        RuntimeError: the reply is an error.
    """
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    await sock.sendmsg([text], rights)
    reply = await sock.recv(1 << 16)
    if b'"return"' not in reply:
        raise RuntimeError(f"the daemon answers {reply!r}")


async def _record(path: Path) -> list[Walk]:
    walks: list[Walk] = []
    async with trio.open_nursery() as nursery:
        await nursery.start(qmpfd.serve, [path])
        with trio.socket.socket(socket.AF_UNIX) as sock, tempfile.TemporaryFile() as file:
            await sock.connect(str(path))
            await sock.recv(1 << 16)  # the greeting
            await _ask(sock, b'{"execute": "qmp_capabilities"}\n')
            recorder = _Recorder(trio.lowlevel.current_task())
            for number in range(2 * _REQUESTS):
                await trio.testing.wait_all_tasks_blocked()
                recorder.clear()
                trio.lowlevel.add_instrument(recorder)
                await _ask(sock, b'{"execute": "add-fd"}\n', [file.fileno()])
                await trio.testing.wait_all_tasks_blocked()
                trio.lowlevel.remove_instrument(recorder)
                if number >= _REQUESTS:
                    walks.append(recorder.walk())
                await _ask(sock, b'{"execute": "remove-fd", "arguments": {"fdset-id": 0}}\n')
        nursery.cancel_scope.cancel()
    return walks


def walk() -> Walk:
    """Return the most frequent trace: some requests do more, such as an ioctl(2) FIONREAD."""
    with tempfile.TemporaryDirectory(prefix="qmpfd-bench-") as folder:
        walks = trio.run(_record, Path(folder) / "socket")
    return Counter(walks).most_common(1)[0][0]


def main(arguments: list[str] | None = None) -> None:
    """Trace one add-fd and print the counts."""
    parser = argparse.ArgumentParser(prog="path.py", description="The path of one add-fd.")
    parser.add_argument("--list", action="store_true", help="name each call, in order")
    options = parser.parse_args(arguments)
    found = walk()
    if options.list:
        for call in found.calls:
            print(f"{call.file:32} {call.function}")
    for part, count in found.bytecodes:
        print(f"{count:6} bytecodes of {part}")
    print(f"{len(found.calls)} calls, {found.changes} changes of file, {found.steps} task steps")


if __name__ == "__main__":
    main()
