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
from collections.abc import Callable
from contextlib import suppress

import trio

from ...kernel.fd import Fd, close_all
from ...limits import MAX_PROBES
from .barrier_link import BarrierLink
from .names import probe_name, sentinel_name


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


class Evidence:
    """Of what the service manager stores: the first sentinel, which is dropped before what is sent
    later, and more for a moment.

    Args:
        link: the connection to it.
        generation: of the first journal that comes with it.

    Raises:
        OSError: this process is out of descriptors.
    """

    def __init__(self, link: BarrierLink, generation: int) -> None:
        self._link = link
        self._first = Sentinel()
        self._name = sentinel_name(generation)
        link.store(self._name, self._first.writer)

    async def is_stored(self) -> bool:
        """Whether all is stored that was sent so far: the first of it, and the last."""
        last = Sentinel()
        self._link.store(probe_name(0), last.writer)
        await self._link.sync()
        self._first.sent()
        last.sent()
        stored = last.is_stored and self._first.is_stored
        self._link.remove(probe_name(0))
        last.close()
        return stored

    async def count_room(self, most: int) -> int | None:
        """How many more are stored; None if it is as many as were tried, *most* at most."""
        probes: list[Sentinel] = []
        with suppress(OSError):  # out of descriptors: fewer are tried
            for number in range(min(most, MAX_PROBES)):
                probes.append(Sentinel())
                self._link.store(probe_name(number), probes[-1].writer)
        await self._link.sync()
        for probe in probes:
            probe.sent()
        stored = sum(probe.is_stored for probe in probes)
        for number, probe in enumerate(probes):
            self._link.remove(probe_name(number))
            probe.close()
        await self._link.sync()
        return stored if stored < len(probes) else None

    async def watch(self, dropped: Callable[[], object]) -> None:
        """Call *dropped* when the first is dropped: what is sent later is dropped later."""
        with suppress(trio.ClosedResourceError):
            await self._first.wait_dropped()
            dropped()

    def forget(self) -> None:
        """Have the first one closed there as well."""
        self.close()
        self._link.remove(self._name)

    def close(self) -> None:
        """Take no more notice."""
        self._first.close()
