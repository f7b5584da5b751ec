"""The relay of ``qmpfd tap``, in Trio."""

from __future__ import annotations

import array
import os
import socket
import sys
import textwrap
from collections.abc import AsyncGenerator, Callable
from contextlib import ExitStack, asynccontextmanager, suppress
from functools import partial
from typing import TypeAlias

import trio

from ..kernel.fd import Fd
from ..kernel.unix_address import bind, connectable, is_abstract
from ..limits import SCM_MAX_FD
from .output import painter, print_error, printable, terminal_width

#: Told of each line: whether the client sent it, the line, how many descriptors went with it.
Show: TypeAlias = Callable[[bool, str, int], None]

_ROOM = socket.CMSG_SPACE(SCM_MAX_FD * array.array("i").itemsize)

paint = painter()
WIDTH = max(40, min(80, terminal_width()))


def show(from_client: bool, line: str, fds: int) -> None:
    """Print a line of the wire, folded to the terminal's width."""
    arrow, style = ("->", "36") if from_client else ("<-", "32")
    for part in textwrap.wrap(printable(line), WIDTH - 5, break_on_hyphens=False) or [""]:
        print(f"  {paint(style, f'{arrow} {part}')}")
        arrow = "  "
    if fds:
        print("     " + paint("33", f"+ {fds} descriptor{'s' if fds > 1 else ''}, by SCM_RIGHTS"))
    sys.stdout.flush()


async def _carry(
    source: trio.socket.SocketType,
    sink: trio.socket.SocketType,
    shown: Callable[[str, int], None],
) -> None:
    """Pass on all that *source* sends, line by line to *shown* as well."""
    unfinished, fds_of_line = b"", 0
    with suppress(ConnectionError):  # one side has gone without reading all
        while True:
            data, control, _, _ = await source.recvmsg(65536, _ROOM, socket.MSG_CMSG_CLOEXEC)
            if not data:
                break
            fds = array.array("i")
            for level, kind, payload in control:
                if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                    fds.frombytes(payload)
            with ExitStack() as received:
                for fd in fds:
                    received.enter_context(Fd(fd))
                *lines, unfinished = (unfinished + data).split(b"\n")
                # A read ends after the bytes that descriptors came with: they are its last line's.
                fds_of_line += len(fds)
                for number, line in enumerate(lines, 1):
                    text = line.decode(errors="replace").rstrip("\r")
                    shown(text, fds_of_line if number == len(lines) else 0)
                fds_of_line = 0 if lines else fds_of_line
                rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)] if fds else []
                while data:
                    data = data[await sink.sendmsg([data], rights) :]
                    rights = []
    with suppress(OSError):  # it is gone already
        sink.shutdown(socket.SHUT_WR)


async def _relay(server: str, shown: Show, accepted: trio.SocketStream) -> None:
    client = accepted.socket
    with client, trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as upstream:
        try:
            with connectable(server) as address:
                await upstream.connect(address)
        except OSError as exc:
            print_error(f"qmpfd: cannot connect to {printable(server)}: {exc.strerror}")
            return
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_carry, client, upstream, partial(shown, True))
            nursery.start_soon(_carry, upstream, client, partial(shown, False))


@asynccontextmanager
async def tapped(
    server: str | os.PathLike[str], listen: str | os.PathLike[str], shown: Show = show
) -> AsyncGenerator[None, None]:
    """Listen at *listen*, relay each client to *server*, and show the lines of both.

    Ends when its clients have gone, so that all their lines are shown.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        bind(sock, listen)
        sock.listen()
        try:
            listener = trio.SocketListener(trio.socket.from_stdlib_socket(sock))
            relay = partial(_relay, os.fspath(server), shown)
            async with trio.open_nursery() as relays, trio.open_nursery() as accepting:
                await accepting.start(
                    partial(trio.serve_listeners, relay, [listener], handler_nursery=relays)
                )
                yield
                accepting.cancel_scope.cancel()
        finally:
            if not is_abstract(listen):
                os.unlink(listen)


def run(listen: str, server: str) -> None:
    """Tap until interrupted.

    Raises:
        OSError: *listen* cannot be made.
        KeyboardInterrupt: interrupted.
    """

    async def main() -> None:
        async with tapped(server, listen):
            await trio.sleep_forever()

    try:
        trio.run(main)
    except* KeyboardInterrupt:  # in the groups of the nurseries
        pass
    raise KeyboardInterrupt
