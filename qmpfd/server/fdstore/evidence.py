"""Tells whether a daemon that was being taken over has handed everything over.

It says so on the lifeline: a connected socket of which it has one end, and the newcomer the other
one, and whoever keeps the newcomer's descriptors a duplicate of that.  They close it after all
descriptors that they have got: so an old daemon that goes on knows when nobody has a duplicate.
"""

from __future__ import annotations

import select
import socket

from ...kernel.fd import Fd
from ..saved_state import DONE
from .replay import replay


def has_handed_over(lifeline: Fd, journal: Fd | None, timeout: float) -> bool:
    """Whether the old daemon of a takeover has given up what it held.

    Args:
        lifeline: what it says so on; if it has ended without a word, it has given up everything.
        journal: its journal, if it is started again when it dies: unless that says so, not then.
        timeout: seconds to wait for it.
    """
    poll = select.poll()
    poll.register(lifeline, select.POLLIN)
    if not poll.poll(timeout * 1000):  # it is stopped, before it could decide
        return False
    sock = socket.socket(fileno=lifeline.fileno())
    try:
        said = sock.recv(1, socket.MSG_PEEK)
    except ConnectionError:
        said = b""
    finally:
        sock.detach()
    if said:
        return said == DONE
    return journal is None or replay(journal).left is True
