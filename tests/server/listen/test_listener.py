"""Socket files: made again when they are lost, and removed at the end.

Tests of server/listen/accept.py.
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
from contextlib import ExitStack, closing
from pathlib import Path

import trio
from helpers import Wire, daemon, daemon_process, pipes, request, value

from qmpfd.client.blocking import connect_blocking
from qmpfd.kernel.fd import Fd, close_all
from qmpfd.limits import TAKEOVER_FORMAT
from qmpfd.server.listen.listener import UnixListener


def other_program(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.bind(os.fspath(path))
    sock.listen()
    return sock


# -- whose file it is --------------------------------------------------------------------------


async def test_another_programs_file_stays(path: Path) -> None:
    with daemon_process(path) as process:
        path.unlink()
        with other_program(path):
            process.signal(signal.SIGTERM)
            assert process.wait() == 0
            assert path.exists()
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
                client.connect(os.fspath(path))
    path.unlink()


async def test_sighup_binds_a_lost_file_again(path: Path) -> None:
    """The new file has the old mode; clients of the old socket are served too."""
    with daemon_process(path, "--socket-mode", "640") as process, ExitStack() as stack:
        old = stack.enter_context(await Wire.session(path))
        path.unlink()
        process.signal(signal.SIGHUP)
        process.await_line(lambda line: "was missing: made it again" in line)
        assert path.stat().st_mode & 0o777 == 0o640
        new = stack.enter_context(await Wire.session(path))
        for wire in (old, new):
            assert value(await wire.call("query-fdsets")) == []
        process.signal(signal.SIGHUP)  # the file is in place: no new socket
        process.await_line(lambda line: "there is no policy file" in line)
        process.signal(signal.SIGHUP)
        process.await_line(lambda line: "there is no policy file" in line)
        assert not any("was missing: made it again" in line for line in process.log[-2:])
        process.signal(signal.SIGTERM)
        assert process.wait() == 0
        assert not path.exists()


async def test_the_backlog_of_a_replaced_socket_is_served(path: Path) -> None:
    """Clients in the backlog of a socket that is replaced are served."""
    async with daemon(path) as server:
        [listener] = server.listeners
        number = listener.socket.fileno()
        with ExitStack() as stack:
            before, after = (stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(2))
            before.connect(os.fspath(path))
            path.unlink()
            await server.bind_lost_sockets()
            after.connect(os.fspath(path))
            assert listener.socket.fileno() == number
            for client in (before, after):
                with trio.socket.from_stdlib_socket(client.dup()) as sock:
                    assert await sock.recv(1) == b"{"


async def test_sighup_while_a_takeover_is_under_way(path: Path) -> None:
    """The successor gets the old socket; if the takeover fails, the daemon binds the file again."""
    with daemon_process(path) as process:
        with connect_blocking(path) as successor:
            _, passed = successor.request("takeover", {"format": TAKEOVER_FORMAT})
            close_all(passed)
            path.unlink()
            process.signal(signal.SIGHUP)
            process.await_line(lambda line: "there is no policy file" in line)
            assert not path.exists()
        process.await_line(lambda line: "made it again" in line)
        with connect_blocking(path) as client:
            assert client.query_fdsets() == []


async def test_sighup_leaves_another_programs_file(path: Path) -> None:
    with daemon_process(path) as process:
        old = await Wire.session(path)
        path.unlink()
        with old, other_program(path) as other:
            process.signal(signal.SIGHUP)
            line = process.await_line(lambda line: "cannot listen on" in line)
            assert "already listening" in line
            assert value(await old.call("query-fdsets")) == []
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
                client.connect(os.fspath(path))
                other.accept()[0].close()
    path.unlink()


async def test_quit_removes_the_file_first(path: Path) -> None:
    """A client that has read the reply to quit can start another daemon at the path."""
    with pipes(1) as made:
        async with daemon(path):
            with await Wire.session(path) as wire:
                await wire.call("add-fd", None, made)
                wire.send(request("quit"))
                assert await wire.reply() == {"return": {}}
                assert not path.exists()
                assert await wire.rest() == []


# -- a service manager's -----------------------------------------------------------------------


async def test_options_of_a_service_managers_socket() -> None:
    """Options such as PassCredentials= are unset: they add a control message to every read, and
    SO_PASSPIDFD (Linux 6.5) a descriptor.
    """
    options = {socket.SO_PASSCRED: 0, 34: 0, 76: 0, 83: 1}  # as in listener.py
    name = f"\0qmpfd-test-{secrets.token_hex(8)}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as theirs:
        theirs.bind(name)
        known = {}
        for option, wanted in options.items():
            try:
                theirs.setsockopt(socket.SOL_SOCKET, option, 1 - wanted)
            except OSError:  # an older kernel
                continue
            known[option] = wanted
        theirs.listen()
        with (
            closing(UnixListener.inherit(Fd(os.dup(theirs.fileno())))) as listener,
            socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client,
        ):
            client.connect(name)
            await listener.wait_readable()
            with listener.accept_nowait() as accepted:
                found = {o: accepted.getsockopt(socket.SOL_SOCKET, o) for o in known}
                assert found == known
                client.sendall(b"x")
                data, control, flags, _ = await accepted.recvmsg(1, 4096)
                assert (data, control, flags) == (b"x", [], 0)
        for option, wanted in known.items():  # the manager's socket keeps its options
            assert theirs.getsockopt(socket.SOL_SOCKET, option) == 1 - wanted
