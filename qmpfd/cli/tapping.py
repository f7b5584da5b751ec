"""The relay of ``qmpfd tap``, in Trio."""

from __future__ import annotations

import os
import socket
import sys
import textwrap
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TypeAlias

import trio

from ..kernel.binding import identity, listen_at
from ..kernel.fd import close_all, receive
from ..kernel.unix_address import connectable
from ..limits import READ_BYTES
from ..transport import FdStream
from .exit_codes import cause
from .output import painter, print_error, printable, terminal_width

#: Called for each line: whether the client sent it, the line, its number of descriptors.
Show: TypeAlias = Callable[[bool, str, int], None]

#: Errors of a relay after one side has closed its connection with unread data.
_DISCONNECTED = (ConnectionError, trio.BrokenResourceError)

paint = painter()
WIDTH = max(40, min(80, terminal_width()))


def show(from_client: bool, line: str, fds: int) -> None:
    """Print a line, folded to the terminal's width."""
    arrow, style = ("->", "36") if from_client else ("<-", "32")
    for part in textwrap.wrap(printable(line), WIDTH - 5, break_on_hyphens=False) or [""]:
        print(f"  {paint(style, f'{arrow} {part}')}")
        arrow = "  "
    if fds:
        print("     " + paint("33", f"+ {fds} descriptor{'s' if fds > 1 else ''}, by SCM_RIGHTS"))
    sys.stdout.flush()


async def _carry(source: FdStream, sink: FdStream, shown: Callable[[str, int], None]) -> None:
    """Relay bytes and descriptors from *source* to *sink*, and call *shown* for each line.  If the
    kernel has dropped descriptors, end: *sink* would take the rest for all.
    """
    unfinished, fds_of_line = b"", 0
    while True:
        try:
            await source.wait_readable()
            data, fds, lost = receive(source.socket, READ_BYTES)
        except _DISCONNECTED:
            break
        try:
            if lost:
                print_error(f"qmpfd: descriptors were lost, and their connection is closed: {lost}")
            if not data or lost:
                break
            *lines, unfinished = (unfinished + data).split(b"\n")
            # recvmsg(2) stops after bytes sent with descriptors: they belong to the last line.
            fds_of_line += len(fds)
            for number, line in enumerate(lines, 1):
                text = line.decode(errors="replace").rstrip("\r")
                shown(text, fds_of_line if number == len(lines) else 0)
            fds_of_line = 0 if lines else fds_of_line
            try:
                await sink.send_all(data, fds)
            except _DISCONNECTED:
                break
        finally:
            close_all(fds)
    with suppress(OSError):  # the connection is closed already
        sink.socket.shutdown(socket.SHUT_WR)


async def _relay(server: str, shown: Show, accepted: trio.SocketStream) -> None:
    sock = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with FdStream(accepted.socket) as client, FdStream(sock) as upstream:
        try:
            with connectable(server) as address:
                await sock.connect(address)
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

    The block's end waits until all clients have disconnected: all their lines are shown.
    """
    path = Path(listen)
    try:
        sock, file = listen_at(path)
    except OSError as exc:
        raise OSError(exc.errno, f"cannot listen on {path}: {exc.strerror}") from None
    with sock:
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
            if file is not None and identity(path) == file:
                os.unlink(path)


def run(listen: str, server: str) -> None:
    """Relay until interrupted.

    Raises:
        OSError: *listen* cannot be bound, or the output fails.
        KeyboardInterrupt: on SIGINT.
    """

    async def main() -> None:
        async with tapped(server, listen):
            await trio.sleep_forever()

    try:
        trio.run(main)
    except BaseExceptionGroup as group:
        raise cause(group) from None
