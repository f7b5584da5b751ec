"""The daemon reads journals of older versions: ``journal-1`` is of format 1, written by version
0.1.0.  The file of a released format is never written again.
"""

from __future__ import annotations

import os
from pathlib import Path

from qmpfd.kernel.fd import Fd
from qmpfd.server.fdstore.replay import replay


def test_format_1() -> None:
    with Fd(os.open(Path(__file__).with_name("journal-1"), os.O_RDONLY)) as journal:
        history = replay(journal)
    assert (history.begun.format, history.begun.generation) == (1, 7)
    assert history.confirmed
    assert not history.left
    assert {name: each.path for name, each in history.listeners.items()} == {
        "~0": b"/run/qmpfd.sock"
    }
    stored = [(each.name, each.fdset_id, each.number) for each in history.entries.values()]
    assert stored == [("~2", 0, 9), ("~4", 3, 11), ("~5", 3, 12)]
    disk, timed, _ = history.entries.values()
    assert (disk.opaque, disk.added_by, disk.added_at) == ("rdwr:disk.img", (100, 0, 0), 1000.5)
    assert (timed.opaque, timed.expires_at, timed.watch_hangup) == (
        "caf\N{LATIN SMALL LETTER E WITH ACUTE}",
        5000.5,
        True,
    )
