"""Changes of the store: all checks come first, and each change is reported once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest
from helpers import Pipe, Wire, daemon, error, pipes, value

import qmpfd
from qmpfd.commands import TABLE, SharedState
from qmpfd.commands.quotas import memory_size
from qmpfd.fdsets import Lifetime, Peer, StoredFd
from qmpfd.kernel.close_pool import ClosePool
from qmpfd.kernel.fd import Fd, close_all
from qmpfd.kernel.hangups import Hangups

PEER = Peer(1, 1, 1)


@dataclass
class FullMirror:
    """A mirror with *room* places."""

    room: int
    is_over: bool = False
    entries: list[StoredFd] = field(default_factory=list)

    def check_quota(self, count: int, opaque: str | None) -> None:
        """Permit everything: only the addition itself fails."""

    def added(self, stored: StoredFd) -> None:
        assert not stored.removed
        if len(self.entries) == self.room:
            raise OSError("no room")
        self.entries.append(stored)

    def removed(self, stored: StoredFd) -> None:
        assert not stored.fd.closed
        self.entries.remove(stored)


@contextmanager
def shared_state() -> Iterator[SharedState]:
    def unused() -> None:
        raise AssertionError

    made = SharedState("spec", qmpfd.Limits(), lambda: 10.0, unused, TABLE, ClosePool(), Hangups())
    try:
        yield made
    finally:
        close_all(stored.fd for stored in made.store.everything())
        made.closer.shut_down()
        made.hangups.close()


@pytest.mark.parametrize("room", range(3))
@pytest.mark.parametrize("watch_hangup", [False, True])
def test_all_or_none(room: int, watch_hangup: bool) -> None:
    """If the mirror fails at any descriptor of a command, nothing is changed."""
    with shared_state() as shared, pipes(3) as made:
        mirror = shared.mirror = FullMirror(room)
        fds = [Fd(os.dup(pipe.fileno())) for pipe in made]
        with pytest.raises(OSError, match="no room"):
            shared.add(fds, None, "x", PEER, Lifetime(watch_hangup=watch_hangup))
        assert len(fds) == 3, "they are the caller's"
        assert (len(shared.store), shared.store.fd_count, mirror.entries) == (0, 0, [])
        assert (shared.quotas.fds_total, shared.quotas.opaque_total) == (0, 0)
        mirror.room = 3
        shared.add(fds, None, "x", PEER, Lifetime(watch_hangup=watch_hangup))
        assert fds == []
        assert (shared.store.fd_count, len(mirror.entries)) == (3, 3)
        closed: list[Fd] = []
        shared.remove(shared.store.everything(), "removed", closed)
        assert (len(closed), mirror.entries, shared.store.fd_count) == (3, [], 0)
        assert (shared.quotas.fds_total, shared.quotas.opaque_total) == (0, 0)
        close_all(closed)


@pytest.mark.parametrize("command", ["add-fd", "add-fds"])
async def test_no_closed_descriptor_is_listed(path: Path, command: str) -> None:
    """If the mirror fails, the command fails, and the descriptor is in no set."""
    async with daemon(path) as server:
        server.daemon.mirror = FullMirror(1)
        with Pipe() as pipe, await Wire.session(path) as wire:
            value(await wire.call(command, {"opaque": "a"}, [pipe]))
            assert error(await wire.call(command, {"opaque": "b"}, [pipe])) == "GenericError"
            listed = value(await wire.call("query-fdsets"))
            assert [[fd["opaque"] for fd in fdset["fds"]] for fdset in listed] == [["a"]]
            assert all(fd["fd"] >= 0 for fdset in listed for fd in fdset["fds"])
            pipe.release()
            value(await wire.call("remove-fd", {"fdset-id": 0}))
            assert not pipe.held()
        server.daemon.mirror = None


@pytest.mark.parametrize("text", ["", "vm", "é", "\N{LATIN SMALL LETTER A WITH MACRON}x", "😀" * 9])
def test_the_size_of_a_text_is_always_the_same(text: str) -> None:
    """sys.getsizeof grows after an encoding: PEP 393 caches the UTF-8 form in the string."""
    fresh = "".join(list(text))
    before = memory_size(fresh)
    msgspec.json.encode(fresh)
    assert memory_size(fresh) == before >= len(fresh.encode())


def test_what_was_charged_is_refunded() -> None:
    """The refund equals the charge, also after a listing, which encodes the texts."""
    with shared_state() as shared, Pipe() as pipe:
        for n in range(50):
            shared.add([Fd(os.dup(pipe.fileno()))], None, "é" * (n + 1), PEER)
        assert shared.quotas.opaque_total > 0
        for stored in shared.store.everything():
            assert stored.opaque is not None
            msgspec.json.encode(stored.opaque)
        closed: list[Fd] = []
        shared.remove(shared.store.everything(), "removed", closed)
        close_all(closed)
        assert (shared.quotas.opaque_total, dict(shared.quotas.opaque_by_uid)) == (0, {})
        assert (shared.quotas.fds_total, dict(shared.quotas.fds_by_uid)) == (0, {})
