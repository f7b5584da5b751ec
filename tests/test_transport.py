"""FdStream: what one read takes from a socket, and what it leaves."""

from __future__ import annotations

import errno
import os
import socket
from array import array
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import pytest
import trio
from fake_kernel import SocketQueue, Tags
from helpers import open_fds, pipes, send_now
from hypothesis import example, given, settings
from protocol.test_receive_buffer import ITEMS, TAGS, Script, Server, carry_out, scripts
from trio.testing import MockClock

from qmpfd.commands import DECODER, VERSION
from qmpfd.kernel.fd import Fd, close_all
from qmpfd.limits import LIGHT_BYTES, SCM_MAX_FD
from qmpfd.protocol.request_decoder import Request
from qmpfd.protocol.server import ServerConnection
from qmpfd.transport import Arrival, FdStream

ADD = b'{"execute": "add-fd"}\n'
QUERY = b'{"execute": "query-name"}\n'


@contextmanager
def connected() -> Iterator[tuple[socket.socket, FdStream, ServerConnection]]:
    """Yield a client's socket, the server's stream, and its negotiated connection."""
    client, server = socket.socketpair()
    connection = ServerConnection(DECODER)
    connection.greeting(VERSION)
    connection.negotiate([])
    with client, FdStream(trio.socket.from_stdlib_socket(server)) as stream:
        yield client, stream, connection
        connection.close()
        close_all(connection.fds_to_close)


def taken(connection: ServerConnection) -> list[tuple[str, int]]:
    """Return the received commands with their numbers of descriptors."""
    found = []
    for request, _, fds in iter(connection.next_request, None):
        assert isinstance(request, Request)
        found.append((DECODER.names[type(request)], len(fds)))
        close_all(fds)
    return found


async def test_several_at_once() -> None:
    """One call receives at most *max_fds* descriptors; the rest stays in the socket."""
    with connected() as (client, stream, connection), pipes(5) as made:
        for pipe in made:
            send_now(client, QUERY + ADD, [pipe])
        for count, arrival in ((3, Arrival.SOME), (2, Arrival.ALL)):
            assert stream.receive_nowait(connection, max_fds=lambda: 3) is arrival
            assert taken(connection) == [("query-name", 0), ("add-fd", 1)] * count
        assert stream.receive_nowait(connection, max_fds=lambda: 3) is Arrival.NOTHING


async def test_no_more_than_a_few_bytes_at_once() -> None:
    """A read takes a limited number of bytes: decoding more would delay other clients."""
    with connected() as (client, stream, connection), pipes(5) as made:
        for pipe in made:
            send_now(client, QUERY * 100 + ADD, [pipe])
        assert stream.receive_nowait(connection, LIGHT_BYTES, max_fds=lambda: 5) is Arrival.SOME
        assert len(taken(connection)) == 202


async def test_one_after_the_other() -> None:
    """A request that comes alone is received with Arrival.ALL: the socket is empty."""
    with connected() as (client, stream, connection), pipes(30) as made:
        for pipe in made:
            send_now(client, ADD, [pipe])
            assert stream.receive_nowait(connection, max_fds=lambda: 16) is Arrival.ALL
            assert taken(connection) == [("add-fd", 1)]
        for pipe in made:
            send_now(client, ADD, [pipe])
        found = []
        while stream.receive_nowait(connection, max_fds=lambda: 16) is not Arrival.NOTHING:
            found += taken(connection)
        assert found == [("add-fd", 1)] * 30


async def test_nothing_is_left_where_more_can_be_seen() -> None:
    """A request on the slow path, because of an escape, is read to its end in several steps."""
    with connected() as (client, stream, connection), pipes(1) as made:
        request_id = b"\\u0041" + b"x" * 3000
        send_now(client, ADD + b'{"execute": "query-name", "id": "%b"}' % request_id, made)
        found = []
        while stream.receive_nowait(connection) is not Arrival.NOTHING:
            found.append(taken(connection))
        assert found[0] == [("add-fd", 1)]
        assert found[-1] == [("query-name", 0)]
        assert len(found) > 2


