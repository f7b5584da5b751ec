"""Tells whether a daemon that was being taken over has handed everything over."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Iterable

from ...client.blocking import BlockingClient, NoDaemon
from ...errors import QMPError
from ...kernel.fd import Fd, is_in_memory
from ...limits import ANSWER_TIMEOUT
from ..saved_state import SavedListener
from .replay import replay

#: Seconds between two reads of a journal.
_POLL = 0.02


def is_dead(process: Fd, timeout: float) -> bool:
    """Whether a process ends within so many seconds.

    Args:
        process: a pidfd, or a pipe that hangs up then.
        timeout: seconds.
    """
    poll = select.poll()
    poll.register(process, select.POLLIN)
    return bool(poll.poll(timeout * 1000))


def serves(listeners: Iterable[SavedListener]) -> bool:
    """Whether somebody answers at one of the sockets: the old daemon of a takeover, which has given
    up nothing then.
    """
    for listener in listeners:
        if listener.path is not None:
            try:
                BlockingClient(os.fsdecode(listener.path), ANSWER_TIMEOUT).close()
            except NoDaemon:
                continue
            except QMPError:  # it turns us away
                pass
            return True
    return False


def has_handed_over(evidence: Fd, timeout: float) -> bool:
    """Whether the old daemon of a takeover has given up what it held.

    Args:
        evidence: the old daemon's journal, whose last record says so, or a pidfd of the old daemon,
            which has given up everything once it has ended.
        timeout: seconds to wait for it, where the journal says neither.
    """
    if not is_in_memory(evidence.fileno()):
        return is_dead(evidence, timeout)
    deadline = time.monotonic() + timeout
    while (left := replay(evidence).left) is None:
        if time.monotonic() >= deadline:
            return False
        time.sleep(_POLL)
    return left
