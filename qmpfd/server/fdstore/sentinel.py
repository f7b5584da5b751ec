"""Whether the service manager really keeps what it is sent.

A barrier says that messages were read, not that anything was stored: systemd drops a descriptor
without a word where NotifyAccess= does not allow this process to speak, where a wrapper is the main
process of a Type=simple service, and beyond FileDescriptorStoreMax=, which may be less than
$FDSTORE says, and may be lowered at any time.  So a pipe's write end is stored as well, and open
nowhere else: the read end hangs up as soon as that was dropped.
"""

from __future__ import annotations

import os
import select

import trio

from ...kernel.fd import Fd, close_all


class Sentinel:
    """A pipe whose write end is to be stored.

    Raises:
        OSError: this process is out of descriptors.
    """

    def __init__(self) -> None:
        reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._reader, self.writer = Fd(reader), Fd(writer)

    def sent(self) -> None:
        """The write end is on its way, or dropped: only the store has it from here on."""
        self.writer.close()

    @property
    def is_stored(self) -> bool:
        """Whether somebody has the write end."""
        poll = select.poll()
        poll.register(self._reader, 0)
        return not poll.poll(0)

    async def wait_dropped(self) -> None:
        """Wait until nobody has the write end.

        Raises:
            trio.ClosedResourceError: :meth:`close` was called.
        """
        await trio.lowlevel.wait_readable(self._reader)

    def close(self) -> None:
        """Take no more notice."""
        if not self._reader.closed:
            trio.lowlevel.notify_closing(self._reader)
        close_all([self._reader, self.writer])
