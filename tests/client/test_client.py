"""The Trio client: with the daemon, a real QEMU, and faulty servers.

Tests of client/calls.py and client/connection.py.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from pathlib import Path

import pytest
import trio
from conformance.peers import qemu_at
from fakes import ask, fake_server, negotiate
from helpers import PATIENCE, ROOT, Pipe, Wire, daemon, open_fds, pipes, settle

import qmpfd

# -- against the daemon ------------------------------------------------------------------------


async def test_a_session(path: Path) -> None:
    async with daemon(path), qmpfd.connect(path) as client:
        assert client.greeting["version"]["package"] == f"qmpfd {qmpfd.__version__}"
        with pipes(2) as made:
            info = await client.add_fd(made[0], opaque="first")
            other = await client.add_fd(made[1].fileno(), info.fdset_id)
            for pipe in made:
                pipe.release()
            assert info.fdset_id == other.fdset_id == 0
            [fdset] = await client.query_fdsets()
            assert [(fd.fd, fd.opaque) for fd in fdset.fds] == [
                (info.fd, "first"),
                (other.fd, None),
            ]
            await client.remove_fd(0, info.fd)
            assert [pipe.held() for pipe in made] == [False, True]
            await client.remove_fd(0)
            assert [pipe.held() for pipe in made] == [False, False]
            assert await client.query_fdsets() == []
        version = await client.execute("query-version")
        assert version["package"] == f"qmpfd {qmpfd.__version__}"


async def test_errors_are_exceptions(path: Path) -> None:
    async with daemon(path), qmpfd.connect(path) as client:
        with pytest.raises(qmpfd.FdNotFound, match="'fdset-id:7' not found") as not_found:
            await client.remove_fd(7)
        assert not_found.value.error_class == "FdNotFound"
        assert str(not_found.value) == not_found.value.desc
        with pytest.raises(qmpfd.FdNotSupplied, match="No file descriptor supplied"):
            await client.execute("add-fd")
        with Pipe() as pipe, pytest.raises(qmpfd.InvalidParameterValue, match="existing"):
            await client.add_fd(pipe, 7)
        with pytest.raises(qmpfd.CommandNotFound, match="no-such"):
            await client.execute("no-such")
        with pytest.raises(qmpfd.GenericError, match="is missing"):
            await client.execute("remove-fd")
        with pytest.raises(qmpfd.GenericError, match="expected: integer"):
            await client.execute("remove-fd", {"fdset-id": "7"})
        # The errors do not affect the connection.
        assert await client.query_fdsets() == []


async def test_an_error_of_another_class(path: Path) -> None:
    async def script(wire: Wire) -> None:
        await negotiate(wire)
        wire.send(b'{"error": {"class": "Novel", "desc": "new"}, "id": %d}\r\n' % await ask(wire))
        await wire.receive()

    async with fake_server(path, script), qmpfd.connect(path) as client:
        with pytest.raises(qmpfd.QMPError, match="new") as info:
            await client.execute("x")
        assert type(info.value) is qmpfd.QMPError
        assert info.value.error_class == "Novel"


async def test_calls_from_many_tasks(path: Path) -> None:
    """Calls from many tasks each get their own reply."""
    found: dict[int, int] = {}

    async def one(number: int) -> None:
        with Pipe() as pipe:
            info = await client.add_fd(pipe, opaque=str(number))
            pipe.release()
            for fdset in await client.query_fdsets():
                if fdset.fdset_id == info.fdset_id:
                    assert [fd.opaque for fd in fdset.fds] == [str(number)]
            with pytest.raises(qmpfd.FdNotFound, match=f"fdset-id:{1000 + number}'"):
                await client.remove_fd(1000 + number)
            found[number] = info.fdset_id
            await client.remove_fd(info.fdset_id)
            assert not pipe.held()

    async with daemon(path), qmpfd.connect(path) as client:
        async with trio.open_nursery() as nursery:
            for number in range(100):
                nursery.start_soon(one, number)
        assert len(found) == 100
        assert await client.query_fdsets() == []


async def test_the_callers_descriptor_stays_the_callers(path: Path) -> None:
    """The client leaves a caller's descriptor open and unchanged."""
    async with daemon(path), qmpfd.connect(path) as client:
        with (ROOT / "pyproject.toml").open("rb") as file:
            await client.add_fd(file)
            await client.add_fd(file.fileno())
            assert file.readline()


async def test_an_exception_in_the_block(path: Path) -> None:
    """The exception is raised outside of a group, and the connection is closed."""
    async with daemon(path):
        before = open_fds()
        for wrong in (KeyError("mine"), qmpfd.GenericError("mine"), trio.ClosedResourceError()):
            with pytest.raises(type(wrong)) as info:  # noqa: PT012 - raised at the block's end
                async with qmpfd.connect(path) as client:
                    await client.query_fdsets()
                    raise wrong
            assert info.value is wrong
        await settle()
        assert open_fds() == before


async def test_unread_replies_do_not_block_a_long_request(path: Path) -> None:
    """Unread replies of cancelled calls do not block a long request."""
    opaque = "x" * 900_000  # more than the socket buffers, in either direction
    async with daemon(path) as server, qmpfd.connect(path) as client:
        with pipes(2) as made:
            await client.add_fd(made[0], opaque=opaque)
            async with trio.open_nursery() as nursery, server.services.lock:
                for _ in range(3):
                    nursery.start_soon(client.query_fdsets)
                await settle()
                nursery.cancel_scope.cancel()
            await settle()
            info = await client.add_fd(made[1], opaque=opaque)
            made[1].release()
            await client.remove_fd(info.fdset_id)
            assert not made[1].held()


# -- odd descriptors ---------------------------------------------------------------------------


