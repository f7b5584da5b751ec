"""What comes back after a takeover or a restart: one thing that is wrong costs that thing only."""

from __future__ import annotations

import os
from collections import deque
from time import monotonic

import pytest
from helpers import pipes

from qmpfd.errors import GenericError
from qmpfd.fdsets import StoredFd
from qmpfd.kernel.fd import Fd
from qmpfd.kernel.hangups import Hangups
from qmpfd.server.restore import _drop, _fill_store
from qmpfd.server.saved_state import SavedFd, SavedSet
from qmpfd.server.server import DaemonServer


class NoWatches(Hangups[StoredFd]):
    """As where fs.epoll.max_user_watches is used up (epoll(7)): ENOSPC."""

    def watch(self, fd: Fd, entry: StoredFd) -> None:
        raise GenericError("The file descriptor cannot be watched: No space left on device")


async def test_no_watch_to_be_had(caplog: pytest.LogCaptureFixture) -> None:
    server = DaemonServer()
    server.daemon.hangups.close()
    server.daemon.hangups = NoWatches()
    with pipes(3) as made:
        fds = deque(Fd(os.dup(pipe.fileno())) for pipe in made)
        saved = [
            SavedFd(fd.fileno(), None, (1, 2, 3), 1.0, None, 60.0, watch_hangup=watch)
            for fd, watch in zip(fds, (False, True, False), strict=True)
        ]
        sets = [SavedSet(5, saved)]
        _fill_store(server, monotonic(), sets, lambda number: fds[0], [], fds.popleft)
        assert not fds
        fdset = server.store.get(5)
        assert fdset is not None
        assert list(fdset.fds) == [each.number for each in saved]
        assert [stored.lifetime.watch_hangup for stored in fdset.fds.values()] == [False] * 3
        assert all(stored.lifetime.expires_at is not None for stored in fdset.fds.values())
        assert "is not removed when its peer hangs up" in caplog.text
        server.close()


async def test_one_that_cannot_be_stored(caplog: pytest.LogCaptureFixture) -> None:
    """An fd set of that id cannot be: after a crash, the others are there."""
    server = DaemonServer()
    with pipes(3) as made:
        fds = deque(Fd(os.dup(pipe.fileno())) for pipe in made)
        sets = [
            SavedSet(id_, [SavedFd(fd.fileno(), None, None, 1.0, None, None, watch_hangup=False)])
            for fd, id_ in zip(fds, (0, -3, 7), strict=True)
        ]
        _fill_store(server, monotonic(), sets, lambda number: fds[0], [], fds.popleft, _drop)
        for pipe in made:
            pipe.release()
        assert [pipe.held() for pipe in made] == [True, False, True]
        assert [fdset.id for fdset in server.store] == [7, 0]
        assert "of fd set -3 is lost" in caplog.text
        server.close()
