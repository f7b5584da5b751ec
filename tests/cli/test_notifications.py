"""Notifications reach the service manager, also after failed attempts."""

from __future__ import annotations

import os
import resource
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from qmpfd.cli.notifications import Notifications
from qmpfd.limits import NOTIFY_RETRY


@asynccontextmanager
async def notifications() -> AsyncIterator[Notifications]:
    with closing(Notifications(None)) as messages:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(messages.resend)
            yield messages
            nursery.cancel_scope.cancel()


@contextmanager
def manager(path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.setblocking(False)
        sock.bind(os.fspath(path))
        yield sock
    path.unlink()


def received(sock: socket.socket) -> list[str]:
    messages = []
    while True:
        try:
            messages.append(sock.recv(4096).decode())
        except BlockingIOError:
            return messages


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "notify"
    monkeypatch.setenv("NOTIFY_SOCKET", os.fspath(path))
    return path


async def test_a_manager_that_is_not_there_yet(path: Path, autojump_clock: MockClock) -> None:
    async with notifications() as messages:
        messages.notify("READY=1", "MAINPID=1")
        messages.notify("STATUS=old")
        messages.notify("STATUS=new")
        await trio.sleep(10)
        with manager(path) as sock:
            await trio.sleep(2 * NOTIFY_RETRY)
            assert received(sock) == ["READY=1\nMAINPID=1", "STATUS=new"]


async def test_a_manager_that_is_restarted(path: Path, autojump_clock: MockClock) -> None:
    async with notifications() as messages:
        for message in ("READY=1", "STATUS=1", "STATUS=2"):
            with manager(path) as sock:
                messages.notify(message)
                await trio.sleep(2 * NOTIFY_RETRY)
                assert received(sock) == [message]


async def test_a_manager_that_does_not_read(path: Path, autojump_clock: MockClock) -> None:
    """A full queue (net.unix.max_dgram_qlen): the newest message of each kind is sent later."""
    async with notifications() as messages:
        with manager(path) as sock:
            for number in range(2000):
                messages.notify(f"STATUS={number}")
            messages.notify("STOPPING=1")
            assert received(sock)[-1] != "STOPPING=1"
            await trio.sleep(2 * NOTIFY_RETRY)
            assert received(sock) == ["STATUS=1999", "STOPPING=1"]


async def test_no_descriptor_for_a_socket(path: Path, autojump_clock: MockClock) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with manager(path) as sock:
        async with notifications() as messages:
            resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
            try:
                messages.notify("READY=1")
                messages.notify("WATCHDOG=1")
                await trio.sleep(2 * NOTIFY_RETRY)
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            assert received(sock) == []
            await trio.sleep(2 * NOTIFY_RETRY)
            assert received(sock) == ["READY=1", "WATCHDOG=1"]
            resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
            try:
                messages.notify("STATUS=full")  # the notifier's socket is open
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            assert received(sock) == ["STATUS=full"]


async def test_nobody_to_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    async with notifications() as messages:
        assert not messages.wanted
        messages.notify("READY=1")
