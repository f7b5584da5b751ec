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
from functools import partial

import trio

from ...kernel.fd import Fd, close_all, pipe
from ...limits import MAX_PROBES
from .barrier_link import BarrierLink
from .names import PROBE, SENTINEL

#: Probes that are stored at a time behind what was added.
_MOST_PROBES = 2


class Sentinel:
    """A pipe whose write end is to be stored, or is.

    Args:
        reader: the read end; owned from here on.
        writer: the write end, likewise.
    """

    def __init__(self, reader: Fd, writer: Fd) -> None:
        self._reader, self.writer = reader, writer

    @classmethod
    def create(cls) -> Sentinel:
        """A new one.

        Raises:
            OSError: this process is out of descriptors.
        """
        return cls(*pipe())

    @classmethod
    def reopen(cls, writer: Fd) -> Sentinel:
        """The one whose write end has come back from the fd store: its read end went with the
        process that had it, and is opened anew (proc(5), /proc/pid/fd).

        Args:
            writer: the write end; owned from here on.

        Raises:
            OSError: there is no /proc, or this process is out of descriptors.
        """
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
        reader = os.open(f"/proc/self/fd/{writer.fileno()}", flags)
        return cls(Fd(reader), writer)

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
        returned: name and write end of the first sentinel of the daemon before, which has come back
            and is older than all that is sent now; None if there is none.
        dropped: called when what was kept is found to be kept no longer.
        shown: called with whether there was room for all that a probe was behind.

    Raises:
        OSError: this process is out of descriptors.
    """

    def __init__(
        self,
        link: BarrierLink,
        generation: int,
        returned: tuple[str, Fd] | None,
        dropped: Callable[[], object],
        shown: Callable[[bool], object],
    ) -> None:
        self._link = link
        self._dropped = dropped
        self._shown = shown
        self._probes: list[Sentinel] = []  # under way
        self._spare: list[Sentinel] = []  # for the next time
        if returned is not None:
            self._name, writer = returned
            try:
                self._first = Sentinel.reopen(writer)
                return
            except OSError:  # there is no /proc
                link.remove(self._name)
        self._name = f"{SENTINEL}{generation}"
        self._first = Sentinel.create()
        link.store(self._name, self._first.writer)

    async def is_stored(self) -> bool:
        """Whether all is stored that was sent so far: the first of it, and the last."""
        last = Sentinel.create()
        self._link.store(f"{PROBE}0", last.writer)
        await self._link.sync()
        self._first.sent()
        last.sent()
        stored = last.is_stored and self._first.is_stored
        self._link.remove(f"{PROBE}0")
        last.close()
        return stored

    async def count_room(self, most: int) -> tuple[int, bool]:
        """How many more are stored, of *most* at most; and whether that is all there is."""
        probes: list[Sentinel] = []
        with suppress(OSError):  # out of descriptors: fewer are tried
            for number in range(min(most, MAX_PROBES)):
                probes.append(Sentinel.create())
                self._link.store(f"{PROBE}{number}", probes[-1].writer)
        await self._link.sync()
        for probe in probes:
            probe.sent()
        stored = sum(probe.is_stored for probe in probes)
        for number, probe in enumerate(probes):
            self._link.remove(f"{PROBE}{number}")
            probe.close()
        await self._link.sync()
        return stored, stored < len(probes)

    def prepare(self) -> None:
        """Take what the next :meth:`show_room` needs.

        Raises:
            OSError: this process is out of descriptors.
        """
        while len(self._spare) < _MOST_PROBES:
            self._spare.append(Sentinel.create())

    def show_room(self, more: int) -> None:
        """A barrier is sent next: have it show whether there was room for all before it, and for so
        many *more*, before anybody is told that the barrier has passed.

        Raises:
            OSError: this process is out of descriptors.
        """
        if self._probes:  # not everything could be sent the last time, and there is more by now
            for number in range(len(self._probes)):
                self._link.remove(f"{PROBE}{number}")
        else:
            self.prepare()
            self._probes = [self._spare.pop() for _ in range(1 + more)]
            self._link.on_synced(partial(self._find_probes, self._probes), first=True)
        for number, probe in enumerate(self._probes):
            self._link.store(f"{PROBE}{number}", probe.writer)

    def _find_probes(self, probes: list[Sentinel]) -> None:
        if self._probes is not probes:  # all is over
            return
        self._probes = []
        for probe in probes:
            probe.sent()
        stored = all(probe.is_stored for probe in probes)
        for number, probe in enumerate(probes):
            self._link.discard(f"{PROBE}{number}")
            probe.close()
        self._shown(stored)

    async def watch(self) -> None:
        """Find out when the first is dropped: what is sent later is dropped later."""
        with suppress(trio.ClosedResourceError):
            await self._first.wait_dropped()
            self._dropped()

    def forget(self) -> None:
        """Have the first one closed there as well."""
        self.close()
        self._link.remove(self._name)

    def close(self) -> None:
        """Take no more notice."""
        self._first.close()
        for probe in self._probes + self._spare:
            probe.close()
        self._probes, self._spare = [], []
