"""The kernel's limit of descriptors in flight: sent, and not received yet (unix(7))."""

from __future__ import annotations

import errno
import socket
from contextlib import ExitStack

from .fd import discard, send
from .files import open_null

# capabilities(7): CAP_SYS_ADMIN and CAP_SYS_RESOURCE.
_UNLIMITED_IN_FLIGHT = 1 << 21 | 1 << 24


def in_flight_is_limited() -> bool:
    """Whether the limit of descriptors in flight applies to this process (:class:`InFlightProbe`).

    It applies to root too, if a service manager has removed both capabilities.
    """
    try:
        with open("/proc/self/status", "rb") as status:
            held = next(line for line in status if line.startswith(b"CapEff:"))
    except (OSError, StopIteration):
        return True
    return not int(held.split()[1], 16) & _UNLIMITED_IN_FLIGHT


class InFlightProbe:
    """Tests whether the kernel's limit of descriptors in flight is reached.

    The descriptors that all processes of an unprivileged user have sent and no peer has received
    are limited; beyond the limit sendmsg(2) fails with ETOOMANYREFS (unix(7)), and replies with
    descriptors cannot be sent.

    Raises:
        OSError: this process is out of descriptors.
    """

    def __init__(self) -> None:
        with ExitStack() as stack:
            self._near, self._far = map(stack.enter_context, socket.socketpair())
            self._null = stack.enter_context(open_null())
            self._open = stack.pop_all()

    def exhausted(self) -> bool:
        """Whether sending a descriptor fails now."""
        try:
            send(self._near, b" ", [self._null])
        except OSError as exc:
            return exc.errno == errno.ETOOMANYREFS
        discard(self._far, 1)  # the kernel drops the descriptor with it
        return False

    def close(self) -> None:
        """Close the socket pair and the descriptor that is sent."""
        self._open.close()
