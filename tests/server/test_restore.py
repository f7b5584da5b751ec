"""Restore after a takeover or a restart: one invalid item affects no other."""

from __future__ import annotations

import os
from time import monotonic

import pytest
from helpers import pipes

from qmpfd.errors import GenericError
from qmpfd.fdsets import StoredFd
from qmpfd.kernel.fd import Fd
from qmpfd.kernel.hangups import Hangups
from qmpfd.server.restore import _fill_store
from qmpfd.server.saved_state import SavedFd
from qmpfd.server.server import DaemonServer


class NoWatches(Hangups[StoredFd]):
    """Watches whose epoll_ctl(2) fails with ENOSPC: fs.epoll.max_user_watches is used up."""

    def watch(self, fd: Fd, entry: StoredFd) -> None:
        raise GenericError("The file descriptor cannot be watched: No space left on device")


async def test_epoll_is_out_of_watches(caplog: pytest.LogCaptureFixture) -> None:
    server = DaemonServer()
    server.daemon.hangups.close()
    server.daemon.hangups = NoWatches()
    with pipes(3) as made:
        fds = {fd.number: fd for fd in (Fd(os.dup(pipe.fileno())) for pipe in made)}
        now = monotonic()
        saved = [
            SavedFd("", 5, number, None, (1, 2, 3), now - 1.0, now + 60.0, watch_hangup=watch)
            for number, watch in zip(fds, (False, True, False), strict=True)
        ]
        _fill_store(server, now, saved, fds)
        assert not fds
        fdset = server.store.get(5)
        assert fdset is not None
        assert list(fdset.fds) == [each.number for each in saved]
        assert [stored.lifetime.watch_hangup for stored in fdset.fds.values()] == [False] * 3
        assert all(stored.lifetime.expires_at is not None for stored in fdset.fds.values())
        assert "is not removed when its peer hangs up" in caplog.text
        server.close()


async def test_one_invalid_record_affects_no_other(caplog: pytest.LogCaptureFixture) -> None:
    """One record has an invalid fd set id: all others are restored after a crash."""
    server = DaemonServer()
    with pipes(3) as made:
        fds = {fd.number: fd for fd in (Fd(os.dup(pipe.fileno())) for pipe in made)}
        saved = [
            SavedFd("", id_, number, None, None, 0.0, None, watch_hangup=False)
            for number, id_ in zip(fds, (0, -3, 7), strict=True)
        ]
        _fill_store(server, monotonic(), saved, fds, skip_refused=True)
        assert not fds
        for pipe in made:
            pipe.release()
        assert [pipe.held() for pipe in made] == [True, False, True]
        assert [fdset.id for fdset in server.store] == [7, 0]
        assert "of fd set -3 is lost" in caplog.text
        server.close()


async def test_ages_and_expiries_are_restored() -> None:
    """Ages and expiries survive a change of process; a time in the future counts as now."""
    server = DaemonServer()
    elapsed = 5.0
    for at, expected in ((monotonic() - elapsed, elapsed), (monotonic() + 1e6, 0.0)):
        with pipes(1) as [pipe]:
            fd = Fd(os.dup(pipe.fileno()))
            saved = SavedFd("", 0, fd.number, None, None, at - 10, at + 20, watch_hangup=False)
            [stored] = _fill_store(server, at, [saved], {fd.number: fd}).values()
            now = server.daemon.clock() - expected
            assert now - stored.added_at == pytest.approx(10, abs=1)
            assert stored.lifetime.expires_at == pytest.approx(now + 20, abs=1)
            fds: list[Fd] = []
            server.daemon.remove([stored], "removed", fds)
            server.daemon.closer.close(fds)
    server.close()