class _Odd:
    def fileno(self) -> int:
        return -1


@pytest.mark.parametrize(
    "fds, expected",
    [
        ([-1], ValueError),
        ([_Odd()], ValueError),
        ([1 << 20], OSError),
        ([1 << 40], OverflowError),
        ([0] * 254, OSError),
    ],
    ids=["negative", "closed object", "not open", "too large", "too many"],
)
async def test_odd_descriptors(path: Path, fds: Sequence[int], expected: type[Exception]) -> None:
    """Invalid descriptors raise before anything is sent; the connection continues."""
    async with daemon(path), qmpfd.connect(path) as client:
        with pytest.raises(expected):
            await client.execute("add-fd", fds=fds)
        with Pipe() as pipe:
            info = await client.add_fd(pipe)
            pipe.release()
            await client.remove_fd(info.fdset_id)
            assert not pipe.held()


async def test_no_descriptor_at_all(path: Path) -> None:
    async with daemon(path), qmpfd.connect(path) as client:
        with pytest.raises((TypeError, AttributeError)):
            await client.add_fd("file")  # type: ignore[arg-type]  # as the test says
        assert await client.query_fdsets() == []


# -- the end -----------------------------------------------------------------------------------


async def test_the_server_is_gone(path: Path) -> None:
    async with daemon(path) as server, qmpfd.connect(path) as client:
        server.stop()
        await server.ended.wait()
        for _ in range(2):
            with pytest.raises(trio.BrokenResourceError):
                await client.query_fdsets()


async def test_the_server_goes_while_calls_wait(path: Path) -> None:
    async def script(wire: Wire) -> None:
        await negotiate(wire)
        await wire.receive()

    async def call() -> None:
        with pytest.raises(trio.BrokenResourceError):
            await client.query_fdsets()

    async with (
        fake_server(path, script),
        qmpfd.connect(path) as client,
        trio.open_nursery() as nursery,
    ):
        for _ in range(3):
            nursery.start_soon(call)


async def test_closed(path: Path) -> None:
    async with daemon(path):
        async with qmpfd.connect(path) as client:
            pass
        with pytest.raises(trio.ClosedResourceError):
            await client.query_fdsets()
        client.close()


async def test_closed_while_calls_wait(path: Path) -> None:
    async def script(wire: Wire) -> None:
        await negotiate(wire)
        await wire.drain()

    async def call(client: qmpfd.Client) -> None:
        with pytest.raises(trio.ClosedResourceError):
            await client.query_fdsets()

    async with (
        fake_server(path, script),
        trio.open_nursery() as nursery,
        qmpfd.connect(path) as client,
    ):
        for _ in range(3):
            nursery.start_soon(call, client)  # noqa: ASYNC111 - closed while the calls wait
        await settle()


@pytest.mark.parametrize("closed_by", ["client", "server"])
async def test_closed_while_a_call_is_being_sent(path: Path, closed_by: str) -> None:
    end = trio.Event()

    async def script(wire: Wire) -> None:
        await negotiate(wire)
        await end.wait()

    async def call(client: qmpfd.Client) -> None:
        expected = trio.ClosedResourceError if closed_by == "client" else trio.BrokenResourceError
        with pytest.raises(expected):
            await client.execute("x", {"much": "x" * 900_000})

    async with fake_server(path, script), qmpfd.connect(path) as client:
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(call, client)
            await settle()
            if closed_by == "client":
                client.close()
            else:
                end.set()
        end.set()


async def test_no_server(path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        async with qmpfd.connect(path):
            pass
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.bind(os.fspath(path))
    with pytest.raises(ConnectionRefusedError):
        async with qmpfd.connect(path):
            pass


async def test_paths_of_other_types(path: Path) -> None:
    """Bytes are a path too; what is no path opens no socket."""
    async with daemon(path), qmpfd.connect(os.fsencode(path)) as client:  # type: ignore[arg-type]
        assert await client.query_fdsets() == []
    open_before = open_fds()
    with pytest.raises(TypeError):
        async with qmpfd.connect(None):  # type: ignore[arg-type]
            pass
    assert open_fds() == open_before


async def test_a_rejection_is_the_exception(path: Path) -> None:
    """The exception has the server's reason."""
    async with daemon(path, limits=qmpfd.Limits(max_connections=1)), qmpfd.connect(path):
        with pytest.raises(qmpfd.QMPError, match="Too many connections"):
            async with qmpfd.connect(path):
                pass


# -- a real QEMU -------------------------------------------------------------------------------


@pytest.mark.qemu
async def test_against_qemu(path: Path) -> None:
    with qemu_at(path) as start:
        process = start()
        async with qmpfd.connect(path) as client:
            assert "qemu" in client.greeting["version"]
            with pipes(3) as made:
                infos = [await client.add_fd(pipe, 5, f"n:{pipe}") for pipe in made]
                for pipe in made:
                    pipe.release()
                assert [info.fdset_id for info in infos] == [5, 5, 5]
                [fdset] = await client.query_fdsets()
                assert [fd.fd for fd in fdset.fds] == [info.fd for info in infos]
                await client.remove_fd(5, infos[1].fd)
                assert [pipe.held() for pipe in made] == [True, False, True]
                await client.remove_fd(5)
                assert not any(pipe.held() for pipe in made)
            with pytest.raises(qmpfd.GenericError, match="'fdset-id:5' not found"):
                await client.remove_fd(5)
            with pytest.raises(qmpfd.CommandNotFound):
                await client.execute("no-such-command")
            with Pipe() as pipe, pytest.raises(qmpfd.GenericError, match="non-negative"):
                await client.add_fd(pipe, -1)
            await client.execute("quit")
        assert process.wait(PATIENCE) == 0