async def test_the_peer_is_gone() -> None:
    """All data comes before the end of the connection."""
    with connected() as (client, stream, connection), pipes(1) as made:
        send_now(client, ADD, made)
        client.close()
        assert stream.receive_nowait(connection, max_fds=lambda: 16) is Arrival.ALL
        assert taken(connection) == [("add-fd", 1)]
        assert stream.receive_nowait(connection, max_fds=lambda: 16) is Arrival.END


class _Failing:
    """A socket whose first sends fail."""

    def __init__(self, sock: socket.socket, errors: list[int]) -> None:
        self._sock = sock
        self._errors = errors

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)

    def _fail(self) -> None:
        if self._errors:
            number = self._errors.pop()
            raise OSError(number, os.strerror(number))

    def send(self, *arguments: Any) -> int:
        self._fail()
        return self._sock.send(*arguments)

    def sendmsg(self, *arguments: Any) -> int:
        self._fail()
        return self._sock.sendmsg(*arguments)


@pytest.mark.parametrize("count", [0, 1])
async def test_the_kernel_has_no_memory_to_send(count: int, autojump_clock: MockClock) -> None:
    """A send that fails with ENOBUFS or ENOMEM (sendmsg(2)) is retried later."""
    with connected() as (client, stream, _), pipes(1) as made:
        errors = [errno.ENOBUFS, errno.ENOMEM] * 2
        stream.socket = _Failing(stream.socket, errors)  # type: ignore[assignment]
        await stream.send_all(b"reply", made[:count])
        assert not errors
        data, control, _, _ = client.recvmsg(100, 100)
        assert data == b"reply"
        assert len(control) == count
        for _, _, payload in control:
            Fd(*array("i", payload)).close()


async def test_no_more_while_some_wait() -> None:
    """A connection never has more pending descriptors than those of two messages."""
    with connected() as (client, stream, connection), pipes(1) as made:
        for count in (SCM_MAX_FD, 1, 1, SCM_MAX_FD, SCM_MAX_FD):
            send_now(client, b" ", made * count)
        before = len(open_fds())
        while stream.receive_nowait(connection, max_fds=lambda: 16) is not Arrival.NOTHING:
            assert len(open_fds()) - before <= 2 * SCM_MAX_FD
            assert taken(connection) == []
            close_all(connection.fds_to_close)
            connection.fds_to_close.clear()
        assert connection.waiting_fds == SCM_MAX_FD


class _Received(Server):
    """Server of test_receive_buffer.py that reads with the transport."""

    def __init__(self, queue: SocketQueue, tags: Tags) -> None:
        super().__init__(queue, tags)
        sock = queue.detach_receiver()
        self._stream = FdStream(trio.socket.from_stdlib_socket(sock))

    def receive(self, most: int) -> bool:
        arrival = self._stream.receive_nowait(self.connection, max_fds=lambda: most)
        return arrival is not Arrival.NOTHING

    def close(self) -> None:
        super().close()
        self._stream.close()


_TAKE, _BLANK = ITEMS[0], ITEMS[13]
_END = len(_TAKE.data(0))
#: The socket holds only a command, and a blank with a descriptor behind it.
_FD_ON_BLANK = Script([_TAKE, _BLANK, _TAKE], [_END, _END + 1], [0, 1, 0], [0, 1, 0])


@given(scripts())
@example(_FD_ON_BLANK)
@settings(max_examples=500, deadline=None)
def test_which_command_gets_which_fd(script: Script) -> None:
    """The rule of docs/differences-from-qemu.md holds however the bytes are split and read."""

    async def received() -> list[tuple[int | None, list[int]]]:
        with closing(Tags(TAGS)) as tags:
            return carry_out(script, _Received(SocketQueue(), tags))

    assert trio.run(received) == script.expected()
