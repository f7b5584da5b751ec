"""Evidence of a handover: whether the predecessor of a takeover has handed everything over.

The predecessor writes the outcome to the lifeline, a socket pair.  It has one end; the successor
has the other one, and the successor's fd store a duplicate of that.  Both close the lifeline after
all received descriptors: its EOF tells a predecessor that goes on that no duplicates are left.
"""

from __future__ import annotations

import select
import socket

from ...kernel.fd import BorrowedSocket, Fd, poll
from ..saved_state import DONE
from .replay import replay


def has_handed_over(lifeline: Fd, journal: Fd | None, timeout: float) -> bool:
    """Return whether the predecessor of a takeover has handed everything over.

    Args:
        lifeline: the successor's end of the lifeline.  EOF without an outcome: the predecessor has
            died, and so lost everything, unless it is restarted with *journal*.
        journal: the predecessor's journal, or None.  After a death without an outcome, it decides.
        timeout: seconds to wait for the outcome.
    """
    if not poll(lifeline, select.POLLIN, timeout):  # the predecessor is stopped and has not decided
        return False
    try:
        with BorrowedSocket(lifeline) as sock:
            said = sock.recv(1, socket.MSG_PEEK)
    except ConnectionError:
        said = b""
    if said:
        return said == DONE
    return journal is None or replay(journal).left is True
