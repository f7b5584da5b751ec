"""A server is restarted three times, and no connection to its listening socket is refused.

The socket is opened once and stored in the daemon.  Each server gets a duplicate from ``qmpfd
exec`` and exits on SIGTERM.  While no server runs, connections wait in the socket's backlog
(listen(2)): the kernel completes connections as long as any process has the socket open.  Clients
connect all the time, and each must get its reply.

    python scripts/story_restart.py
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections import Counter, defaultdict
from functools import partial
from itertools import count
from pathlib import Path
from time import perf_counter

import trio
from daemon import Broken, running_daemon
from story import QMPFD, check, run_story, say

import qmpfd

VISITORS = 8
RESTARTS = 3
#: Connections that each server must answer before the next one starts.
VISITS = 100
#: Seconds without any server.
GAP = 0.2

READY = b"serving\n"


# -- the server: this file, started with a generation as its argument --------------------------


async def serve(generation: str) -> None:
    """Answer each connection to descriptor 3 with *generation*; on SIGTERM stop accepting."""
    listener = trio.SocketListener(trio.socket.from_stdlib_socket(socket.socket(fileno=3)))

    async def answer(visitor: trio.SocketStream) -> None:
        async with visitor:
            question = await visitor.receive_some(100)
            await visitor.send_all(generation.encode() + b" " + question)

    with trio.open_signal_receiver(signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:  # ends when all accepted clients are answered
            with trio.CancelScope() as accepting:

                async def stop() -> None:
                    async for _ in signals:
                        accepting.cancel()
                        return

                nursery.start_soon(stop)
                os.write(1, READY)
                await trio.serve_listeners(answer, [listener], handler_nursery=nursery)


# -- the story ---------------------------------------------------------------------------------


class Visits:
    """Counts the answers that clients get, by server."""

    def __init__(self) -> None:
        self.of: Counter[str] = Counter()
        self.enough: defaultdict[str, trio.Event] = defaultdict(trio.Event)
        self.longest = 0.0

    async def visit(self, address: tuple[str, int]) -> None:
        """Connect repeatedly; a refused or broken connection ends the story."""
        for number in count():
            begin = perf_counter()
            async with await trio.open_tcp_stream(*address) as stream:
                await stream.send_all(b"%d" % number)
                answer = b"".join([part async for part in stream])
            generation, _, question = answer.decode().partition(" ")
            if question != str(number):
                raise Broken(f"{answer!r} is no answer to question {number}")
            self.longest = max(self.longest, perf_counter() - begin)
            self.of[generation] += 1
            if self.of[generation] == VISITS:
                self.enough[generation].set()


async def start_server(nursery: trio.Nursery, qmp: Path, generation: str) -> trio.Process:
    """Start a server with the socket of fd set 0; return when the server accepts."""
    command = [*QMPFD, "exec", f"--socket={qmp}", "0=3", "--", sys.executable, __file__, generation]
    start = partial(trio.run_process, command, stdout=subprocess.PIPE)
    server: trio.Process = await nursery.start(start)
    assert server.stdout is not None
    async with server.stdout:
        check(await server.stdout.receive_some() == READY, f"server {generation} has started")
    return server


async def story(folder: Path) -> None:
    """Store the listening socket, start the clients, and restart the server."""
    qmp = folder / "qmpfd.sock"
    async with running_daemon(qmp):
        with socket.create_server(("127.0.0.1", 0), backlog=1024) as listener:
            host, port = listener.getsockname()
            async with qmpfd.connect(qmp) as client:
                await client.add_fd(listener, opaque="listen:web")
        say(f"The listening socket {host}:{port} is in fd set 0. No server runs yet.")
        visits = Visits()
        async with trio.open_nursery() as nursery:
            for _ in range(VISITORS):
                nursery.start_soon(visits.visit, (host, port))
            for generation in map(str, range(1, RESTARTS + 2)):
                server = await start_server(nursery, qmp, generation)
                await visits.enough[generation].wait()
                server.terminate()
                check(
                    await server.wait() == 0,
                    "it received SIGTERM, answered its clients, and exited",
                )
                await trio.sleep(GAP)
            nursery.cancel_scope.cancel()
        total = sum(visits.of.values())
        check(len(visits.of) == RESTARTS + 1, f"{total} connections to {len(visits.of)} servers")
        check(True, "no connection was refused or cut off, and each got its own answer")
        check(
            visits.longest >= GAP,
            f"the longest took {visits.longest:.1f} s: it waited for the next server",
        )


if __name__ == "__main__":
    if len(sys.argv) > 1:
        trio.run(serve, sys.argv[1])
    else:
        sys.exit(run_story(story))
